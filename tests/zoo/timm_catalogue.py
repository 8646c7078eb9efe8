"""timm's attention families at small dims: what the compiler must make of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.models.metaformer import MetaFormer
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ResPostBlock
from timm.models.vitamin import VitCfg
from timm.models.volo import VOLO
from torch import Tensor, nn

from tests.zoo.case import Case, images

DEPTH = 3
OTHER_TOKENS = ("are different tokens",)
POOLED = ("attention pooling",)
#: attention pooling: one learnt query
CHANNELS = ("attention between channels",)
#: a second attention whose branch is added together with another's
SHARED = ("same residual add",)
#: attention and MLP are added at once, so after the last block's there is only the pooling
LAST = ("nothing is computed",)
LINEAR = ("linear attention",)
#: windows, or tokens in two dims of the stream
WINDOWS = ("residual stream",)


def _vit(name: str, size: int = 96, **kwargs: Any) -> Case:
    """A plain ViT of ``DEPTH`` layers, matched at each. ``Case`` fields may be among the keywords."""
    dims = {"depth": DEPTH, "embed_dim": 48, "num_heads": 3, "img_size": size}
    return _timm(name, size, **{"sites": DEPTH, **dims, **kwargs})


def _timm(make: str | type[nn.Module], size: int = 64, **kwargs: Any) -> Case:
    """A timm model called with ``size`` x ``size`` images. ``Case`` fields may be among the keywords."""
    facts = {key: kwargs.pop(key) for key in ("sites", "declined", "reason") if key in kwargs}
    wrap: Callable[[nn.Module], nn.Module] = kwargs.pop("wrap", lambda model: model)
    dims = {"num_classes": 10, **kwargs}
    build = partial(timm.create_model, make) if isinstance(make, str) else make
    return Case(lambda: wrap(build(**dims)), images(size), **facts)


class Calls(nn.Module):
    """A model of which another method than forward is called: what a dense head reads."""

    def __init__(self, model: nn.Module, method: str, **kwargs: Any) -> None:
        super().__init__()
        self.model, self.method, self.kwargs = model, method, kwargs

    def forward(self, x: Tensor) -> Any:
        return getattr(self.model, self.method)(x, **self.kwargs)


class Heads(nn.Module):
    """A distilled model as in training: each head's own output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model
        model.set_distilled_training(True)

    def forward(self, x: Tensor) -> Any:
        x = self.model.forward_features(x)
        return self.model.head(x[:, 0]), self.model.head_dist(x[:, 1])


