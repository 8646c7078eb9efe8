"""A stream of tokens that is reduced twice: by the oracle's formulas, and as nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from tests.oracle.operators import reference_fuse, reference_rebase, reference_restore
from tofu_fx.axes.atoms import Atom, Base
from tofu_fx.rewriting.layout import Emitter, Layout
from tofu_fx.rewriting.versions import Stream

B, C, LEAD, FREE, TAIL = 2, 4, 1, 10, 2
N = LEAD + FREE + TAIL
BATCH = Atom(Base("batch", B), 0, B)
FEATURES = Atom(Base("features", C, "feature"), 0, C)
TOKENS = Base("tokens", FREE, "token", 0)
GONE = (3, 2)  # at the first reduction, and at the second


def run_with(prefix: int, suffix: int) -> Atom:
    """A run of the stream's tokens with other protected ones around them."""
    return Atom(TOKENS, -prefix, prefix + FREE + suffix)


OWN = run_with(LEAD, TAIL)


def layout(run: Atom = OWN, tokens: int = 1) -> Layout:
    axes = [(BATCH,), (FEATURES,)]
    axes.insert(tokens, (run,))
    return Layout(tuple(axes), tokens, (BATCH,))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = random(B, N, C)
METRICS = (random(B, N, C, seed=1), random(B, N - GONE[0], C, seed=2))
GAIN = random(B, N - GONE[0], C, seed=3)  # what is added to the stream between the reductions


class Steps:
    """Two reductions by the oracle: each step's x, what is left, sizes and indices."""

    def __init__(self, strategy: str) -> None:
        size, x, self.steps = torch.ones(B, N), X, []
        for metric, gone in zip(METRICS, GONE, strict=True):
            merged, new_size, assignment, kept = reference_fuse(x, metric, size, gone, strategy, LEAD, TAIL)
            self.steps.append({"before": x, "merged": merged, "size": size, "assignment": assignment, "kept": kept})
            x, size = merged + GAIN[:, : merged.shape[1]], new_size
        self.size = (self.steps[1]["size"], new_size)
        self.origin = (self.steps[0]["kept"], self.steps[0]["kept"].gather(1, self.steps[1]["kept"]))

    def restored(self, x: Tensor, additive: tuple[bool, bool]) -> Tensor:
        for step, known in zip(reversed(self.steps), reversed(additive), strict=True):
            x = reference_restore(x, step["assignment"], *((step["before"], step["merged"]) if known else ()))
        return x

    def rebased(self, x: Tensor, strategy: str) -> Tensor:
        for step in self.steps:
            x = reference_rebase(x, step["size"], step["assignment"], step["kept"], strategy).to(x.dtype)
        return x


def fusing(emit: Emitter, x: Node, match: Node, strategy: str) -> Callable[[Node, Any], Node]:
    """What writes the operator of a step."""
    target, ends = torch.ops.tofu.fuse_tokens.default, (OWN.prefix, OWN.suffix)
    return lambda size, gone: emit.call(target, x, match, size, gone, strategy, *ends)


def reduced(
    emit: Emitter,
    nodes: tuple[Node, ...],
    strategy: str,
    additive: tuple[bool, bool] = (True, True),
    batch: Atom = BATCH,
) -> tuple[Stream, Node]:
    """A stream that was reduced twice, as `Steps` does, and its newest features."""
    x, first, second, gain = nodes
    stream = Stream(OWN, (batch,))
    step = stream.reduce(emit, x, fusing(emit, x, first, strategy), strategy, N - GONE[0], additive[0])
    x = emit.call(torch.ops.aten.add.Tensor, step.merged, gain)
    step = stream.reduce(emit, x, fusing(emit, x, second, strategy), strategy, N - sum(GONE), additive[1])
    assert stream.newest == 2
    return stream, step.merged
