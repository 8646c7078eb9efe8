"""What the operators refuse, in words that name the argument, what was expected and what was given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .matching import Grid, max_reduction
from .merging import STRATEGIES


def check_strategy(strategy: str) -> None:
    """Raise ValueError unless `strategy` is one of STRATEGIES."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: expected one of {', '.join(map(repr, STRATEGIES))}")


def check_stream(op: str, x: Tensor, size: Tensor) -> None:
    """Raise ValueError unless x is floating point `[B, N, C]` and size float32 `[B, N]`."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be floating point [B, N, C], got {_describe(x)}")
    if size.shape != x.shape[:2] or size.dtype != torch.float32:
        raise ValueError(f"{op}: size must be float32 {list(x.shape[:2])}, got {_describe(size)}")


def check_metric(op: str, x: Tensor, metric: Tensor) -> None:
    """Raise ValueError unless metric is floating point `[B, N, M]` for x `[B, N, C]`."""
    if metric.dim() != 3 or metric.shape[:2] != x.shape[:2] or not metric.is_floating_point():
        batch, tokens = x.shape[:2]
        raise ValueError(f"{op}: metric must be floating point [{batch}, {tokens}, M], got {_describe(metric)}")


def check_protected(op: str, tokens: int, num_prefix: int, num_suffix: int) -> None:
    """Raise ValueError unless the protected tokens fit into the stream."""
    if num_prefix < 0 or num_suffix < 0 or num_prefix + num_suffix > tokens:
        raise ValueError(
            f"{op}: num_prefix={num_prefix} and num_suffix={num_suffix} must be >= 0 and fit into {tokens} tokens"
        )


def check_reduction(op: str, r: int, tokens: int, num_prefix: int, num_suffix: int, grid: Sequence[int] = ()) -> None:
    """Raise ValueError unless the grid holds the free tokens and r of them can be taken away."""
    check_protected(op, tokens, num_prefix, num_suffix)
    if grid:
        _check_grid(op, tokens - num_prefix - num_suffix, grid)
    cap = max_reduction(tokens, num_prefix, num_suffix, grid)
    rest = "all but one in each cell of the grid" if grid else "half of the free tokens"
    if not 0 <= r <= cap:
        raise ValueError(
            f"{op}: r={r} is out of range: of {tokens} tokens {num_prefix + num_suffix} are protected, so r must be "
            f"between 0 and {cap}, {rest}"
        )


def _check_grid(op: str, free: int, grid: Sequence[int]) -> None:
    expected = "(frames, height, width, cell) or (frames, height, width, cell, seed)"
    if len(grid) not in (4, 5):
        raise ValueError(f"{op}: grid must be {expected}, got {tuple(grid)}")
    whole = Grid(*grid)
    if min(whole[:4]) < 1 or whole.seed < 0 or whole.tokens != free:
        raise ValueError(
            f"{op}: grid must be {expected}, each at least 1 (seed: 0), with frames * height * width = {free} free "
            f"tokens, got {tuple(grid)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
