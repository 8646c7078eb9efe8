"""`tofu::fuse_tokens`: match, then prune or merge, in one opaque node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .checks import check_grouping, check_metric, check_reduction, check_strategy, check_stream
from .gradient import gradient, save_for_gradient
from .matching import match
from .merging import reduce_rows
from .ward import match_by_ward


def _fuse(  # noqa: PLR0913 - the arguments of the operator
    x: Tensor,
    metric: Tensor,
    size: Tensor,
    r: int,
    strategy: str,
    num_prefix: int,
    num_suffix: int,
    grid: Sequence[int] | None = None,
    grouping: str = "bipartite",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_stream("fuse_tokens", x, size)
    check_metric("fuse_tokens", x, metric)
    check_strategy(strategy)
    check_grouping(grouping)
    batch, tokens, features = x.shape
    cells = tuple(grid or ())
    check_reduction("fuse_tokens", r, tokens, num_prefix, num_suffix, cells, grouping)
    left = tokens - r
    if r == 0 or batch == 0:
        place = torch.arange(tokens, device=x.device).repeat(batch, 1)
        whole, sizes = (t[:, :left].clone(memory_format=torch.contiguous_format) for t in (x, size))
        return whole, sizes, place, place[:, :left].clone(memory_format=torch.contiguous_format)
    if cpu.usable(x):
        return cpu.fuse(x, metric, size, r, strategy, num_prefix, num_suffix, cells, grouping)
    if grouping == "ward":
        reduction = match_by_ward(metric, size, r, num_prefix, num_suffix, cells)
    else:
        reduction = match(metric, r, num_prefix, num_suffix, cells)
    new_x, new_size = reduce_rows(x.flatten(0, 1), size.flatten(), reduction, strategy)
    return (
        new_x.view(batch, left, features),
        new_size.view(batch, left),
        (reduction.place % left).view(batch, tokens),
        (reduction.kept % tokens).view(batch, left),
    )


@torch.library.custom_op("tofu::fuse_tokens", mutates_args=())
def fuse_tokens(  # noqa: PLR0913 - the arguments of the operator
    x: Tensor,
    metric: Tensor,
    size: Tensor,
    r: int,
    strategy: str,
    num_prefix: int,
    num_suffix: int,
    grid: Sequence[int] | None = None,
    grouping: str = "bipartite",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take r tokens out of a stream; each joins the token it is most like.

    Source: arXiv 2312.01026 sec. 3 (prune, MLERP), arXiv 2210.09461 sec. 3 (matching, sizes); the survivors keep the
    order of the stream, which is this project's. Deterministic, and a sample's result does not depend on its batch.
    Differentiable in x; the choice of the tokens is a constant.

    Args:
        x: features `[B, N, C]`; merged in float32 (float64 for float64) and rounded once.
        metric: `[B, N, M]` floating point, what tokens are compared by in float32. By "bipartite" grouping it is their
            cosine similarity; a row that is zero or not finite is equally unlike every other. By "ward" it is their
            Euclidean distance; a row that is not finite is far from every other.
        size: `[B, N]` float32, > 0: how many original tokens each stands for.
        r: tokens to take away, 0 <= r <= max_reduction(N, num_prefix, num_suffix, grid, grouping).
        strategy: what a destination becomes. "prune": stays as it is. "mean": the size-weighted mean m of its group.
            "mlerp": m/|m| * max_k |x_k|, for finite members as far as that is in x's range. Where K members cancel,
            |sum of size_k x_k| <= 64 K u * sum of size_k |x_k| with u = 2^-24 (float64: 2^-53), there is no direction
            but that of rounding: the member of the largest norm stays (the first of those within 1/1024 of it). Two
            implementations may take either way where the two sides are within 1/32 of each other. Whatever the
            strategy, the destination takes over the sizes.
        num_prefix: tokens at the start that are neither merged nor moved.
        num_suffix: tokens at the end that are neither merged nor moved.
        grid: `(frames, height, width, cell, seed)` of the free tokens: others join the one partner in each cell of
            `cell` x `cell` places, its first or (seed > 0) the one that the seed picks. None: the odd places are the
            partners.
        grouping: "bipartite": each token that is no partner joins the partner that it is most like, those first that
            are most alike (`matching`). "ward": those groups are joined whose members stay nearest to their mean, in
            rounds (`ward`); of a grid, each to the partner whose union with it has the least of Ward's cost.

    Returns:
        x' `[B, N-r, C]` in x's dtype; size' `[B, N-r]` float32; assignment `[B, N]` int64, the place of each token in
        x'; kept `[B, N-r]` int64, ascending, the token of x that each place of x' descends from. Tokens that took no
        part have x's bits.

    Raises:
        ValueError: r out of range (it names the cap), an unknown strategy, or shapes and dtypes other than the above.
    """
    return _fuse(x, metric, size, r, strategy, num_prefix, num_suffix, grid, grouping)


@fuse_tokens.register_fake
def _(  # noqa: PLR0913 - the arguments of the operator
    x: Tensor,
    metric: Tensor,
    size: Tensor,
    r: int,
    strategy: str,
    num_prefix: int,
    num_suffix: int,
    grid: Sequence[int] | None = None,
    grouping: str = "bipartite",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_stream("fuse_tokens", x, size)
    check_metric("fuse_tokens", x, metric)
    check_strategy(strategy)
    check_grouping(grouping)
    batch, tokens, features = x.shape
    # Asking about a symbolic size would pin it down; those calls are checked when they run.
    if all(isinstance(value, int) for value in (r, tokens, num_prefix, num_suffix)):
        check_reduction("fuse_tokens", r, tokens, num_prefix, num_suffix, grid or (), grouping)
    left = tokens - r
    return (
        x.new_empty((batch, left, features)),
        size.new_empty((batch, left)),
        x.new_empty((batch, tokens), dtype=torch.int64),
        x.new_empty((batch, left), dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, _, size, _, strategy, *_ = inputs
    save_for_gradient(ctx, x, size, *output[1:], strategy)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return gradient(ctx, grad), *(None,) * 8


fuse_tokens.register_autograd(_backward, setup_context=_setup_context)
