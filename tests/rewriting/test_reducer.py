"""The operator of a site as it is written: protected tokens at either end stay, whatever they are like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Node

from tests.rewriting.twice import METRICS, OWN, B, N, X
from tests.rewriting.writing import emitted, same, targets, written
from tofu_fx.rewriting.layout import Emitter
from tofu_fx.rewriting.reducer import Reducer, Step
from tofu_fx.sites.site import Planned

GONE = 2


def site(strategy: str) -> Planned:
    """A site on the stream of ``OWN``."""
    nothing: Any = None
    ends = {"prefix": OWN.prefix, "suffix": OWN.suffix}
    counts = {"tokens_in": N, "tokens_out": N - GONE}
    return Planned("here", "", nothing, N, 2, 8, reduce_at=nothing, strategy=strategy, r=GONE, **ends, **counts)


def fused(emit: Emitter, x: Node, match: Node, size: Node, strategy: str = "mean") -> Node:
    def other(name: str) -> Node:
        raise AssertionError(name)

    return Reducer().fuse(emit, Step(site(strategy), OWN, x, match, size, GONE, 0, other))


@pytest.mark.parametrize("strategy", ["prune", "mean", "mlerp"])
def test_tokens_at_either_end_are_never_merged_however_alike_they_are(strategy: str) -> None:
    match = METRICS[0].clone()
    for place in (*range(OWN.prefix), *range(N - OWN.suffix, N)):
        match[:, place] = match[:, OWN.prefix]  # the first free token's: nothing is more like it
    merged, size, assignment, _ = emitted(
        lambda emit, *nodes: [fused(emit, *nodes, strategy=strategy)], X, match, torch.ones(B, N)
    )[0]
    assert merged.shape[1] == N - GONE
    assert same(merged[:, : OWN.prefix], X[:, : OWN.prefix])
    assert same(merged[:, -OWN.suffix :], X[:, -OWN.suffix :])
    ends = torch.cat([size[:, : OWN.prefix], size[:, -OWN.suffix :]], 1)
    assert bool((ends == 1).all())
    assert float(size.sum()) == B * N
    assert [int((assignment == place).sum()) for place in range(OWN.prefix)] == [B] * OWN.prefix


def test_one_operator_is_written() -> None:
    gm = written(lambda emit, *nodes: [fused(emit, *nodes)], X, METRICS[0], torch.ones(B, N))
    assert targets(gm) == [torch.ops.tofu.fuse_tokens.default]
