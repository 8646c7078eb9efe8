"""Any family of the transformers library as a small model: a config with few layers and channels, and inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig

WORDS = 99
LENGTH = 24
#: the names of a config's dims, and what they become; where a family knows another name its own default stays
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "width"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "dim_feedforward"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth"), 3),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("vocab_size", "text_vocab_size"), WORDS),
    **dict.fromkeys(("projection_dim", "text_embed_dim", "vision_embed_dim", "out_hidden_size"), 64),
}
#: layers alone: for families whose other dims hang together
FEWER: dict[str, int] = {n: size for n, size in SMALL.items() if "layer" in n or n in ("depth", "vocab_size")}
#: images of families that do not say how large theirs are
SIDE = 64
#: images are no larger than so many patches a side
PATCHES = 8


def configs(family: str) -> Iterator[PreTrainedConfig]:
    """Small configs of a family, the smallest first; not each makes a model."""
    kind = CONFIG_MAPPING[family]
    for sizes in (SMALL, {name: size for name, size in SMALL.items() if name not in ("head_dim", "d_kv")}, FEWER, {}):
        try:
            yield _smaller(kind, sizes)
        except Exception:  # noqa: BLE001 - a family that refuses these dims: its next ones are tried
            continue


def _smaller(kind: type[PreTrainedConfig], sizes: Mapping[str, int]) -> PreTrainedConfig:
    """A config of a kind with these sizes, in its parts too."""
    default = kind()
    changes: dict[str, Any] = {}
    for name, size in sizes.items():
        now = getattr(default, name, None)
        if isinstance(now, int) and not isinstance(now, bool) and name not in kind.attribute_map:
            changes[name] = min(now, size)
    for name, part in kind.sub_configs.items():
        now = getattr(default, name, None)
        if isinstance(now, PreTrainedConfig):
            changes[name] = _smaller(type(now) if part.__name__ == "AutoConfig" else part, sizes).to_dict()
    side = _small_side(default)
    if side:
        changes["image_size"] = side
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id", "video_token_id", "audio_token_id"):
        now = getattr(default, name, None)
        if isinstance(now, int) and now >= changes.get("vocab_size", now + 1):
            changes[name] = len(changes) % 4
    return kind(**changes)


def _small_side(config: PreTrainedConfig) -> int | None:
    """A smaller side for the images of a config that has one number for it, a multiple of its patch."""
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", 1)
    if not isinstance(side, int) or not isinstance(patch, int) or patch < 2:
        return None
    return min(side, patch * PATCHES)


def model_of(config: PreTrainedConfig) -> torch.nn.Module:
    """The base model of a config."""
    kinds = MODEL_MAPPING[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    config.use_cache = False
    model: torch.nn.Module = kind(config)
    return model


def calls(model: torch.nn.Module, config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The keywords of calls that a model may take, the likeliest first."""
    wanted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, WORDS, (2, LENGTH), generator=generator)
    text = {"input_ids": words}
    if "attention_mask" in wanted:
        text["attention_mask"] = torch.ones_like(words)
    if "decoder_input_ids" in wanted:
        text["decoder_input_ids"] = words[:, : LENGTH // 2]
    seen = [{"pixel_values": pixels} for pixels in _pixels(config, generator)]
    if "noise" in wanted and isinstance(getattr(config, "patch_size", None), int):  # which patches are masked out
        side = config.image_size // config.patch_size
        seen = [{**image, "noise": torch.rand(2, side * side, generator=generator)} for image in seen]
    heard = [
        {name: torch.randn(shape, generator=generator)}
        for name, shape in (
            ("input_values", (2, 8000)),
            ("input_values", (2, 1024, 128)),
            ("input_features", (2, 80, 3000)),
            ("input_features", (2, 128, 3000)),
            ("input_features", (2, 64, 80)),
            ("input_features", (2, 64, 160)),
        )
    ]
    series = [{"past_values": torch.randn(2, 512, channels, generator=generator)} for channels in (1, 7)]
    corners = torch.randint(0, 9, (2, LENGTH, 2, 2), generator=generator).cumsum(2)  # left upper, right lower
    boxes = [{**text, "bbox": corners.flatten(2)}]
    both = [{**text, **image} for image in seen]
    main = getattr(model, "main_input_name", "input_ids")
    ways = [*boxes, *both, *seen, text, *heard, *series]
    for way in sorted(ways, key=lambda way: main not in way):
        if set(way) <= set(wanted):
            yield way


def _pixels(config: PreTrainedConfig, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Images that a config may be for, and videos."""
    named = [getattr(config, name, None) for name in ("vision_config", "backbone_config")]
    of = next((part for part in named if part is not None), config)
    side = getattr(of, "image_size", None) or SIDE
    height, width = (side, side) if isinstance(side, int) else tuple(side)[-2:]
    channels = getattr(of, "num_channels", 3)
    frames = getattr(of, "num_frames", None) or getattr(of, "frames_per_clip", None)
    if isinstance(frames, int):
        yield torch.randn(2, frames, channels, height, width, generator=generator)
    yield torch.randn(2, channels, height, width, generator=generator)
    if (height, width) != (224, 224):
        yield torch.randn(2, channels, 224, 224, generator=generator)
