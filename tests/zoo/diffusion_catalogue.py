"""diffusers' denoisers at small dims: what the compiler must make of each."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Generator, Tensor, nn

from tests.zoo.case import Case

BATCH, TEXT = 2, 7
CROSS = ("are different tokens",)
SMALLER = ("max_downsample",)  # half of the largest image
LINEAR = ("linear attention",)


class Called(nn.Module):
    """A denoiser called as a pipeline does: one tensor out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model(*args, **kwargs, return_dict=False)[0]


def _noise(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def unet(
    *, depth: int | tuple[int, ...] = 1, side: int = 16, channels: tuple[int, ...] = (32, 64), **kwargs: Any
) -> diffusers.UNet2DConditionModel:
    """A UNet of Stable Diffusion's kind: self-attention at ``side`` and half of it."""
    return diffusers.UNet2DConditionModel(
        sample_size=side,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
        transformer_layers_per_block=depth,
        **kwargs,
    )


def unet_inputs(generator: Generator, side: int = 16, batch: int = BATCH, width: int | None = None) -> tuple[Any, ...]:
    """Latents, a timestep and text."""
    return (
        _noise(generator, batch, 4, side, width or side),
        torch.tensor(500),
        _noise(generator, batch, TEXT, 24),
    )


def _sdxl_inputs(generator: Generator) -> dict[str, Any]:
    return {
        "added_cond_kwargs": {
            "text_embeds": _noise(generator, BATCH, 16),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * BATCH),
        }
    }


def _sdxl() -> nn.Module:
    return Called(
        unet(
            depth=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            use_linear_projection=True,
        )
    )


def _controlled(generator: Generator) -> dict[str, Any]:
    shapes = [(32, 16), (32, 16), (32, 8), (64, 8)]
    return {
        "down_block_additional_residuals": tuple(_noise(generator, BATCH, c, s, s) for c, s in shapes),
        "mid_block_additional_residual": _noise(generator, BATCH, 64, 8, 8),
    }


def _dit() -> nn.Module:
    dims = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "sample_size": 16}
    return Called(diffusers.DiTTransformer2DModel(in_channels=4, num_embeds_ada_norm=10, norm_num_groups=8, **dims))


def _pixart() -> nn.Module:
    dims = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "sample_size": 16}
    return Called(
        diffusers.PixArtTransformer2DModel(
            cross_attention_dim=32, caption_channels=20, norm_num_groups=8, use_additional_conditions=False, **dims
        )
    )


def _sd3(**kwargs: Any) -> nn.Module:
    return Called(
        diffusers.SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=20,
            out_channels=4,
            pos_embed_max_size=12,
            **kwargs,
        )
    )


def _flux() -> nn.Module:
    return Called(
        diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
    )


def _flux_inputs(generator: Generator, side: int = 8) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    return {
        "hidden_states": _noise(generator, BATCH, side * side, 4),
        "encoder_hidden_states": _noise(generator, BATCH, TEXT, 24),
        "pooled_projections": _noise(generator, BATCH, 20),
        "timestep": torch.tensor([0.5] * BATCH),
        "img_ids": places,
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.tensor([3.5] * BATCH),
    }


def _sana() -> nn.Module:
    return Called(
        diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=24,
            sample_size=8,
        )
    )


def _uvit() -> nn.Module:
    return diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=24,
        vocab_size=40,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        sample_size=8,
    )


def _uvit_inputs(generator: Generator) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(0, 32, (BATCH, 8, 8), generator=generator),
        "encoder_hidden_states": _noise(generator, BATCH, TEXT, 24),
        "pooled_text_emb": _noise(generator, BATCH, 16),
        "micro_conds": torch.rand(BATCH, 5, generator=generator),
    }


def _image(generator: Generator, side: int = 16) -> tuple[Tensor]:
    return (_noise(generator, BATCH, 4, side, side),)


def _steps(generator: Generator) -> dict[str, Any]:
    return {"timestep": torch.tensor([10, 900]), "class_labels": torch.tensor([1, 7])}


