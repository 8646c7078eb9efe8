"""`tofu::permute_tokens`: the proof operator. It shuffles the free tokens and reduces nothing.

A rewritten graph that computes the same on a shuffled stream treats its tokens as a set, which every reduction needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_protected, check_stream
from .hashing import mix
from .matching import flat_places
from .restore import gather_tokens


@torch.library.custom_op("tofu::permute_tokens", mutates_args=())
def permute_tokens(
    x: Tensor, size: Tensor, seed: int, num_prefix: int, num_suffix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shuffle the free tokens of every sample, each in its own pseudo-random way.

    Args:
        x: features `[B, N, C]`, floating point.
        size: `[B, N]` float32.
        seed: names the shuffle: the same seed, place in the batch and number of free tokens give the same one on
            every device.
        num_prefix: tokens at the start that stay.
        num_suffix: tokens at the end that stay.

    Returns:
        x' `[B, N, C]`, size' `[B, N]`, assignment `[B, N]` and kept `[B, N]` as `fuse_tokens` returns them, except
        that kept is not ascending.

    Raises:
        ValueError: protected tokens that do not fit, or shapes and dtypes other than the above.
    """
    check_stream("permute_tokens", x, size)
    batch, tokens, _ = x.shape
    check_protected("permute_tokens", tokens, num_prefix, num_suffix)
    place = torch.arange(tokens, device=x.device).repeat(batch, 1)
    kept = place.clone()
    free = tokens - num_prefix - num_suffix
    kept[:, num_prefix : num_prefix + free] = _shuffle(batch, free, seed, x.device) + num_prefix
    assignment = torch.empty_like(kept).scatter_(1, kept, place)
    rows = flat_places(kept, tokens)
    new_x, new_size = x.flatten(0, 1).index_select(0, rows), size.flatten().index_select(0, rows)
    return new_x.view(x.shape), new_size.view(size.shape), assignment, kept


@permute_tokens.register_fake
def _(x: Tensor, size: Tensor, seed: int, num_prefix: int, num_suffix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ARG001 - as the operator is called
    check_stream("permute_tokens", x, size)
    if isinstance(x.shape[1], int):
        check_protected("permute_tokens", x.shape[1], num_prefix, num_suffix)
    place = x.new_empty(x.shape[:2], dtype=torch.int64)
    return x.new_empty(x.shape), size.new_empty(size.shape), place, place.new_empty(place.shape)


def _shuffle(batch: int, free: int, seed: int, device: torch.device) -> Tensor:
    """Return one permutation of `free` places per sample, `[B, free]`.

    Places are ordered by a hash of (seed, sample, place), in integer arithmetic that wraps alike on every device; a
    generator would have a state, and with it a sample would depend on its batch.
    """
    sample = torch.arange(1, batch + 1, device=device).unsqueeze(1)
    place = torch.arange(1, free + 1, device=device)
    key = place * 0x9E3779B1 + mix(sample * 0x85EBCA6B + (seed & 0xFFFFFFFF))
    return torch.sort(mix(key), dim=1, stable=True).indices


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:  # noqa: ARG001 - as autograd calls it
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (assignment,) = ctx.saved_tensors
    return None if grad is None else gather_tokens(grad, assignment), None, None, None, None


permute_tokens.register_autograd(_backward, setup_context=_setup_context)
