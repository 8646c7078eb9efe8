"""A real dense model, a real head and real photographs: the issue's error bounds, and the three proofs of a rewrite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tofu_fx
from tests.examples.loading import example, needed
from tests.harness import compiled, relative_error, same_bits, study
from tests.oracle.operators import reference_fuse, reference_restore

R, LAYERS, TOKENS = 12, 12, 257
BOUNDS = {"prune": 0.023, "mean": 0.020, "mlerp": 0.019}
# Spread over the whole tar.
EVERY, PHOTOS, BATCH = 10, 24, 12


@pytest.fixture(scope="module")
def model() -> Any:
    files = example("saliency_model")
    needed(files.MODEL, files.PHOTOS)
    return files.load_model()


@pytest.fixture(scope="module")
def images(model: Any) -> Tensor:
    files = example("saliency_model")
    return files.normalise(files.load_photos(every=EVERY, limit=PHOTOS))


@pytest.fixture(scope="module")
def plain(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(BATCH)])


@torch.no_grad()
def test_plain_maps_are_maps_of_something(plain: Tensor) -> None:
    assert plain.shape == (PHOTOS, 1, 224, 224)
    assert plain.min() >= 0
    assert plain.max() <= 1
    # Wrong weights or a wrong normalisation give a flat map, and a flat map is easy to keep.
    assert plain.std((1, 2, 3)).mean() > 0.15


@torch.no_grad()
@pytest.mark.parametrize("strategy", BOUNDS)
def test_error_of_the_map_is_within_the_bound(strategy: str, model: Any, images: Tensor, plain: Tensor) -> None:
    call = compiled(model, r=R, strategy=strategy)
    maps = torch.cat([call(part) for part in images.split(BATCH)])
    assert (maps.shape, maps.dtype, maps.stride()) == (plain.shape, plain.dtype, plain.stride())
    # More than nothing: a graph that was left alone would pass any bound.
    assert 0.001 < (maps - plain).abs().mean().item() <= BOUNDS[strategy]


@torch.no_grad()
def test_every_layer_reduces_and_the_head_gets_whole_tokens_once(model: Any, images: Tensor) -> None:
    explanation = tofu_fx.explain(model, images[:2], options={"r": R, "strategy": "mlerp"})
    assert (explanation.matched, explanation.declined) == (LAYERS, 0)
    assert [(row.tokens_in, row.tokens_out) for row in explanation.sites] == [
        (TOKENS - R * depth, TOKENS - R * (depth + 1)) for depth in range(LAYERS)
    ]
    code = explanation.after
    assert code.count("torch.ops.tofu.fuse_tokens.default(") == LAYERS
    assert code.count("torch.ops.tofu.restore_tokens.default(") == LAYERS
    # Restored at the last residual add: the final norm and what follows see every token.
    restored = code.rindex("torch.ops.tofu.restore_tokens.default(")
    assert code.index("torch.ops.aten.layer_norm.default(", restored) < code.index("conv_transpose2d", restored)
    assert len(explanation.barriers) == 1
    assert "split into 16 x 16" in explanation.barriers[0]


@torch.no_grad()
def test_nothing_to_reduce_gives_the_bits_of_the_inner_backend(model: Any, images: Tensor) -> None:
    torch._dynamo.reset()
    expected = torch.compile(model, backend="eager")(images[:2])
    assert same_bits(compiled(model, ratio=0)(images[:2]), expected)


@torch.no_grad()
def test_literals_recomputed_keep_the_bits_and_shuffled_tokens_the_map(model: Any, images: Tensor) -> None:
    found = study(model, images[:2], variants={})
    assert same_bits(found.outputs["polymorphic"], found.outputs["plain"])
    assert len(found.sites("permute")) == LAYERS
    # Rounding of 12 trained layers; a table that was left behind would show as 0.1.
    assert relative_error(found.outputs["permute"], found.outputs["plain"]) < 1e-4


@torch.no_grad()
def test_map_equals_that_of_reductions_written_by_hand(model: Any, images: Tensor) -> None:
    # In float64, so that only the choice of tokens, which the op makes in float32, could distinguish the two.
    wide, x = example("saliency_model").load_model().double(), images[:1].double()
    maps = compiled(wide, r=R, strategy="mlerp")(x)
    torch.testing.assert_close(maps, reduced_by_hand(wide, x, R, "mlerp"), rtol=0, atol=1e-6)


@torch.no_grad()
def test_every_token_has_a_group(model: Any, images: Tensor) -> None:
    (groups,) = tofu_fx.token_groups(model, images[:2], options={"r": R, "strategy": "mlerp"})
    assert groups.shape == (2, TOKENS)
    for row in groups:
        assert sorted(row.unique().tolist()) == list(range(TOKENS - R * LAYERS))
        assert (row == row[0]).sum() == 1  # the class token stays alone


def test_missing_files_are_named_with_the_option_that_helps(tmp_path: Path) -> None:
    files = example("saliency_model")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors.*--model"):
        files.load_model(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent\.tar.*--photos"):
        files.load_photos(tmp_path / "absent.tar")


def test_positions_are_resampled_around_the_class_token() -> None:
    files = example("saliency_model")
    table = torch.cat(
        [torch.full((1, 1, 3), 9.0), torch.linspace(0, 1, 37).repeat(37)[None, :, None].expand(1, -1, 3)], 1
    )
    small = files.resample_positions(table, 16)
    assert small.shape == (1, 257, 3)
    assert torch.equal(small[:, 0], table[:, 0])
    rows = small[0, 1:, 0].view(16, 16)
    torch.testing.assert_close(rows, rows[:1].expand(16, 16))
    assert (rows[0].diff() > 0).all()


def test_switched_plan_prunes_first() -> None:
    row = tofu_fx.Plan.load({"sites": [_row(f"blocks.{i}.attn") for i in range(5)]})
    switched = example("saliency").switched_plan(row, 2)
    assert [site.strategy for site in switched.sites] == ["prune", "prune", "mlerp", "mlerp", "mlerp"]
    assert [site.id for site in switched.sites] == [site.id for site in row.sites]


def test_picture_and_table_are_made(tmp_path: Path) -> None:
    saliency = example("saliency")
    photos, maps = torch.rand(2, 3, 224, 224), torch.rand(2, 1, 224, 224)
    path = tmp_path / "picture.png"
    saliency.draw(path, photos, maps, maps * 0.5, torch.arange(256).expand(2, -1) // 3, "heading", ("a", "b", "c", "d"))
    assert path.read_bytes().startswith(b"\x89PNG")
    plain = saliency.Variant("plain", "plain", None, torch.zeros(2, 1, 4, 4))
    tofu = saliency.Variant("mlerp", "mlerp", {}, torch.tensor([0.1, 0.3]).view(2, 1, 1, 1).expand(2, 1, 4, 4))
    sites = [tofu_fx.report.explain.SiteRow(0, "a", "a", 6, 257, 113, "mlerp", 144, "")]
    graph = tofu_fx.report.explain.GraphReport("", sites, [], "", "", 100, 70, {}, {}, [], "reduced")
    table = saliency.make_table([plain, tofu], tofu_fx.Explanation([graph]), "title")
    assert [list(column.cells)[1] for column in table.columns] == ["mlerp", "0.2000", "0.3000", "113", "70%"]


def _row(name: str) -> dict[str, Any]:
    return {"id": name, "module_path": name, "tokens": 257, "heads": 6, "dim": 384, "strategy": "mean", "r": 12}


def reduced_by_hand(model: Any, images: Tensor, r: int, strategy: str) -> Tensor:
    """The saliency model with the reductions written into its blocks, from the formulas of `tests.oracle.operators`."""
    backbone, steps = model.backbone, []
    x = backbone._pos_embed(backbone.patch_embed(images))
    size = torch.ones(x.shape[:2])
    for block in backbone.blocks:
        branch, keys = _attention(block.attn, block.norm1(x), size)
        before = x + block.ls1(branch)
        x, size, assignment, _ = reference_fuse(before, keys, size, r, strategy, num_prefix=1)
        steps.append((assignment, before, x))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    for assignment, before, merged in reversed(steps):
        x = reference_restore(x, assignment, before, merged)
    features = backbone.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (16, 16))
    saliency = model.decoder(features).sigmoid()
    return nn.functional.interpolate(saliency, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _attention(attention: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Proportional self-attention, and its keys `[B, N, D]` averaged over the heads."""
    q, k, v = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5 + size.log()[:, None, None]
    return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), k.mean(1)
