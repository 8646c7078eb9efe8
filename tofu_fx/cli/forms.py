"""What a model is called with: pictures of a size and normalisation, or token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tofu_fx.cli.command import CommandError

#: what pictures are normalised by where the model does not say
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: ids in a text where the user does not say
LENGTH = 128


@dataclass(frozen=True)
class ImageForm:
    """Pictures ``[B, channels, *size]``, of which the middle ``crop`` (a share of the shorter side) is seen.

    ``guessed``: the model does not say how they are normalised.
    """

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 1.0
    interpolation: str = "bicubic"
    guessed: bool = False


@dataclass(frozen=True)
class TokenForm:
    """Texts as ids ``[B, length]``, each below ``vocabulary``."""

    vocabulary: int
    length: int


@dataclass(frozen=True)
class Loaded:
    """A model to work on.

    Attributes:
        model: in eval mode, on its device.
        name: as the user wrote it.
        keyword: the argument that its inputs are passed as; None: the first.
        trained: whether its weights are; if not, what is measured of its outputs says little.
        device, dtype: of its inputs; ids keep their own dtype.
        processing: what a preprocessor's configuration says of the pictures, where there is one.
    """

    model: nn.Module
    name: str
    keyword: str | None
    trained: bool
    device: torch.device
    dtype: torch.dtype
    processing: Mapping[str, Any] = field(default_factory=dict)


def find_form(loaded: Loaded, image_size: int | None, length: int | None) -> ImageForm | TokenForm:
    """What the model is called with, from what it says of itself; the sizes given override that.

    Raises:
        CommandError: it says nothing of its size, and none was given.
    """
    config = getattr(loaded.model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary and not hasattr(config, "image_size"):
        longest = getattr(config, "max_position_embeddings", None) or LENGTH
        if length is not None and length > longest:
            raise CommandError(f"--length {length}: {loaded.name} takes texts of {longest} ids at most")
        return TokenForm(int(vocabulary), length or min(LENGTH, longest))
    timm_config = getattr(loaded.model, "pretrained_cfg", None)
    said = dict(timm_config) if timm_config else _of_transformers(config, loaded.processing)
    own = _own_size(loaded.model, said)
    size = (image_size, image_size) if image_size else own
    if size is None:
        raise CommandError(
            f"{loaded.name} does not say what size its pictures have: give --image-size (other inputs than square "
            "pictures and token ids: call tofu_fx.calibrate from Python)"
        )
    channels = int(said["input_size"][0]) if said.get("input_size") else 3
    mean, std = (tuple(said.get(key) or default) for key, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    if channels != len(mean):
        mean, std = (tuple([sum(values) / len(values)] * channels) for values in (mean, std))
    return ImageForm(
        size=size,
        channels=channels,
        mean=mean,
        std=std,
        crop=float(said.get("crop_pct") or 1.0),
        interpolation=str(said.get("interpolation") or "bicubic"),
        guessed=not said.get("mean"),
    )


def _own_size(model: nn.Module, said: Mapping[str, Any]) -> tuple[int, int] | None:
    # The layer that cuts patches knows of a size given when the model was made; the configuration does not.
    for found in (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        (said.get("input_size") or (None, None))[1:],
        getattr(model, "img_size", None),
        getattr(model, "image_size", None),
    ):
        pair = _pair(found)
        if pair is not None:
            return pair
    return None


def _pair(value: Any) -> tuple[int, int] | None:
    values = [value, value] if isinstance(value, int) else list(value) if isinstance(value, (list, tuple)) else []
    return (values[0], values[1]) if len(values) == 2 and all(isinstance(v, int) for v in values) else None


def _of_transformers(config: Any, processing: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a transformers model and its preprocessor in timm's words."""
    size = _pair(getattr(config, "image_size", None))
    return {
        "input_size": (getattr(config, "num_channels", 3), *size) if size else None,
        "mean": processing.get("image_mean"),
        "std": processing.get("image_std"),
    }
