"""Rules of ops on images: norms over groups of channels, and resampling. Tokens cannot pass; samples stay apart."""

from __future__ import annotations

from torch.fx import Node

from tofu_fx.axes.atoms import Barrier, atoms_of, has_tokens
from tofu_fx.axes.known import Known
from tofu_fx.axes.rules.result import Carried, Rule


def group_norm(known: Known, node: Node) -> Carried:
    """Statistics over places and some of the channels of each sample."""
    axes = known.of(node.args[0])
    if has_tokens(*axes[1:]):
        raise Barrier("the norm's statistics run over tokens")
    return Carried(axes, mixed=atoms_of(*axes[1:]))


def resampled(known: Known, node: Node) -> Carried:
    """Upsampling and pooling of ``[B, C, ...]``: batch and channels pass, the places are new ones."""
    return _places_anew(known, node, 2)


def shuffled(known: Known, node: Node) -> Carried:
    """pixel_shuffle and pixel_unshuffle: the last three dims become others."""
    return _places_anew(known, node, len(known.of(node.args[0])) - 3)


def _places_anew(known: Known, node: Node, kept: int) -> Carried:
    axes, shape = known.of(node.args[0]), node.meta["val"].shape
    if has_tokens(*axes[kept:]):
        raise Barrier("an image of tokens is resampled")
    if len(axes) < kept + 2:
        raise Barrier("an image without a batch is resampled")
    fresh = [known.space.fresh(f"{node.name}.{i}", size) for i, size in enumerate(shape[kept:], start=kept)]
    return Carried((*axes[:kept], *fresh), mixed=atoms_of(*axes[kept:]))


IMAGE_RULES: dict[str, Rule] = {
    "group_norm": group_norm,
    **dict.fromkeys(
        ["upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "avg_pool2d", "adaptive_avg_pool2d"],
        resampled,
    ),
    **dict.fromkeys(["pixel_shuffle", "pixel_unshuffle"], shuffled),
}
