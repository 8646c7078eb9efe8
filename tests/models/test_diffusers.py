"""diffusers' denoisers with their branches reduced: proofs of every one, and whole pipelines."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn

import tofu_fx
from tests.harness import Study, compiled, prove, randomise, relative_error, same_bits, study
from tests.zoo.diffusion_catalogue import CROSS, DIFFUSION_CASES, TEXT, Called, unet, unet_inputs
from tofu_fx.plan.records import PlanRow
from tofu_fx.testing import MEANING_TOLERANCE

ALL = ["attention", "mlp", "cross"]
EVERYWHERE = {"placement": "branch", "branches": ALL, "max_downsample": 8}
fuse_tokens = torch.ops.tofu.fuse_tokens.default
rebase = torch.ops.tofu.rebase.default

#: what is found with all branches at every resolution: self-attentions, of which the catalogue's default may have fewer
SITES = {name: 11 if "SDXL" in name else 7 for name in DIFFUSION_CASES if name.startswith("UNet")}
#: Flux does not show the image of its tokens
MORE: dict[str, dict[str, Any]] = {"FluxTransformer2DModel": {"grid": (8, 8)}}
#: denoisers that say so by their shapes; UVit2DModel makes logits of a picture's codes, Sana has no softmax
BRANCHED = (
    "UNet2DConditionModel, Stable Diffusion",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


#: Proved with every branch at night, for the blocks of another are like theirs; the catalogue has all of them.
LIKE = {
    "UNet2DConditionModel, SDXL": "Stable Diffusion's",
    "UNet2DConditionModel, ControlNet": "Stable Diffusion's",
    "SD3Transformer2DModel": "SD3's with two attentions",
    "AuraFlowTransformer2DModel": "SD3's and Flux's",
    "LTXVideoTransformer3DModel": "PixArt's",
    "QwenImageTransformer2DModel": "SD3's",
}


def less_often(name: str) -> Any:
    why = f"its blocks are like {LIKE.get(name)}"
    return pytest.param(name, marks=pytest.mark.nightly(why)) if name in LIKE else name


@pytest.mark.parametrize("name", [less_often(name) for name in DIFFUSION_CASES])
def test_every_branch_of_every_denoiser_is_rewritten_right(name: str) -> None:
    case = DIFFUSION_CASES[name]
    args, kwargs = case.inputs()
    # The UNets' graphs are the largest by far: of them one site is proved beside the whole.
    options = {**EVERYWHERE, **MORE.get(name, {})}
    proofs = prove(case.model(), *args, options=options, **kwargs).check()
    assert len(proofs.matched) == SITES.get(name, case.sites)
    assert {site.placement for site in proofs.matched} <= {"branch"}
    # What is left are cross-attentions, and linear ones.
    declined = [str(site.decline) for site in proofs.sites if not site.matched]
    assert all(any(words in reason for words in (*CROSS, "linear attention")) for reason in declined), declined


@functools.cache
def studied(name: str) -> Study:
    """A case under the options that tests below look at, traced once."""
    case = DIFFUSION_CASES[name]
    args, kwargs = case.inputs()
    variants: dict[str, Any] = {"auto": {"ratio": 0.5}}
    if name.startswith("UNet"):
        variants |= {f"max {limit}": {"ratio": 0.5, "max_downsample": limit} for limit in (1, 2, 8)}
        variants |= {"all": {**EVERYWHERE, "ratio": 0.5}}
    if name.startswith("Flux"):
        variants |= {"grid": {"ratio": 0.75, "grid": (8, 8)}, "too much": {"ratio": 0.9, "grid": (8, 8)}}
    with torch.no_grad():
        return study(case.model(), *args, variants=variants, proofs=False, **kwargs)


@pytest.mark.parametrize("name", BRANCHED)
def test_default_placement_of_denoisers_is_in_their_branches(name: str) -> None:
    found, case = studied(name), DIFFUSION_CASES[name]
    rows = [PlanRow.of(site) for site in found.reducing("auto")]
    assert [(row.placement, row.branches) for row in rows] == [("branch", ["attention"])] * case.sites
    assert [row.strategy for row in rows] == ["mean"] * case.sites
    assert all(2 * row.r == row.tokens or (row.tokens, row.r) == (71, 32) for row in rows)
    assert len(found.nodes("auto", fuse_tokens)) == case.sites
    assert 1e-3 < relative_error(found.outputs["auto"], found.outputs["plain"]) < 1


def test_explain_shows_the_placement_and_the_image_of_each_row() -> None:
    case = DIFFUSION_CASES["DiTTransformer2DModel"]
    args, kwargs = case.inputs()
    explained = tofu_fx.explain(case.model(), *args, options={"ratio": 0.5}, **kwargs)
    assert [(row.placement, row.grid, row.cell) for row in explained.plan.sites] == [("branch", [8, 8], 2)] * 3
    assert explained.flops_after < explained.flops_before


def test_flux_without_a_grid_keeps_every_second_token_and_says_what_would_help() -> None:
    found = studied("FluxTransformer2DModel")
    assert {site.grid for site in found.reducing("auto")} == {None}
    (outcome,) = found.outcomes["auto"]
    assert any("no image is found" in message and "'grid'" in message for message in outcome.warnings)


def test_flux_with_a_grid_reaches_three_quarters_of_the_image_and_none_of_the_text() -> None:
    found = studied("FluxTransformer2DModel")
    (warning,) = found.outcomes["grid"][0].warnings
    assert "could not be checked" in warning  # Flux gets its image flattened
    # Two blocks with a stream of images beside the text's, then two with both as one, the text first.
    assert [(site.prefix, site.suffix, site.r) for site in found.reducing("grid")] == [(0, 0, 48)] * 2 + [
        (TEXT, 0, 48)
    ] * 2
    fused = found.nodes("grid", fuse_tokens)
    assert [tuple(node.args[5:7]) for node in fused] == [(0, 0)] * 2 + [(TEXT, 0)] * 2
    assert [list(node.args[7]) for node in fused] == [[1, 8, 8, 2, 0]] * 4
    assert found.outputs["grid"].isfinite().all()
    assert relative_error(found.outputs["grid"], found.outputs["auto"]) > 1e-3


def test_flux_beyond_the_cap_is_capped_aloud() -> None:
    found = studied("FluxTransformer2DModel")
    assert [site.r for site in found.reducing("too much")] == [48] * 4
    messages = found.outcomes["too much"][0].warnings
    assert any("capped at 48" in m and "0.75" in m and "larger 'cell'" in m for m in messages), messages
    assert same_bits(found.outputs["too much"], found.outputs["grid"])


def test_sana_is_declined_for_its_linear_attention_and_runs_untouched() -> None:
    case = DIFFUSION_CASES["SanaTransformer2DModel"]
    args, kwargs = case.inputs()
    model = case.model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = compiled(model, ratio=0.5)(*args, **kwargs)
    messages = [str(w.message) for w in caught if issubclass(w.category, tofu_fx.TofuWarning)]
    assert len(messages) == 1
    assert "nothing was accelerated" in messages[0]
    assert "linear attention" in messages[0]
    assert same_bits(outputs, model(*args, **kwargs))


def test_unets_take_smaller_images_only_when_told_and_auto_the_largest() -> None:
    found = studied("UNet2DConditionModel, Stable Diffusion")
    sides = {name: [site.grid[1] for site in found.reducing(name)] for name in found.outcomes if name != "all"}
    assert sides["auto"] == sides["max 1"] == [16, 16, 16]
    assert sides["max 2"] == sides["max 8"] == [16, 8, 8, 8, 8, 16, 16]
    assert same_bits(found.outputs["auto"], found.outputs["max 1"])
    assert relative_error(found.outputs["max 2"], found.outputs["max 1"]) > 1e-3
    assert len([s for s in found.sites("max 1") if s.decline and "max_downsample" in s.decline.reason]) == 4


def test_a_block_shares_one_match_among_its_attention_mlp_and_queries_of_the_text() -> None:
    found = studied("UNet2DConditionModel, Stable Diffusion")
    sites = found.reducing("all")
    assert [[branch.kind for branch in site.branches] for site in sites] == [["attention", "cross", "mlp"]] * 7
    assert len(found.nodes("all", fuse_tokens)) == 7
    assert len(found.nodes("all", rebase)) == 14
    assert [node.meta["val"].shape[1] for node in found.nodes("all", rebase)] == [
        tokens for tokens in (128, 32, 32, 32, 32, 128, 128) for _ in range(2)
    ]


SMALL: dict[str, Any] = {"channels": (32,), "side": 8, "mid_block_type": None}


@pytest.mark.parametrize("batch", [1, 3])
def test_other_batches_are_rewritten_right(batch: int) -> None:
    """A batch of one has an axis that could be taken for any other; an odd one is no pair of guidance."""
    inputs = unet_inputs(torch.Generator().manual_seed(batch), side=8, batch=batch)
    proofs = prove(randomise(Called(unet(**SMALL))), *inputs, options=EVERYWHERE).check()
    assert [(site.tokens, site.grid) for site in proofs.matched] == [(64, (1, 8, 8))] * 3


def test_a_sample_is_denoised_alike_alone_and_among_others() -> None:
    model = DIFFUSION_CASES["DiTTransformer2DModel"].model()
    generator = torch.Generator().manual_seed(0)
    latents, steps, labels = torch.randn(3, 4, 16, 16, generator=generator), torch.tensor([3, 90, 700]), torch.arange(3)
    # One match for all sites: the operator promises the same one whatever the batch, but from other bits of a GEMM.
    call = compiled(model, **EVERYWHERE, ratio=0.5, reuse="resolution")
    whole = call(latents, timestep=steps, class_labels=labels)
    for i in range(3):
        alone = call(latents[i : i + 1], timestep=steps[i : i + 1], class_labels=labels[i : i + 1])
        # Rounding of sums in another order, as for the proofs of meaning.
        assert relative_error(alone, whole[i : i + 1]) < MEANING_TOLERANCE


def _adapted() -> nn.Module:
    model = unet(**SMALL)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return randomise(Called(model))  # of an adapter too: its second matrix is zero when it is made


def test_lora_beside_the_weights_gives_what_merged_weights_give() -> None:
    model: Any = _adapted()
    inputs = unet_inputs(torch.Generator().manual_seed(2), side=8)
    # One match for all: the first site is ahead of every adapted layer, so both models decide on the same bits.
    options = {"ratio": 0.5, "placement": "branch", "reuse": "resolution"}
    plain = model(*inputs)
    beside = compiled(model, **options)(*inputs)
    model.model.disable_adapters()
    assert relative_error(model(*inputs), plain) > 1e-2, "the adapter must matter"
    model.model.enable_adapters()
    model.model.fuse_lora()
    assert relative_error(model(*inputs), plain) < MEANING_TOLERANCE
    merged = compiled(model, **options)(*inputs)
    assert relative_error(merged, plain) > 1e-3
    # x A B + x W against x (A B + W): sums in another order.
    assert relative_error(beside, merged) < MEANING_TOLERANCE


# ---- half precision --------------------------------------------------------------------------------------------------


def _patchwork() -> Tensor:
    """Latents of 8 x 8 tokens of three kinds: as many destinations of each, nearly all others of one."""
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(3, 4, 2, 2, generator=generator)
    which = torch.randint(-12, 3, (2, 8, 8), generator=generator).clamp_min(0)
    which[:, ::2, ::2] = torch.arange(16).view(4, 4) % 3
    return values[which].permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 16, 16)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "PixArtTransformer2DModel"])
def test_equal_tokens_are_merged_without_loss_in_bfloat16_too(name: str) -> None:
    """Where all members of a group are equal, log(size) makes the merge exact. So no rounding decides what is compared,
    and half precision may be held against float32: it must be as near as the uncompiled model in half precision is.
    """
    case = DIFFUSION_CASES[name]
    _, kwargs = case.inputs()
    model: Any = case.model()
    model.model.pos_embed.pos_embed.zero_()  # else no two tokens are equal
    latents, options = _patchwork(), {**EVERYWHERE, "ratio": 0.75}
    exact = model(latents, **kwargs)
    assert relative_error(compiled(model, **options)(latents, **kwargs), exact) < MEANING_TOLERANCE
    without = compiled(model, **options, proportional_attention=False)(latents, **kwargs)
    half = model.bfloat16()
    kwargs = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    plain = half(latents.bfloat16(), **kwargs)
    found = compiled(half, **options)(latents.bfloat16(), **kwargs)
    assert found.dtype == torch.bfloat16
    # Both errors are maxima of the same number of roundings to 2^-9, in another order: a factor of three between them.
    # Sizes that were lost show as more.
    rounding = relative_error(plain.float(), exact)
    assert 2**-9 < rounding < 0.1
    assert relative_error(found.float(), exact) < 3 * rounding
    assert relative_error(without, exact) > 3 * rounding


# ---- a pipeline ------------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """CLIP's tokenizer over letters alone."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TEXT, pad_token="<|endoftext|>"
    )


