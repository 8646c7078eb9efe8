"""The shapes that benchmarks/dense.py times: blocks of real denoisers with random weights, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn


class Sample(nn.Module):
    """A denoiser that gives its tensor back, not a record."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        """What the model predicts."""
        first, *others = inputs  # tomesd reads the image's size from the first positional input
        return self.model(inputs[first], **{name: inputs[name] for name in others}, return_dict=False)[0]


@dataclass(frozen=True)
class Shape:
    """A model and what it is called with; ``tomesd`` says whether the peer knows its blocks."""

    what: str
    make: Callable[[], tuple[nn.Module, dict[str, Any]]]
    dtype: torch.dtype = torch.float32
    tomesd: bool = True

    @staticmethod
    def patched(model: Any) -> Any:
        """The part that the peer patches."""
        return model.model


def _sd15_blocks() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.Transformer2DModel(
        num_attention_heads=8, attention_head_dim=40, in_channels=320, num_layers=2, cross_attention_dim=768
    )
    inputs = {"hidden_states": torch.randn(2, 320, 64, 64), "encoder_hidden_states": torch.randn(2, 77, 768)}
    return Sample(model).eval(), inputs


def _dit_blocks(side: int, layers: int) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        model = diffusers.DiTTransformer2DModel(num_layers=layers, sample_size=side, out_channels=8)
        inputs = {
            "hidden_states": torch.randn(1, 4, side, side),
            "timestep": torch.tensor([500]),
            "class_labels": torch.tensor([1]),
        }
        return Sample(model).eval(), inputs

    return make


def _unet(config: dict[str, Any], side: int, width: int) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        model = diffusers.UNet2DConditionModel(cross_attention_dim=width, sample_size=side, **config)
        inputs: dict[str, Any] = {
            "sample": torch.randn(2, 4, side, side),
            "timestep": torch.tensor(500),
            "encoder_hidden_states": torch.randn(2, 77, width),
        }
        if config.get("addition_embed_type"):
            ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)
            inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 1280), "time_ids": ids}
        return Sample(model).eval(), inputs

    return make


_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _sd3() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 128, 128),
        "encoder_hidden_states": torch.randn(2, 154, 4096),
        "pooled_projections": torch.randn(2, 2048),
        "timestep": torch.tensor([500, 500]),
    }
    return Sample(model).eval(), inputs


def _flux() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(guidance_embeds=True, num_layers=6, num_single_layers=12)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(1, 4096, 64),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.tensor([3.5]),
    }
    return Sample(model).eval(), inputs


SHAPES: dict[str, Shape] = {
    "sd15": Shape("two blocks of Stable Diffusion 1.5 at 64 x 64 latents, batch 2", _sd15_blocks),
    "dit_1024": Shape("two blocks of DiT-XL/2, 1024 tokens", _dit_blocks(64, 2)),
    "dit_4096": Shape("one block of DiT-XL/2, 4096 tokens", _dit_blocks(128, 1)),
    "sd15_gpu": Shape("the UNet of Stable Diffusion 1.5 at 1024 px", _unet({}, 128, 768), torch.bfloat16),
    "sdxl_gpu": Shape("the UNet of SDXL at 1024 px", _unet(_SDXL, 128, 2048), torch.bfloat16),
    "sd3_gpu": Shape("the transformer of SD3 at 1024 px", _sd3, torch.bfloat16, tomesd=False),
    "flux_gpu": Shape("a third of Flux's layers at 1024 px", _flux, torch.bfloat16, tomesd=False),
}