def _captions(generator: Generator) -> dict[str, Any]:
    mask = torch.ones(BATCH, TEXT)
    mask[0, 5:] = 0
    return {
        "encoder_hidden_states": _noise(generator, BATCH, TEXT, 20),
        "encoder_attention_mask": mask,
        "timestep": torch.tensor([10, 900]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _joint(generator: Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": _noise(generator, BATCH, TEXT, 24),
        "pooled_projections": _noise(generator, BATCH, 20),
        "timestep": torch.tensor([10, 900]),
    }


def _sana_text(generator: Generator) -> dict[str, Any]:
    return {"encoder_hidden_states": _noise(generator, BATCH, TEXT, 24), "timestep": torch.tensor([10, 900])}


def _wan() -> nn.Module:
    return Called(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=32,
            ffn_dim=64,
            num_layers=3,
            rope_max_seq_len=32,
        )
    )


def _cogvideo() -> nn.Module:
    return Called(
        diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=24,
            num_layers=3,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=TEXT,
            use_rotary_positional_embeddings=True,
        )
    )


def _cogvideo_inputs(generator: Generator) -> dict[str, Any]:
    angles = torch.rand(3 * 4 * 4, 16, generator=generator)
    return {
        "hidden_states": _noise(generator, BATCH, 3, 4, 8, 8),
        "encoder_hidden_states": _noise(generator, BATCH, TEXT, 24),
        "timestep": torch.tensor([10, 900]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _ltx() -> nn.Module:
    return Called(
        diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=24,
        )
    )


def _ltx_inputs(generator: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _noise(generator, BATCH, 3 * 4 * 4, 8),
        "encoder_hidden_states": _noise(generator, BATCH, TEXT, 24),
        "timestep": torch.tensor([10, 900]),
        "encoder_attention_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "num_frames": 3,
        "height": 4,
        "width": 4,
    }


def _aura() -> nn.Module:
    return Called(
        diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        )
    )


def _qwen() -> nn.Module:
    return Called(
        diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
        )
    )


def _qwen_inputs(generator: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _noise(generator, BATCH, 5 * 7, 16),
        "encoder_hidden_states": _noise(generator, BATCH, TEXT, 24),
        "encoder_hidden_states_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "timestep": torch.tensor([10.0, 900.0]),
        "img_shapes": [[(1, 5, 7)]] * BATCH,
    }


# Self-attention at 16 x 16, cross-attention, then the same at 8 x 8, in the middle, and back up twice.
UNET = (*CROSS, *(*SMALLER, *CROSS) * 4, *CROSS * 2)

DIFFUSION_CASES: dict[str, Case] = {
    "UNet2DConditionModel, Stable Diffusion": Case(lambda: Called(unet()), unet_inputs, sites=3, declined=UNET),
    "UNet2DConditionModel, SDXL": Case(
        _sdxl, unet_inputs, _sdxl_inputs, sites=3, declined=(*CROSS, *(*SMALLER, *CROSS) * 8, *CROSS * 2)
    ),
    "UNet2DConditionModel, ControlNet": Case(lambda: Called(unet()), unet_inputs, _controlled, sites=3, declined=UNET),
    "DiTTransformer2DModel": Case(_dit, _image, _steps, sites=3),
    "PixArtTransformer2DModel": Case(_pixart, _image, _captions, sites=3, declined=CROSS * 3),
    "SD3Transformer2DModel": Case(_sd3, _image, _joint, sites=3),
    "SD3Transformer2DModel, two attentions": Case(
        lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"), _image, _joint, sites=4
    ),
    "FluxTransformer2DModel": Case(_flux, lambda generator: (), _flux_inputs, sites=4),
    "AuraFlowTransformer2DModel": Case(
        _aura,
        lambda generator: _image(generator, 8),
        lambda generator: {
            "encoder_hidden_states": _noise(generator, BATCH, TEXT, 24),
            "timestep": torch.tensor([10.0, 900.0]),
        },
        sites=4,
    ),
    "QwenImageTransformer2DModel": Case(_qwen, lambda generator: (), _qwen_inputs, sites=3),
    "SanaTransformer2DModel": Case(
        _sana, lambda generator: _image(generator, 8), _sana_text, declined=(*LINEAR, *CROSS) * 2
    ),
    "WanTransformer3DModel": Case(
        _wan,
        lambda generator: (_noise(generator, BATCH, 4, 3, 8, 8),),
        lambda generator: {
            "timestep": torch.tensor([10, 900]),
            "encoder_hidden_states": _noise(generator, BATCH, TEXT, 24),
        },
        sites=3,
        declined=CROSS * 3,
    ),
    "CogVideoXTransformer3DModel": Case(_cogvideo, lambda generator: (), _cogvideo_inputs, sites=3),
    "LTXVideoTransformer3DModel": Case(_ltx, lambda generator: (), _ltx_inputs, sites=3, declined=CROSS * 3),
    "UVit2DModel": Case(_uvit, lambda generator: (), _uvit_inputs, sites=3, declined=CROSS * 7),
}
