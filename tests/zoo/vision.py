"""Vision transformers of timm, transformers and torchvision."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision
import transformers

from tests.zoo.case import Case

DEPTH = 3


def _timm(name: str, size: int, patch: int, prefix: int = 1, **kwargs: Any) -> Case:
    """A timm model by its name with ``size`` x ``size`` inputs. ``Case`` fields may be among the keywords."""
    facts = {key: kwargs.pop(key) for key in ("declined", "whole") if key in kwargs}
    dims = {"depth": DEPTH, "embed_dim": 48, "num_heads": 3, "num_classes": 10, "img_size": size, **kwargs}
    tokens = (size // patch) ** 2 + prefix
    shape = (3, size, size)
    return Case(
        lambda: timm.create_model(name, **dims), shape, sites=DEPTH, tokens=tokens, protected=(prefix, 0), **facts
    )


TIMM: dict[str, Case] = {
    "vit": _timm("vit_tiny_patch16_224", 96, 16),
    "vit_augreg_224": _timm("vit_small_patch32_224.augreg_in21k", 224, 32),
    "vit_augreg_384": _timm("vit_small_patch32_384.augreg_in21k_ft_in1k", 384, 32),
    "vit_gap": _timm("vit_base_patch16_224", 96, 16, prefix=0, global_pool="avg", class_token=False),
    "vit_avg_of_patches": _timm("vit_base_patch16_224", 96, 16, global_pool="avg"),
    "deit": _timm("deit_tiny_patch16_224", 96, 16),
    "deit_distilled": _timm("deit_tiny_distilled_patch16_224", 96, 16, prefix=2),
    "deit3": _timm("deit3_small_patch16_224", 96, 16),
    "dinov2": _timm("vit_small_patch14_dinov2", 84, 14),
    "dinov2_registers": _timm("vit_small_patch14_reg4_dinov2", 84, 14, prefix=5),
    "clip": _timm("vit_base_patch16_clip_224", 96, 16),
    "siglip": _timm("vit_base_patch16_siglip_224", 96, 16, prefix=0, declined=("attention pooling",)),
    "beit": _timm("beit_base_patch16_224", 96, 16),
    "eva02": _timm("eva02_tiny_patch14_224", 84, 14),
    "relpos": _timm("vit_relpos_small_patch16_224", 96, 16, prefix=0),
    "rope": _timm("vit_small_patch16_rope_224", 96, 16),
    "dinov3": _timm("vit_small_patch16_dinov3", 96, 16, prefix=5),
}

_DIMS = {"hidden_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 3, "intermediate_size": 96}


def _hf(model: Any, config: Any, prefix: int = 1, size: int = 96, patch: int = 16, **kwargs: Any) -> Case:
    """A transformers model, called with return_dict as by default."""
    facts = {key: kwargs.pop(key) for key in ("declined", "whole") if key in kwargs}
    tokens = (size // patch) ** 2 + prefix
    dims = {**_DIMS, "image_size": size, "patch_size": patch, **kwargs}
    shape = (3, size, size)
    return Case(lambda: model(config(**dims)), shape, sites=DEPTH, tokens=tokens, protected=(prefix, 0), **facts)


TRANSFORMERS: dict[str, Case] = {
    "hf_vit": _hf(transformers.ViTModel, transformers.ViTConfig, whole=True),
    "hf_vit_eager": _hf(transformers.ViTModel, transformers.ViTConfig, whole=True, attn_implementation="eager"),
    "hf_vit_classifier": _hf(transformers.ViTForImageClassification, transformers.ViTConfig),
    "hf_deit": _hf(transformers.DeiTModel, transformers.DeiTConfig, prefix=2, whole=True),
    "hf_dinov2": _hf(transformers.Dinov2Model, transformers.Dinov2Config, size=84, patch=14, whole=True, mlp_ratio=2),
    "hf_clip": _hf(transformers.CLIPVisionModel, transformers.CLIPVisionConfig, whole=True),
    "hf_siglip": _hf(
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig,
        prefix=0,
        whole=True,
        declined=("attention pooling",),
    ),
    "hf_beit": _hf(transformers.BeitModel, transformers.BeitConfig, whole=True, use_relative_position_bias=True),
}


def _torchvision() -> torch.nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=96, patch_size=16, num_layers=DEPTH, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=10
    )


TORCHVISION: dict[str, Case] = {"torchvision_vit": Case(_torchvision, (3, 96, 96), sites=DEPTH, tokens=37)}
