"""The automatic placement: on the stream, or in the branches of each block."""

from __future__ import annotations

from typing import Any

import torch

from tofu_fx.axes.atoms import hint
from tofu_fx.compilation import Compilation
from tofu_fx.sites.site import Site

FEW_SITES = 2  # behind so few, merging all that must go at once loses more than merging in each block does


def prefers_branch(site: Site, compilation: Compilation) -> bool:
    """Whether a site, placed on its stream, should reduce the branches of its block instead.

    Measured (docs/dense.md): a stream that many layers reduce a little each, and that is restored once, loses less than
    branches do at the same operations, on a dense ViT; one that must be whole behind one or two layers (between the
    convolutions of a UNet) loses far more. A model that gives back what it was given, as a denoiser does, needs
    the detail of every token, which only the residual stream has.
    """
    if not site.matched:
        return site.reduce_at is None  # no place on the stream was found for it
    tracer = compilation.traced
    whole = {atom.base.stream for b in compilation.barriers for v in b.values for atom in tracer.tokens(v)}
    if site.stream not in whole:
        return False
    members = [other for other in compilation.sites if other.matched and other.stream == site.stream]
    return len(members) <= FEW_SITES or _gives_back_its_input(site, compilation)


def _gives_back_its_input(site: Site, compilation: Compilation) -> bool:
    """Whether an output has the shape of an input that is not the residual stream itself.

    The channels may be twice as many: a denoiser may predict a variance, too.
    """
    assert site.reduce_at is not None
    width = hint(site.reduce_at.meta["val"].shape[-1])
    graph, state = compilation.gm.graph, compilation.model_state
    given = [node.meta.get("val") for node in graph.find_nodes(op="placeholder") if node not in state]
    places = [_apart(value) for value in given if _is_features(value)]
    for made in map(_apart, filter(_is_features, compilation.traced_outputs)):
        for rest, channels in places:
            is_stream = len(rest) == 2 and channels == width
            if made[0] == rest and made[1] in (channels, 2 * channels) and not is_stream:
                return True
    return False


def _is_features(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and value.is_floating_point()


def _apart(value: torch.Tensor) -> tuple[list[int], int]:
    """Batch and places of ``[B, N, C]`` or ``[B, C, H, W]``, and the channels."""
    shape = [hint(size) for size in value.shape]
    channels = shape.pop(1 if len(shape) > 3 else 2)
    return shape, channels
