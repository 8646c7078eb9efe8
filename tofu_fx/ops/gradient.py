"""Gradients of a reduction, for `tofu::fuse_tokens` and `tofu::rebase`; with the operator `tofu::mlerp_backward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_device, check_features, check_one_reduction, check_places, check_stream
from .matching import flat_places, reduction_of
from .merging import mlerp_gradient
from .restore import gather_tokens


@torch.library.custom_op("tofu::mlerp_backward", mutates_args=())
def mlerp_backward(grad: Tensor, x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor) -> Tensor:
    """Pull the gradient `[B, M, C]` of an MLERP back to its input x `[B, N, C]`.

    Not differentiable a second time. Sources and formula: `merging.mlerp_gradient`.

    Args:
        grad: `[B, M, C]`, floating point.
        x: `[B, N, C]`, floating point.
        size: `[B, N]` float32.
        assignment: `[B, N]` int64 of the reduction.
        kept: `[B, M]` int64 of the reduction.

    Raises:
        ValueError: shapes or dtypes other than the above, or assignment and kept of different reductions.
        IndexError: an index out of range.
    """
    _check("mlerp_backward", grad, x, size, assignment, kept)
    check_one_reduction("mlerp_backward", assignment, kept)
    (batch, tokens), left = assignment.shape, kept.shape[1]
    grad = grad.flatten(0, 1)
    if left == tokens or batch == 0:
        return grad.index_select(0, flat_places(assignment, left)).view(x.shape)
    reduction = reduction_of(assignment, kept)
    return mlerp_gradient(grad, x.flatten(0, 1), size.flatten(), reduction).view(x.shape)


@mlerp_backward.register_fake
def _(grad: Tensor, x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor) -> Tensor:
    _check("mlerp_backward", grad, x, size, assignment, kept)
    return grad.new_empty(x.shape)


def _check(op: str, grad: Tensor, x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor) -> None:
    check_stream(op, x, size)
    check_places(op, x, assignment, kept)
    check_features(op, grad, "grad")
    if grad.shape != (*kept.shape, x.shape[2]):
        raise ValueError(f"{op}: grad must be {[*kept.shape, x.shape[2]]}, got {list(grad.shape)}")
    check_device(op, x, "grad", grad)


def save_for_gradient(
    ctx: Any, x: Tensor, size: Tensor, new_size: Tensor, assignment: Tensor, kept: Tensor, strategy: str
) -> None:
    """Keep what `gradient` needs; the features themselves only for MLERP."""
    ctx.mark_non_differentiable(new_size)
    ctx.set_materialize_grads(False)
    ctx.strategy = strategy
    ctx.save_for_backward(x if strategy == "mlerp" else None, size, new_size, assignment, kept)


def gradient(ctx: Any, grad: Tensor | None) -> Tensor | None:
    """Pull `grad` `[B, M, C]` back through the reduction to `[B, N, C]`, in operators that AOTAutograd can trace."""
    if grad is None:
        return None
    x, size, new_size, assignment, kept = ctx.saved_tensors
    if ctx.strategy == "mlerp":
        return mlerp_backward(grad, x, size, assignment, kept)
    spread = gather_tokens(grad, assignment)
    if ctx.strategy == "prune":
        stays = kept.gather(1, assignment) == torch.arange(assignment.shape[1], device=grad.device)
        return torch.where(stays.unsqueeze(-1), spread, 0.0)
    share = size / new_size.gather(1, assignment)
    return (spread * share.unsqueeze(-1)).to(grad.dtype)
