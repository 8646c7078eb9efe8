"""A stream's versions one by one: what each step emits, against the oracle's formulas and plain indexing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from tests.rewriting.twice import (
    BATCH,
    FREE,
    GAIN,
    GONE,
    LEAD,
    METRICS,
    OWN,
    TAIL,
    B,
    C,
    N,
    Steps,
    X,
    layout,
    random,
    reduced,
    run_with,
)
from tests.rewriting.writing import emitted, same, written
from tofu_fx.axes.atoms import Barrier
from tofu_fx.rewriting.layout import Emitter
from tofu_fx.rewriting.versions import Stream


def given(write: Any, *more: Tensor) -> Any:
    """Run what ``write(emit, x, metric, metric, gain, *more)`` emits."""
    return emitted(write, X, *METRICS, GAIN, *more)


@pytest.mark.parametrize("strategy", ["prune", "mean", "mlerp"])
def test_each_reduction_starts_from_the_sizes_and_indices_of_the_one_before(strategy: str) -> None:
    def write(emit: Emitter, *nodes: Node) -> Any:
        stream, merged = reduced(emit, nodes, strategy)
        sizes = [stream.size(emit, version, nodes[0]) for version in (0, 1, 2)]
        kept = [stream.kept(emit, version, OWN) for version in (1, 2)]
        assert [stream.count(emit, version, OWN) for version in (0, 1, 2)] == [N, N - 3, N - 5]
        return merged, sizes, kept, stream.log_size(emit, 2, OWN, torch.float16)

    expected = Steps(strategy)
    merged, sizes, kept, bias = given(write)
    torch.testing.assert_close(merged, expected.steps[1]["merged"])
    assert all(same(a, b) for a, b in zip(sizes, (torch.ones(B, N), *expected.size), strict=True))
    assert all(same(a, b) for a, b in zip(kept, expected.origin, strict=True))
    assert same(bias, expected.size[1].log().half())
    assert (expected.size[1] > 2).any(), "no token was merged twice"


@pytest.mark.parametrize("strategy", ["prune", "mean"])
@pytest.mark.parametrize("since", [True, False])
def test_restoring_adds_what_a_token_was_as_far_as_the_stream_was_only_added_to(strategy: str, since: bool) -> None:
    newest = random(B, N - sum(GONE), C, seed=4)

    def write(emit: Emitter, *nodes: Node) -> Any:
        stream, _ = reduced(emit, nodes[:4], strategy, additive=(True, since))
        ways = [stream.restore(emit, nodes[4], layout(), 2, additive) for additive in (True, False)]
        return [*ways, stream.restore(emit, nodes[5], layout(tokens=0), 2, True)]

    added, copied, turned = given(write, newest, newest.transpose(0, 1))
    expected = Steps(strategy)
    torch.testing.assert_close(added, expected.restored(newest, (since, True)))
    torch.testing.assert_close(copied, expected.restored(newest, (False, False)))
    torch.testing.assert_close(turned.transpose(0, 1), added)


@pytest.mark.parametrize("strategy", ["prune", "mean", "mlerp"])
def test_older_features_are_merged_as_the_stream_was_and_flags_follow_the_survivor(strategy: str) -> None:
    features, flags = random(B, N, C, seed=5), random(B, N, C, seed=6) > 0

    def write(emit: Emitter, *nodes: Node) -> Any:
        stream, _ = reduced(emit, nodes[:4], strategy)
        found = []
        for node, dim in ((nodes[4], 1), (nodes[5], 1), (nodes[6], 0)):
            for version in (1, 2):
                node = stream.rebase(emit, node, layout(tokens=dim), version)
            found.append(node)
        return found

    merged, pruned, turned = given(write, features, flags, features.transpose(0, 1))
    torch.testing.assert_close(merged, Steps(strategy).rebased(features, strategy))
    assert same(
        pruned, torch.stack([flag[origin] for flag, origin in zip(flags, Steps(strategy).origin[1], strict=True)])
    )
    torch.testing.assert_close(turned.transpose(0, 1), merged)


#: null tokens that only the keys have, ahead and after; protected tokens that only the stream has
AROUND = [(LEAD + 2, TAIL), (LEAD, TAIL + 1), (LEAD + 1, TAIL + 2), (0, TAIL), (LEAD, 0), (0, TAIL + 3), (LEAD + 2, 1)]


@pytest.mark.parametrize(("prefix", "suffix"), AROUND)
def test_other_protected_tokens_around_the_stream_keep_their_place_and_size(prefix: int, suffix: int) -> None:
    run = run_with(prefix, suffix)
    wide = random(B, 9 + FREE + 9, C, seed=7)  # enough protected tokens for every run
    part = slice(9 - prefix, 9 + FREE + suffix)
    newest = random(B, 9 + FREE - sum(GONE) + 9, C, seed=8)
    newest_part = slice(9 - prefix, 9 + FREE - sum(GONE) + suffix)

    def write(emit: Emitter, *nodes: Node) -> Any:
        stream, _ = reduced(emit, nodes[:4], "mean")
        rebased = nodes[4]
        for version in (1, 2):
            rebased = stream.rebase(emit, rebased, layout(run), version)
        restored = stream.restore(emit, nodes[5], layout(run), 2, additive=False)
        assert stream.count(emit, 2, run) == run.size - sum(GONE)
        return stream.kept(emit, 2, run), stream.sizes_of(emit, 2, run), rebased, restored

    kept, sizes, rebased, restored = given(write, wide[:, part], newest[:, newest_part])
    expected = Steps("mean")
    # The free tokens by the oracle; every protected one stands for itself, at its end of the run.
    free = expected.origin[1][:, LEAD : N - sum(GONE) - TAIL] - LEAD
    ends = torch.arange(prefix).expand(B, -1), torch.arange(prefix + FREE, run.size).expand(B, -1)
    assert same(kept, torch.cat([ends[0], free + prefix, ends[1]], 1))
    weight = expected.size[1][:, LEAD : N - sum(GONE) - TAIL]
    assert same(sizes, torch.cat([torch.ones(B, prefix), weight, torch.ones(B, suffix)], 1))
    own = expected.rebased(wide[:, 9 - LEAD : 9 + FREE + TAIL], "mean")[:, LEAD : N - sum(GONE) - TAIL]
    torch.testing.assert_close(
        rebased, torch.cat([wide[:, 9 - prefix : 9], own, wide[:, 9 + FREE : 9 + FREE + suffix]], 1)
    )
    back = expected.restored(newest[:, 9 - LEAD : 9 + FREE - sum(GONE) + TAIL], (False, False))[:, LEAD : N - TAIL]
    behind = newest[:, 9 + FREE - sum(GONE) :][:, :suffix]
    torch.testing.assert_close(restored, torch.cat([newest[:, 9 - prefix : 9], back, behind], 1))


def test_keys_are_cut_to_the_tokens_of_the_stream_and_must_have_all_of_them() -> None:
    keys = random(B, N + 3, C)

    def write(emit: Emitter, node: Node) -> Node:
        stream = Stream(OWN, (BATCH,))
        with pytest.raises(Barrier, match="lack protected tokens"):
            stream.trim(emit, node, run_with(0, TAIL))
        return stream.trim(emit, node, run_with(LEAD + 2, TAIL + 1))

    assert same(emitted(write, keys), keys[:, 2:-1])


def test_shuffling_loses_nothing_and_moves_no_protected_token() -> None:
    def write(emit: Emitter, x: Node) -> Any:
        stream = Stream(OWN, (BATCH,))

        def shuffle(size: Node, gone: Any) -> Node:
            new: Node = emit.call(torch.ops.tofu.permute_tokens.default, x, size, 5, OWN.prefix, OWN.suffix)
            return new

        merged = stream.reduce(emit, x, shuffle, "prune", N, True).merged
        return merged, stream.restore(emit, merged, layout(), 1, False), stream.kept(emit, 1, OWN)

    moved, back, kept = emitted(write, X)
    assert same(back, X)
    assert same(moved, torch.stack([x[order] for x, order in zip(X, kept, strict=True)]))
    assert not torch.equal(moved, X)
    assert same(moved[:, :LEAD], X[:, :LEAD])
    assert same(moved[:, -TAIL:], X[:, -TAIL:])


def test_index_and_sizes_are_written_once_for_all_who_ask() -> None:
    def write(emit: Emitter, *nodes: Node) -> Any:
        stream, _ = reduced(emit, nodes, "prune")
        assert stream.kept(emit, 2, OWN) is stream.kept(emit, 2, OWN)
        assert stream.log_size(emit, 2, OWN, torch.float32) is stream.log_size(emit, 2, OWN, torch.float32)
        return stream.kept(emit, 2, OWN)

    ops = [node.target for node in written(write, X, *METRICS, GAIN).graph.nodes]
    assert ops.count(torch.ops.aten.gather.default) == 1
