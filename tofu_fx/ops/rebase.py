"""`tofu::rebase`: bring a tensor over an older version of the stream to a newer one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu
from .checks import check_one_reduction, check_places, check_rows, check_size, check_strategy, check_stream
from .gradient import gradient, save_for_gradient
from .matching import flat_places, reduction_of
from .merging import reduce_rows
from .restore import gather_given

_library = torch.library.Library("tofu", "FRAGMENT")
_library.define("rebase(Tensor x, Tensor size, Tensor assignment, Tensor kept, str strategy) -> Tensor")


@torch.library.custom_op("tofu::merge_groups", mutates_args=())
def merge_groups(x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    """Reduce x `[B, N, C]` and size `[B, N]` by a given assignment: the code, and so the bits, of `fuse_tokens`.

    Args and errors: `rebase`, for floating point x and any strategy.
    """
    _check("merge_groups", x, size, assignment, kept, strategy)
    (batch, tokens, features), left = x.shape, kept.shape[1]
    if cpu.usable(x) and batch and left < tokens:
        return cpu.merge(x, size, assignment, kept, strategy)
    check_one_reduction("merge_groups", assignment, kept)
    x, size = x.flatten(0, 1), size.flatten()
    if left == tokens or batch == 0:
        rows = flat_places(kept, tokens)
        new_x, new_size = x.index_select(0, rows), size.index_select(0, rows)
    else:
        new_x, new_size = reduce_rows(x, size, reduction_of(assignment, kept), strategy)
    return new_x.view(batch, left, features), new_size.view(batch, left)


@merge_groups.register_fake
def _(x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    _check("merge_groups", x, size, assignment, kept, strategy)
    batch, left = kept.shape
    return x.new_empty((batch, left, x.shape[2])), size.new_empty((batch, left))


def _check(op: str, x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor, strategy: str) -> None:
    check_stream(op, x, size)
    check_places(op, x, assignment, kept)
    check_strategy(strategy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, size, assignment, kept, strategy = inputs
    save_for_gradient(ctx, x, size, output[1], assignment, kept, strategy)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    return gradient(ctx, grad), None, None, None, None


merge_groups.register_autograd(_backward, setup_context=_setup_context)


def rebase(x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor, strategy: str) -> Tensor:
    """Reduce x as `fuse_tokens` (or `permute_tokens`) reduced the stream it belongs to.

    Source: the design's "Token axes": position tables and masks follow the surviving token, features the merge.

    Args:
        x: `[B, N, F]` over the tokens before the reduction; any dtype for "prune", floating point otherwise.
        size: `[B, N]` float32, the sizes before the reduction; not read for "prune".
        assignment: `[B, N]` int64 of the reduction.
        kept: `[B, M]` int64 of the reduction.
        strategy: "prune" takes the survivors' rows; "mean" and "mlerp" merge, with the bits that `fuse_tokens` gives.

    Returns:
        `[B, M, F]` in x's dtype. "prune" decomposes into one gather, the others are opaque.

    Raises:
        ValueError: an unknown strategy, shapes or dtypes other than the above, or assignment and kept of different
            reductions (not looked at for "prune", which reads kept alone).
        IndexError: an index out of range. On other devices than CPU, and in a compiled graph, such an index is the
            RuntimeError of PyTorch's own indexing.
    """
    return torch.ops.tofu.rebase(x, size, assignment, kept, strategy)


def _rebase(x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor, strategy: str) -> Tensor:
    check_strategy(strategy)
    if strategy == "prune":
        check_rows("rebase", x)
        check_size("rebase", x, size)
        check_places("rebase", x, assignment, kept)
        return gather_given("rebase", x, "kept", kept)
    return merge_groups(x, size, assignment, kept, strategy)[0]


_library.impl("rebase", _rebase, "CompositeImplicitAutograd")
