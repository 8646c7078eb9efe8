"""What the operators refuse, in words that name the argument, what was expected and what was given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .matching import GROUPINGS, Grid, max_reduction
from .merging import STRATEGIES


def check_strategy(strategy: str) -> None:
    """Raise ValueError unless `strategy` is one of STRATEGIES."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: expected one of {', '.join(map(repr, STRATEGIES))}")


def check_rows(op: str, x: Tensor) -> None:
    """Raise ValueError unless x is `[B, N, C]`, of any dtype."""
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be [B, N, C], got {_describe(x)}")


def check_features(op: str, x: Tensor, name: str = "x") -> None:
    """Raise ValueError unless x is floating point `[B, N, C]`."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating point [B, N, C], got {_describe(x)}")


def check_stream(op: str, x: Tensor, size: Tensor) -> None:
    """Raise ValueError unless x is floating point `[B, N, C]` and size float32 `[B, N]`."""
    check_features(op, x)
    check_size(op, x, size)


def check_size(op: str, x: Tensor, size: Tensor) -> None:
    """Raise ValueError unless size is float32 `[B, N]` for x `[B, N, C]`."""
    if size.shape != x.shape[:2] or size.dtype != torch.float32:
        raise ValueError(f"{op}: size must be float32 {list(x.shape[:2])}, got {_describe(size)}")
    check_device(op, x, "size", size)


def check_metric(op: str, x: Tensor, metric: Tensor) -> None:
    """Raise ValueError unless metric is floating point `[B, N, M]` for x `[B, N, C]`."""
    if metric.dim() != 3 or metric.shape[:2] != x.shape[:2] or not metric.is_floating_point():
        batch, tokens = x.shape[:2]
        raise ValueError(f"{op}: metric must be floating point [{batch}, {tokens}, M], got {_describe(metric)}")
    check_device(op, x, "metric", metric)


def check_device(op: str, x: Tensor, name: str, other: Tensor) -> None:
    """Raise ValueError unless both are on one device."""
    if other.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {other.device}")


def check_places(op: str, x: Tensor, assignment: Tensor, kept: Tensor) -> None:
    """Raise ValueError unless assignment is int64 `[B, N]` and kept int64 `[B, M]`, M <= N, for x `[B, N, C]`."""
    check_index(op, x, "assignment", assignment, x.shape[1])
    check_index(op, x, "kept", kept)
    left, tokens = kept.shape[1], x.shape[1]
    # Asking about a symbolic size would pin it down; those calls are checked when they run.
    if isinstance(left, int) and isinstance(tokens, int) and left > tokens:
        raise ValueError(f"{op}: kept must name at most the {tokens} tokens of x, got {_describe(kept)}")


def check_index(op: str, x: Tensor, name: str, index: Tensor, count: int | None = None) -> None:
    """Raise ValueError unless index is int64 `[B, count]` (any number by default) for x `[B, ...]`."""
    fits = index.dim() == 2 and index.shape[0] == x.shape[0] and (count is None or index.shape[1] == count)
    if not fits or index.dtype != torch.int64:
        expected = f"[{x.shape[0]}, {'K' if count is None else count}]"
        raise ValueError(f"{op}: {name} must be int64 {expected}, got {_describe(index)}")
    check_device(op, x, name, index)


def check_range(op: str, name: str, index: Tensor, count: int) -> None:
    """Raise IndexError unless all of an int64 index `[B, K]` is in 0 to count - 1.

    Only on CPU, and not while a graph is traced: elsewhere values cannot be read without waiting for the device.
    """
    if not readable(index) or not index.numel():
        return
    # NumPy, since a mode that traces or counts would take an operator of PyTorch for one of the graph.
    values = index.detach().numpy()
    if values.min() < 0 or values.max() >= count:
        sample, token = (int(i[0]) for i in ((values < 0) | (values >= count)).nonzero())
        raise IndexError(f"{op}: {name}[{sample}, {token}] must be from 0 to {count - 1}, got {values[sample, token]}")


def check_one_reduction(op: str, assignment: Tensor, kept: Tensor) -> None:
    """Raise unless assignment `[B, N]` and kept `[B, M]` can be those of one reduction.

    Every place is that of the token which it keeps. So no token is kept twice, and M are kept.

    Raises:
        IndexError: an index out of range.
        ValueError: the two do not belong together.
        RuntimeError: either, on a device other than CPU; it is reported when the device comes to it.
    """
    left, tokens = kept.shape[1], assignment.shape[1]
    if not readable(kept):
        in_range = (kept >= 0).all() & (kept < tokens).all() & (assignment >= 0).all() & (assignment < left).all()
        own = assignment.gather(1, kept.clamp(0, max(tokens - 1, 0))) == torch.arange(left, device=kept.device)
        torch._assert_async(in_range & own.all(), f"{op}: assignment and kept are not those of one reduction")
        return
    check_range(op, "assignment", assignment, left)
    check_range(op, "kept", kept, tokens)
    wrong = assignment.gather(1, kept) != torch.arange(left)
    if wrong.any():
        sample, place = wrong.nonzero()[0].tolist()
        token = int(kept[sample, place])
        raise ValueError(
            f"{op}: assignment and kept must be those of one reduction, but kept[{sample}, {place}] is token {token}, "
            f"which assignment sends to place {int(assignment[sample, token])}"
        )


def readable(index: Tensor) -> bool:
    """Whether this is a tensor on CPU with values: not a fake one, a subclass or one inside of torch.func."""
    return type(index) is Tensor and index.device.type == "cpu" and not is_functorch_wrapped_tensor(index)


def check_protected(op: str, tokens: int, num_prefix: int, num_suffix: int) -> None:
    """Raise ValueError unless the protected tokens fit into the stream."""
    if num_prefix < 0 or num_suffix < 0 or num_prefix + num_suffix > tokens:
        raise ValueError(
            f"{op}: num_prefix={num_prefix} and num_suffix={num_suffix} must be >= 0 and fit into {tokens} tokens"
        )


def check_grouping(grouping: str) -> None:
    """Raise ValueError unless `grouping` is one of GROUPINGS."""
    if grouping not in GROUPINGS:
        raise ValueError(f"unknown grouping {grouping!r}: expected one of {', '.join(map(repr, GROUPINGS))}")


def check_reduction(
    op: str,
    r: int,
    tokens: int,
    num_prefix: int,
    num_suffix: int,
    grid: Sequence[int] = (),
    grouping: str = "bipartite",
) -> None:
    """Raise ValueError unless the grid holds the free tokens and r of them can be taken away."""
    check_protected(op, tokens, num_prefix, num_suffix)
    if grid:
        _check_grid(op, tokens - num_prefix - num_suffix, grid)
    cap = max_reduction(tokens, num_prefix, num_suffix, grid, grouping)
    half = "all free tokens but one" if grouping == "ward" else "half of the free tokens"
    rest = "all but one in each cell of the grid" if grid else half
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
