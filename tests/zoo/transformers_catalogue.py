"""Models of the transformers library, from their configs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.zoo.case import Case, images

DEPTH = 3
VOCABULARY = 64
Inputs = Callable[[torch.Generator], tuple[Any, ...]]
Keywords = Callable[[torch.Generator], dict[str, Any]]

_DIMS: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}
_PATCHES: dict[str, Any] = {**_DIMS, "image_size": 96, "patch_size": 16}
_TEXT: dict[str, Any] = {**_DIMS, "vocab_size": VOCABULARY, "max_position_embeddings": 64}


def _case(model: Any, config: Any, args: Inputs, dims: dict[str, Any], **facts: Any) -> Case:
    return Case(lambda: model(config(**dims)), args, **facts)


def _vision(model: Any, config: Any, size: int = 96, facts: dict[str, Any] | None = None, **dims: Any) -> Case:
    """A model of images; matched at every layer unless ``facts`` say otherwise."""
    dims = {**_PATCHES, "image_size": size, **dims}
    return _case(model, config, images(size), dims, **{"sites": DEPTH, **(facts or {})})


def _text(model: Any, config: Any, facts: dict[str, Any] | None = None, length: int = 24, **dims: Any) -> Case:
    """A model of words; matched at every layer unless ``facts`` say otherwise."""
    return _case(model, config, words(length), {**_TEXT, **dims}, **{"sites": DEPTH, **(facts or {})})


def words(length: int = 24, batch: int = 2) -> Inputs:
    """Word numbers ``[B, length]``; the special ones (0 to 3) do not occur."""
    return lambda generator: (torch.randint(4, VOCABULARY, (batch, length), generator=generator),)


def padded(length: int = 24, there: tuple[int, ...] = (24, 17)) -> Keywords:
    """An attention mask ``[B, length]`` for samples of these lengths."""
    return lambda generator: {"attention_mask": (torch.arange(length)[None] < torch.tensor(there)[:, None]).long()}


def _normal(name: str, *shape: int) -> Keywords:
    return lambda generator: {name: torch.randn(*shape, generator=generator)}


class Part(nn.Module):
    """A part of a model that takes the whole model's config, called by itself."""

    def __init__(self, whole: nn.Module, part: str) -> None:
        super().__init__()
        self.part = whole.get_submodule(part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(*args, **kwargs)


def _depth_anything() -> nn.Module:
    dims = {**_DIMS, "image_size": 84, "patch_size": 14, "mlp_ratio": 2, "num_hidden_layers": 4}
    dims["out_indices"] = [1, 2, 3, 4]
    backbone = hf.Dinov2Config(**dims, apply_layernorm=True, reshape_hidden_states=False)
    config = hf.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=48,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        patch_size=14,
    )
    return hf.DepthAnythingForDepthEstimation(config)


def _detr() -> nn.Module:
    stages: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}
    backbone = hf.ResNetConfig(embedding_size=8, layer_type="basic", **stages)
    offline: dict[str, Any] = {"use_timm_backbone": False, "use_pretrained_backbone": False}
    config = hf.DetrConfig(
        backbone_config=backbone,
        **offline,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_queries=8,
    )
    return hf.DetrModel(config)


_SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
#: a layer of windows and one of shifted windows
_WINDOWS = ("residual stream", "see some others only")
_SAM = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "mlp_dim": 96,
    "image_size": 96,
    "patch_size": 16,
    "output_channels": 16,
    "window_size": 3,
    "global_attn_indexes": [1, 3],
}
_SPEECH = {
    **_DIMS,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _sound(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(2, 2400, generator=generator),)


def _video(frames: int, size: int) -> Inputs:
    return lambda generator: (torch.randn(2, frames, 3, size, size, generator=generator),)


def _owlvit() -> nn.Module:
    text = {**_TEXT, "max_position_embeddings": 16, "pad_token_id": 0, "eos_token_id": 2}
    config = hf.OwlViTConfig(text_config=text, vision_config=_PATCHES, projection_dim=48)
    return hf.OwlViTForObjectDetection(config)


def _two_queries(generator: torch.Generator) -> dict[str, Any]:
    (ids,) = words(16, 4)(generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **_normal("pixel_values", 2, 3, 96, 96)(generator),
    }


def _document(generator: torch.Generator) -> dict[str, Any]:
    corners = torch.randint(0, 60, (2, 12, 2), generator=generator)
    boxes = torch.cat([corners, corners + torch.randint(1, 60, (2, 12, 2), generator=generator)], -1)
    there = torch.ones(2, 12, dtype=torch.long)
    there[1, 9:] = 0
    return {"bbox": boxes, "attention_mask": there, **_normal("pixel_values", 2, 3, 64, 64)(generator)}


_IMAGE_WORD = 5


def _llava() -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_PATCHES),
        text_config=hf.LlamaConfig(**_TEXT, num_key_value_heads=3),
        image_token_index=_IMAGE_WORD,
        image_seq_length=36,
    )
    return hf.LlavaForConditionalGeneration(config)