def _pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """Stable Diffusion's pipeline, every part of it tiny."""
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TEXT, bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=_tokenizer(folder),
        unet=randomise(unet(**SMALL)),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipeline_with_guidance_draws_the_same_bits_without_reduction_and_a_finite_other_image_with_one(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    pipeline = _pipeline(tmp_path, dtype)

    def draw() -> Tensor:
        images = pipeline(
            "a cat", negative_prompt="dog", num_inference_steps=3, guidance_scale=5.0, height=8, width=8,
            generator=torch.Generator().manual_seed(3), output_type="pt",
        ).images  # fmt: skip
        assert isinstance(images, Tensor)
        return images

    plain, module = draw(), pipeline.unet
    assert plain.isfinite().all()
    pipeline.unet = compiled(module, ratio=0.0)
    assert same_bits(draw(), plain)
    pipeline.unet = compiled(module, ratio=0.5)
    reduced = draw()
    assert reduced.shape == plain.shape
    assert reduced.isfinite().all()
    assert relative_error(reduced, plain) > 1e-3
    assert same_bits(draw(), reduced)
    pipeline.unet = module  # nothing was patched
    assert same_bits(draw(), plain)


def test_a_whole_pipeline_cannot_be_compiled_and_the_error_says_which_part_to_take(tmp_path: Path) -> None:
    with pytest.raises(tofu_fx.TofuError, match=r"pipe\.unet = torch\.compile\(pipe\.unet"):
        tofu_fx.explain(_pipeline(tmp_path, torch.float32), torch.zeros(1))
