"""Rules of ops on images: norms over groups of channels, and resampling. Tokens cannot pass; samples stay apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier
from tofu_fx.axes.tracer import AxisTracer


def group_norm(tracer: AxisTracer, node: Node) -> Axes:
    """Statistics over places and some of the channels of each sample."""
    axes = tracer.of(node.args[0])
    if any(atom.is_token for dim in axes[1:] for atom in dim):
        raise Barrier("the norm's statistics run over tokens")
    tracer.mix(*axes[1:])
    return axes


def resampled(tracer: AxisTracer, node: Node) -> Axes:
    """Upsampling and pooling of ``[B, C, ...]``: batch and channels pass, the places are new ones."""
    return _places_anew(tracer, node, 2)


def shuffled(tracer: AxisTracer, node: Node) -> Axes:
    """pixel_shuffle and pixel_unshuffle: the last three dims become others."""
    return _places_anew(tracer, node, len(tracer.of(node.args[0])) - 3)


def _places_anew(tracer: AxisTracer, node: Node, kept: int) -> Axes:
    axes, shape = tracer.of(node.args[0]), node.meta["val"].shape
    if any(atom.is_token for dim in axes[kept:] for atom in dim):
        raise Barrier("an image of tokens is resampled")
    if len(axes) < kept + 2:
        raise Barrier("an image without a batch is resampled")
    tracer.mix(*axes[kept:])
    fresh = [tracer.space.fresh(f"{node.name}.{i}", size) for i, size in enumerate(shape[kept:], start=kept)]
    return (*axes[:kept], *fresh)


IMAGE_RULES: dict[str, Callable[[AxisTracer, Node], Any]] = {
    "group_norm": group_norm,
    **dict.fromkeys(
        ["upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "avg_pool2d", "adaptive_avg_pool2d"],
        resampled,
    ),
    **dict.fromkeys(["pixel_shuffle", "pixel_unshuffle"], shuffled),
}