VITS: dict[str, Case] = {
    "vit": _vit("vit_tiny_patch16_224"),
    "vit_avg": _vit("vit_tiny_patch16_224", global_pool="avg"),
    "vit_avgmax": _vit("vit_tiny_patch16_224", global_pool="avgmax", class_token=False),
    "vit_max": _vit("vit_tiny_patch16_224", global_pool="max", class_token=False),
    "vit_map": _vit("vit_tiny_patch16_224", global_pool="map", declined=POOLED),
    "vit_no_pool": _vit("vit_tiny_patch16_224", num_classes=0, global_pool=""),
    "vit_no_pool_head": _vit("vit_tiny_patch16_224", global_pool=""),
    "vit_gap": _vit("vit_base_patch16_gap_224"),
    "vit_parallel": _vit("vit_small_patch16_18x2_224", declined=SHARED * DEPTH),
    "vit_srelpos": _vit("vit_srelpos_small_patch16_224"),
    "vit_dynamic": _vit("vit_tiny_patch16_224", dynamic_img_size=True),
    "vit_reg": _vit("vit_small_patch16_224", reg_tokens=4),
    "vit_reg_gap": _vit("vit_medium_patch16_reg4_gap_256"),
    "vit_so150m": _vit("vit_so150m_patch16_reg4_map_256", declined=POOLED),
    "vit_hybrid": _vit("vit_tiny_r_s16_p8_224", size=160),
    "vit_qk_norm": _vit("vit_tiny_patch16_224", qk_norm=True),
    "vit_res_post_norm": _vit("vit_tiny_patch16_224", block_fn=ResPostBlock, init_values=1.0),
    "vit_parallel_mlp": _vit("vit_tiny_patch16_224", block_fn=ParallelScalingBlock, sites=2, declined=LAST),
    "vit_differential": _vit(
        "vit_tiny_patch16_224", block_fn=DiffParallelScalingBlock, sites=2, declined=(*SHARED * 2, *LAST, *SHARED)
    ),
    "deit": _vit("deit_tiny_patch16_224"),
    "deit_distilled": _vit("deit_tiny_distilled_patch16_224"),
    "deit_distilled_heads": _vit("deit_tiny_distilled_patch16_224", wrap=Heads),
    "deit3": _vit("deit3_small_patch16_224"),
    "beit": _vit("beit_base_patch16_224"),
    "beitv2": _vit("beitv2_base_patch16_224"),
    "beit_shared": _vit("beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False),
    "beit_cls": _vit("beit_base_patch16_224", global_pool="token"),
    "eva": _vit("eva_large_patch14_196", size=84),
    "eva02": _vit("eva02_tiny_patch14_224", size=84),
    "eva02_base": _vit("eva02_base_patch14_224", size=84),
    "eva02_clip": _vit("eva02_base_patch16_clip_224"),
    "dinov2": _vit("vit_small_patch14_dinov2", size=84),
    "dinov2_reg": _vit("vit_small_patch14_reg4_dinov2", size=84),
    "dinov2_features": _vit(
        "vit_small_patch14_reg4_dinov2",
        size=84,
        wrap=lambda model: Calls(model, "forward_intermediates", indices=(0, 2), return_prefix_tokens=True, norm=True),
    ),
    "dinov2_layers": _vit(
        "vit_small_patch14_dinov2",
        size=84,
        wrap=lambda model: Calls(
            model, "get_intermediate_layers", n=2, reshape=True, return_prefix_tokens=True, norm=True
        ),
    ),
    "dinov2_nlc": _vit(
        "vit_small_patch14_dinov2",
        size=84,
        wrap=lambda model: Calls(model, "forward_intermediates", indices=3, output_fmt="NLC", intermediates_only=True),
    ),
    "dinov3": _vit("vit_small_patch16_dinov3"),
    "dinov3_qkvb": _vit("vit_small_plus_patch16_dinov3_qkvb"),
    "pe_core": _vit("vit_pe_core_tiny_patch16_384", declined=POOLED),
    "siglip": _vit("vit_base_patch16_siglip_224", declined=POOLED),
    "siglip_gap": _vit("vit_base_patch16_siglip_gap_224"),
    "siglip2": _vit("vit_base_patch32_siglip_256", size=160, declined=POOLED),
    "siglip2_naflex": _timm(
        "naflexvit_base_patch16_siglip", 96, sites=DEPTH, depth=DEPTH, embed_dim=48, num_heads=3, declined=POOLED
    ),
    "clip": _vit("vit_base_patch16_clip_224"),
    "clip_quickgelu": _vit("vit_base_patch16_clip_quickgelu_224"),
    "clippo": _vit("vit_base_patch16_224", class_token=False, global_pool="map", declined=POOLED),
    "cait": _vit("cait_xxs24_224", sites=0, declined=(*("after the softmax",) * DEPTH, *OTHER_TOKENS * 2)),
    "crossvit": _timm(
        "crossvit_tiny_240",
        120,
        img_size=120,
        embed_dim=(24, 48),
        depth=((1, 2, 0), (1, 2, 0)),
        sites=6,
        declined=OTHER_TOKENS * 4,
    ),
    "relpos": _vit("vit_relpos_small_patch16_224"),
    "relpos_mlp": _vit("vit_relpos_base_patch32_plus_rpn_256", size=160),
    "relpos_cls": _vit("vit_relpos_medium_patch16_cls_224"),
    "rope": _vit("vit_small_patch16_rope_224"),
    "rope_mixed": _vit("vit_small_patch16_rope_mixed_224"),
    "rope_ape": _vit("vit_small_patch16_rope_ape_224"),
    "flexivit": _vit("flexivit_small"),
    "naflexvit": _timm("naflexvit_base_patch16_gap", 96, sites=DEPTH, depth=DEPTH, embed_dim=48, num_heads=3),
    "convit": _vit("convit_tiny", local_up_to_layer=2, sites=2, depth=4, declined=("after the softmax",) * 2),
    "tnt": _timm(
        "tnt_s_legacy_patch16_224", 96, img_size=96, depth=DEPTH, embed_dim=48, num_heads_outer=3, sites=2 * DEPTH
    ),
    "vitamin": _vit("vitamin_small_224", embed_cfg=VitCfg(embed_dim=(16, 32, 48), depths=(1, 1, 1), stem_width=16)),
}

OTHERS: dict[str, Case] = {
    "xcit": _timm(
        "xcit_nano_12_p16_224",
        96,
        img_size=96,
        depth=2,
        embed_dim=48,
        num_heads=3,
        declined=(*CHANNELS * 2, *OTHER_TOKENS * 2),
    ),
    "swin": _timm(
        "swin_tiny_patch4_window7_224",
        64,
        img_size=64,
        window_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        declined=("windows", "see some others only") * 2,
    ),
    "swinv2": _timm(
        "swinv2_tiny_window8_256",
        64,
        img_size=64,
        window_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        declined=("windows", "see some others only") * 2,
    ),
    "pvt_v2": _timm(
        "pvt_v2_b0", 128, embed_dims=(16, 32, 40, 64), depths=(1, 1, 1, 2), sites=2, declined=OTHER_TOKENS * 3
    ),
    "mvitv2": _timm("mvitv2_tiny", 64, img_size=64, declined=OTHER_TOKENS * 10),
    "hiera": _timm(
        "hiera_tiny_224",
        128,
        img_size=128,
        embed_dim=16,
        stages=(1, 1, 2, 1),
        sites=1,
        declined=(*WINDOWS, *OTHER_TOKENS * 3),
    ),
    "samvit": _timm(
        "samvit_base_patch16",
        128,
        img_size=128,
        depth=4,
        embed_dim=48,
        num_heads=3,
        window_size=4,
        global_attn_indexes=(1, 3),
        neck_chans=16,
        sites=2,
        declined=WINDOWS * 2,
    ),
    "tiny_vit": _timm(
        "tiny_vit_5m_224",
        128,
        embed_dims=(16, 32, 40, 64),
        depths=(1, 1, 2, 2),
        num_heads=(2, 4, 5, 8),
        window_sizes=(7, 7, 4, 7),
        declined=WINDOWS * 5,
    ),
    "levit": _timm("levit_128s", 224, embed_dim=(32, 48, 64), depth=(2, 2, 2), sites=6, declined=OTHER_TOKENS * 2),
    "mobilevit": _timm("mobilevit_xxs", 192, sites=9),
    "mobilevitv2": _timm("mobilevitv2_050", 64, reason="no attention"),
    "maxvit": _timm(
        "maxvit_pico_rw_256",
        64,
        img_size=64,
        embed_dim=(32, 64),
        depths=(1, 1),
        block_type=("M", "M"),
        declined=WINDOWS * 4,
    ),
    "coatnet": _timm(
        "coatnet_pico_rw_224",
        128,
        img_size=128,
        embed_dim=(16, 32, 64, 64),
        depths=(1, 1, 2, 2),
        declined=("no add joins", *WINDOWS * 3),
    ),
    "twins_svt": _timm(
        "twins_svt_small",
        128,
        img_size=128,
        embed_dims=(16, 32, 64, 64),
        depths=(2, 2, 2, 2),
        sites=1,
        declined=(*(*WINDOWS, *OTHER_TOKENS) * 3, *WINDOWS),
    ),
    "twins_pcpvt": _timm(
        "twins_pcpvt_small",
        128,
        img_size=128,
        embed_dims=(16, 32, 40, 64),
        depths=(1, 1, 1, 2),
        sites=2,
        declined=OTHER_TOKENS * 3,
    ),
    "davit": _timm(
        "davit_tiny",
        64,
        depths=(1, 1, 1, 1),
        embed_dims=(24, 24, 48, 48),
        num_heads=(3, 3, 3, 3),
        declined=(*WINDOWS, *CHANNELS) * 4,
    ),
    "coat": _timm(
        "coat_tiny",
        64,
        img_size=64,
        serial_depths=(1, 1, 1, 1),
        parallel_depth=1,
        embed_dims=(32,) * 4,
        declined=LINEAR * 7,
    ),
    "coat_lite": _timm(
        "coat_lite_tiny",
        64,
        img_size=64,
        serial_depths=(1, 1, 1, 1),
        embed_dims=(16, 16, 32, 32),
        declined=LINEAR * 4,
    ),
    "volo": _timm(
        VOLO,
        128,
        img_size=128,
        layers=(1, 2, 1, 1),
        embed_dims=(24, 48, 48, 48),
        num_heads=(3, 3, 3, 3),
        sites=4,
        declined=OTHER_TOKENS * 2,
    ),
    "efficientformer": _timm(
        "efficientformer_l1", 224, depths=(1, 1, 1, 3), embed_dims=(16, 16, 32, 48), num_vit=2, sites=2
    ),
    "efficientformerv2": _timm(
        "efficientformerv2_s0",
        128,
        img_size=128,
        depths=(1, 1, 4, 4),
        embed_dims=(16, 16, 32, 48),
        mlp_ratios=4,
        declined=("aten.conv2d between",) * 2 + OTHER_TOKENS + ("aten.conv2d between",) * 2,
    ),
    "edgenext": _timm("edgenext_xx_small", 64, depths=(1, 2, 2, 2), declined=CHANNELS * 3),
    "fastvit": _timm("fastvit_sa12", 128, layers=(1, 1, 1, 2), embed_dims=(32, 32, 32, 64), sites=2),
    "repvit": _timm("repvit_m1", 64, reason="no attention"),
    "visformer": _timm("visformer_tiny", 128, img_size=128, embed_dim=48, depth=(1, 2, 2), declined=WINDOWS * 4),
    "poolformer": _timm(MetaFormer, 64, dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), reason="no attention"),
    "convnext": _timm("convnext_atto", 64, depths=(1, 1, 1, 1), reason="no attention"),
}

TIMM_CASES: dict[str, Case] = {**VITS, **OTHERS}
