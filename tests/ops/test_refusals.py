"""What the operators refuse, and in which words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.streams import stream
from tofu_fx.ops import fuse_tokens, max_reduction, permute_tokens, rebase, restore_tokens


@pytest.mark.parametrize(("r", "prefix", "suffix", "cap"), [(9, 0, 0, 8), (-1, 0, 0, 8), (8, 1, 1, 7), (1, 16, 0, 0)])
def test_r_out_of_range_names_r_and_the_cap(r: int, prefix: int, suffix: int, cap: int) -> None:
    x, metric, size = stream()
    assert max_reduction(17, prefix, suffix) == cap
    with pytest.raises(ValueError, match=rf"r={r} is out of range: of 17 tokens .* between 0 and {cap}"):
        fuse_tokens(x, metric, size, r, "mean", prefix, suffix)


def test_the_cap_is_reachable() -> None:
    for tokens in range(1, 9):
        x, metric, size = stream(tokens=tokens)
        cap = max_reduction(tokens, 1, 0)
        assert fuse_tokens(x, metric, size, cap, "mlerp", 1, 0)[0].shape[1] == tokens - cap


def test_protected_tokens_must_fit() -> None:
    x, metric, size = stream()
    with pytest.raises(ValueError, match="num_prefix=10 and num_suffix=8 must be >= 0 and fit into 17 tokens"):
        fuse_tokens(x, metric, size, 0, "mean", 10, 8)
    with pytest.raises(ValueError, match="num_prefix=-1"):
        permute_tokens(x, size, 0, -1, 0)


def test_unknown_strategy_is_named_with_the_choices() -> None:
    x, metric, size = stream()
    expected = "unknown strategy 'average': expected one of 'prune', 'mean', 'mlerp'"
    with pytest.raises(ValueError, match=expected):
        fuse_tokens(x, metric, size, 1, "average", 0, 0)
    place = torch.arange(17).repeat(2, 1)
    with pytest.raises(ValueError, match=expected):
        rebase(x, size, place, place, "average")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, m, s: (x[0], m, s), r"x must be floating point \[B, N, C\], got float32 \[17, 5\]"),
        (lambda x, m, s: (x.long(), m, s), r"x must be floating point \[B, N, C\], got int64 \[2, 17, 5\]"),
        (lambda x, m, s: (x, m[:, 1:], s), r"metric must be floating point \[2, 17, M\], got float32 \[2, 16, 4\]"),
        (lambda x, m, s: (x, m, s.double()), r"size must be float32 \[2, 17\], got float64 \[2, 17\]"),
        (lambda x, m, s: (x, m, s[:1]), r"size must be float32 \[2, 17\], got float32 \[1, 17\]"),
    ],
)
def test_wrong_tensors_are_described(change: Callable[..., tuple[Tensor, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse_tokens(*change(*stream()), 1, "mean", 0, 0)


def test_restore_needs_both_or_neither() -> None:
    x, metric, size = stream()
    new_x, _, assignment, _ = fuse_tokens(x, metric, size, 4, "mean", 0, 0)
    with pytest.raises(ValueError, match="before and merged belong together, but merged is missing"):
        restore_tokens(new_x, assignment, before=x)
    with pytest.raises(ValueError, match="before and merged belong together, but before is missing"):
        restore_tokens(new_x, assignment, merged=new_x)