def _about_an_image(generator: torch.Generator) -> dict[str, Any]:
    (ids,) = words(8)(generator)
    ids = torch.cat([ids[:, :2], torch.full((2, 36), _IMAGE_WORD), ids[:, 2:].clamp_min(_IMAGE_WORD + 1)], 1)
    ids[:, :2] = 7
    return {"input_ids": ids, "use_cache": False, **_normal("pixel_values", 2, 3, 96, 96)(generator)}


TRANSFORMERS_CASES: dict[str, Case] = {
    "vit": _vision(hf.ViTModel, hf.ViTConfig),
    "vit_hidden_states": _vision(
        hf.ViTModel, hf.ViTConfig, facts={"kwargs": lambda generator: {"output_hidden_states": True}}
    ),
    "vit_attentions": _vision(
        hf.ViTModel,
        hf.ViTConfig,
        facts={
            "kwargs": lambda generator: {"output_attentions": True},
            "sites": 0,
            "declined": ("attention weights are returned",) * DEPTH,
        },
        attn_implementation="eager",
    ),
    "deit": _vision(hf.DeiTModel, hf.DeiTConfig),
    "dinov2": _vision(hf.Dinov2Model, hf.Dinov2Config, 84, patch_size=14, mlp_ratio=2),
    "dinov2_registers": _vision(
        hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig, 84, patch_size=14, mlp_ratio=2
    ),
    "dinov3": _vision(hf.DINOv3ViTModel, hf.DINOv3ViTConfig, num_register_tokens=4),
    "beit": _vision(hf.BeitModel, hf.BeitConfig, use_relative_position_bias=True),
    "clip_vision": _vision(hf.CLIPVisionModel, hf.CLIPVisionConfig),
    "clip_text": _text(
        hf.CLIPTextModel,
        hf.CLIPTextConfig,
        {"sites": 0, "declined": ("causal",) * DEPTH, "kwargs": padded()},
        eos_token_id=2,
    ),
    "siglip_vision": _vision(hf.SiglipVisionModel, hf.SiglipVisionConfig, facts={"declined": ("attention pooling",)}),
    "vit_mae": _vision(
        hf.ViTMAEModel, hf.ViTMAEConfig, facts={"kwargs": lambda g: {"noise": torch.rand(2, 36, generator=g)}}
    ),
    "videomae": _case(
        hf.VideoMAEModel, hf.VideoMAEConfig, _video(4, 64), {**_PATCHES, "image_size": 64, "num_frames": 4}, sites=DEPTH
    ),
    "timesformer": _case(
        hf.TimesformerModel,
        hf.TimesformerConfig,
        _video(4, 48),
        {**_PATCHES, "image_size": 48, "num_frames": 4},
        declined=("residual stream",) * (2 * DEPTH),
    ),
    "vivit": _case(
        hf.VivitModel,
        hf.VivitConfig,
        _video(4, 64),
        {**_DIMS, "image_size": 64, "num_frames": 4, "tubelet_size": [2, 16, 16]},
        sites=DEPTH,
    ),
    "ast": _case(
        hf.ASTModel,
        hf.ASTConfig,
        lambda generator: (torch.randn(2, 64, 32, generator=generator),),
        {**_DIMS, "patch_size": 8, "max_length": 64, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8},
        sites=DEPTH,
    ),
    "yolos": _vision(
        hf.YolosForObjectDetection,
        hf.YolosConfig,
        image_size=[96, 96],
        num_detection_tokens=6,
        use_mid_position_embeddings=True,
    ),
    "detr": Case(
        _detr, images(64), sites=3, declined=("same for every input", "attention pooling", "different tokens")
    ),
    "dpt": _vision(
        hf.DPTForDepthEstimation,
        hf.DPTConfig,
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        facts={"sites": 4},
    ),
    "depth_anything": Case(_depth_anything, images(84), sites=4),
    "segformer": _case(
        hf.SegformerModel,
        hf.SegformerConfig,
        images(64),
        {
            "num_encoder_blocks": 2,
            "depths": [1, 2],
            "sr_ratios": [4, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        sites=2,
        declined=("different tokens",),
    ),
    "swin_backbone": _case(
        hf.SwinBackbone, hf.SwinConfig, images(64), {**_SWIN, "out_indices": [1, 2]}, declined=_WINDOWS * 2
    ),
    "owlvit": Case(_owlvit, lambda generator: (), _two_queries, DEPTH, ("causal",) * DEPTH),
    "sam_vision": _case(
        hf.SamVisionModel, hf.SamVisionConfig, images(96), _SAM, sites=2, declined=("residual stream",) * 2
    ),
    "bert": _text(hf.BertModel, hf.BertConfig),
    "bert_padded": _text(hf.BertModel, hf.BertConfig, {"kwargs": padded()}),
    "roberta": _text(hf.RobertaModel, hf.RobertaConfig, {"kwargs": padded()}, pad_token_id=1),
    "distilbert": _text(
        hf.DistilBertModel, hf.DistilBertConfig, {"kwargs": padded()}, dim=48, n_layers=DEPTH, n_heads=3, hidden_dim=96
    ),
    "modernbert": _text(
        hf.ModernBertModel,
        hf.ModernBertConfig,
        {"kwargs": padded(), "sites": 2, "declined": ("see some others only",)},
        local_attention=8,
        global_attn_every_n_layers=2,
        pad_token_id=0,
    ),
    "longformer": _text(
        hf.LongformerModel,
        hf.LongformerConfig,
        {"kwargs": padded(), "sites": 0, "declined": ("aten.pad between",) * (2 * DEPTH)},
        attention_window=[8] * DEPTH,
        pad_token_id=1,
    ),
    "t5_encoder": _case(
        hf.T5EncoderModel,
        hf.T5Config,
        words(),
        {"vocab_size": VOCABULARY, "d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": DEPTH, "num_heads": 3},
        sites=DEPTH,
        kwargs=padded(),
    ),
    "whisper_encoder": Case(
        lambda: Part(
            hf.WhisperModel(
                hf.WhisperConfig(
                    vocab_size=VOCABULARY,
                    d_model=48,
                    encoder_layers=DEPTH,
                    decoder_layers=1,
                    encoder_attention_heads=3,
                    decoder_attention_heads=3,
                    encoder_ffn_dim=96,
                    decoder_ffn_dim=96,
                    max_source_positions=32,
                    max_target_positions=16,
                    num_mel_bins=16,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                    decoder_start_token_id=1,
                )
            ),
            "encoder",
        ),
        lambda generator: (torch.randn(2, 16, 64, generator=generator),),
        sites=DEPTH,
    ),
    "wav2vec2": _case(hf.Wav2Vec2Model, hf.Wav2Vec2Config, _sound, _SPEECH, sites=DEPTH),
    "hubert": _case(hf.HubertModel, hf.HubertConfig, _sound, _SPEECH, sites=DEPTH),
    "layoutlmv3": _case(
        hf.LayoutLMv3Model,
        hf.LayoutLMv3Config,
        words(12),
        {
            **_TEXT,
            "max_2d_position_embeddings": 128,
            "coordinate_size": 8,
            "shape_size": 8,
            "input_size": 64,
            "patch_size": 16,
            "pad_token_id": 1,
        },
        sites=DEPTH,
        kwargs=_document,
    ),
    "llama": _text(
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        {"sites": 0, "declined": ("causal",) * DEPTH, "kwargs": padded()},
        num_key_value_heads=1,
    ),
    "qwen2": _text(
        hf.Qwen2ForCausalLM, hf.Qwen2Config, {"sites": 0, "declined": ("causal",) * DEPTH}, num_key_value_heads=1
    ),
    "gpt2": _case(
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        words(),
        {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 48, "n_layer": DEPTH, "n_head": 3},
        declined=("causal",) * DEPTH,
    ),
    "llava": Case(_llava, lambda generator: (), _about_an_image, sites=DEPTH, declined=("causal",) * DEPTH),
}
