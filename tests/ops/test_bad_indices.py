"""Indices and shapes that no reduction gives, for every operator that takes some: an error, never a stray read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests.ops.streams import stream
from tofu_fx.ops import fuse_tokens

ops = torch.ops.tofu
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _with(index: Tensor, value: int) -> Tensor:
    index = index.clone()
    index[0, 3] = value
    return index


#: name -> the change of assignment [2, 17] and kept [2, 11], and what is raised
CASES: dict[str, tuple[Change, type[Exception], str]] = {
    "big": (lambda a, k: (_with(a, 10**7), k), IndexError, r"assignment\[0, 3\] must be from 0 to 10, got 10000000"),
    "one too many": (lambda a, k: (_with(a, 11), k), IndexError, r"assignment\[0, 3\] .* 0 to 10, got 11"),
    "negative": (lambda a, k: (_with(a, -(10**6)), k), IndexError, r"assignment\[0, 3\] .* got -1000000"),
    "minus one": (lambda a, k: (_with(a, -1), k), IndexError, r"assignment\[0, 3\] .* got -1"),
    "kept big": (lambda a, k: (a, _with(k, 10**7)), IndexError, r"kept\[0, 3\] must be from 0 to 16, got 10000000"),
    "kept negative": (lambda a, k: (a, _with(k, -1)), IndexError, r"kept\[0, 3\] must be from 0 to 16, got -1"),
    "kept twice": (lambda a, k: (a, _with(k, int(k[0, 2]))), ValueError, r"one reduction, but kept\[0, 3\] is token"),
    "int32": (lambda a, k: (a.int(), k.int()), ValueError, r"assignment must be int64 \[2, 17\], got int32"),
    "kept int32": (lambda a, k: (a, k.int()), ValueError, r"kept must be int64 \[2, K\], got int32 \[2, 11\]"),
    "short": (lambda a, k: (a[:, :4], k), ValueError, r"assignment must be int64 \[2, 17\], got int64 \[2, 4\]"),
    "one sample": (lambda a, k: (a[:1], k[:1]), ValueError, r"assignment must be int64 \[2, 17\], got int64 \[1, 17\]"),
    "flat": (lambda a, k: (a, k[0]), ValueError, r"kept must be int64 \[2, K\], got int64 \[11\]"),
    "too many": (lambda a, k: (a, k.repeat(1, 2)), ValueError, r"kept must name at most the 17 tokens of x"),
    "other device": (
        lambda a, k: (a.to("meta"), k),
        ValueError,
        "assignment must be on the device of x, cpu",
    ),
}
named = pytest.mark.parametrize(("change", "error", "message"), CASES.values(), ids=CASES)


def _reduced(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, metric, size = stream(dtype=dtype)
    new_x, _, assignment, kept = fuse_tokens(x, metric, size, 6, "mlerp", 0, 0)
    return x, size, new_x, assignment, kept


@pytest.mark.usefixtures("on_both")
@pytest.mark.parametrize("strategy", ["mean", "mlerp"])
@named
def test_rebase(change: Change, error: type[Exception], message: str, strategy: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, size, _, assignment, kept = _reduced(dtype)
        with pytest.raises(error, match=message):
            ops.rebase(x, size, *change(assignment, kept), strategy)


@pytest.mark.usefixtures("on_both")
@named
def test_merge_groups_by_pruning(change: Change, error: type[Exception], message: str) -> None:
    x, size, _, assignment, kept = _reduced()
    with pytest.raises(error, match="merge_groups: .*" + message):
        ops.merge_groups(x, size, *change(assignment, kept), "prune")


@named
def test_gradient_of_mlerp(change: Change, error: type[Exception], message: str) -> None:
    x, size, new_x, assignment, kept = _reduced()
    with pytest.raises(error, match="mlerp_backward: .*" + message):
        ops.mlerp_backward(new_x, x, size, *change(assignment, kept))


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("kept twice", "too many")])
def test_restore_and_rebase_by_pruning_read_one_index(case: str) -> None:
    change, error, message = CASES[case]
    x, size, new_x, assignment, kept = _reduced()
    changed, changed_kept = change(assignment, kept)
    if changed_kept is kept:
        # Restoring takes any number of tokens, so fewer than there were are no fault that it could know of.
        if case != "short":
            with pytest.raises(error, match="restore_tokens: " + message.replace(r"\[2, 17\]", r"\[2, K\]")):
                ops.restore_tokens(new_x, changed)
    else:
        with pytest.raises(error, match="rebase: " + message):
            ops.rebase(x, size, changed, changed_kept, "prune")


@pytest.mark.parametrize("index", [-1, 11, 10**7])
def test_no_index_out_of_range_counts_from_the_end_in_a_compiled_graph(index: int) -> None:
    _, _, new_x, assignment, _ = _reduced()
    compiled = torch.compile(lambda x, a: ops.restore_tokens(x, a) + 1, backend="aot_eager", fullgraph=True)
    compiled(new_x, assignment)
    with pytest.raises(IndexError, match="out of bounds"):
        compiled(new_x, _with(assignment, index))


@pytest.mark.parametrize("case", ["int32", "kept int32", "short", "one sample", "flat", "too many"])
def test_shapes_and_dtypes_are_refused_while_a_graph_is_traced(case: str) -> None:
    change, _, message = CASES[case]
    x, size, new_x, assignment, kept = _reduced()
    changed = change(assignment, kept)
    with FakeTensorMode() as mode:
        x, size, new_x, *index = (mode.from_tensor(t) for t in (x, size, new_x, *changed))
        for call in (
            lambda: ops.merge_groups(x, size, *index, "mean"),
            lambda: ops.rebase(x, size, *index, "prune"),
            lambda: ops.mlerp_backward(new_x, x, size, *index),
        ):
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s, y, a, k: ops.restore_tokens(y[0], a), r"x must be \[B, N, C\], got float32 \[11, 5\]"),
        (lambda x, s, y, a, k: ops.restore_tokens(y, a, x[:, 1:], y), r"before .* be \[2, 17, 5\], got \[2, 16, 5\]"),
        (lambda x, s, y, a, k: ops.restore_tokens(y, a, x, y[..., 1:]), r"merged .* be \[2, 11, 5\], got \[2, 11, 4\]"),
        (lambda x, s, y, a, k: ops.rebase(x, s.double(), a, k, "prune"), r"size must be float32"),
        (lambda x, s, y, a, k: ops.rebase(x.long(), s, a, k, "mean"), "x must be floating point"),
        (lambda x, s, y, a, k: ops.mlerp_backward(y[:, 1:], x, s, a, k), r"grad must be \[2, 11, 5\], got"),
        (lambda x, s, y, a, k: ops.mlerp_backward(y.long(), x, s, a, k), r"grad must be floating point"),
        (lambda x, s, y, a, k: ops.separate(x.long(), s[..., None] > 0), r"metric must be floating point"),
        (lambda x, s, y, a, k: ops.separate(x, s[..., None]), r"valid must be bool \[2, 17, 1\] or .* got float32"),
        (lambda x, s, y, a, k: ops.separate(x, s[:, 1:, None] > 0), r"valid must be bool .* got bool \[2, 16, 1\]"),
        (lambda x, s, y, a, k: ops.permute_tokens(x, s[:, 1:], 0, 0, 0), r"size must be float32 \[2, 17\]"),
        (lambda x, s, y, a, k: ops.fuse_tokens(x, x.to("meta"), s, 1, "mean", 0, 0), "metric must be on the device"),
        (lambda x, s, y, a, k: ops.fuse_tokens(x, x, s.to("meta"), 1, "mean", 0, 0), "size must be on the device"),
    ],
)  # fmt: skip
def test_other_arguments(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*_reduced())


def test_bounds_hold_for_views_and_for_what_torch_func_wraps() -> None:
    _, _, new_x, assignment, _ = _reduced()
    strided = torch.stack([assignment, assignment.clamp(min=10**6)], dim=-1)
    assert torch.equal(ops.restore_tokens(new_x, strided[..., 0]), ops.restore_tokens(new_x, assignment))
    with pytest.raises(IndexError, match="got 1000000"):
        ops.restore_tokens(new_x, strided[..., 1])
    each = torch.vmap(ops.restore_tokens)(new_x.unsqueeze(1), assignment.unsqueeze(1))
    assert torch.equal(each.squeeze(1), ops.restore_tokens(new_x, assignment))
