"""Tokens compared by a sketch of their features: what is folded, what that costs, and where it is used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch

import tofu_fx
from tests.harness import compiled, prove, same_bits
from tofu_fx.calibration.batches import Batch
from tofu_fx.calibration.trial import Trial
from tofu_fx.plan import sketch
from tofu_fx.plan.options import Options

ops, aten = torch.ops.tofu, torch.ops.aten
WIDE, NARROW = 384, 96
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def vit(dim: int) -> torch.nn.Module:
    """A ViT of two blocks on 8 x 8 patches."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": dim, "depth": 2, "num_heads": 3}
    return timm.models.VisionTransformer(**sizes, num_classes=10).eval()


@pytest.mark.parametrize(
    ("channels", "fold"),
    [(1, 1), (96, 1), (128, 1), (129, 1), (192, 2), (320, 4), (384, 3), (640, 5), (1152, 9), (1280, 10), (3072, 24)],
)
def test_channels_are_folded_to_between_half_of_the_width_and_all_of_it(channels: int, fold: int) -> None:
    assert sketch.folds(channels) == fold
    assert channels % fold == 0
    if fold > 1:
        assert sketch.WIDTH // 2 <= channels // fold <= sketch.WIDTH


def test_a_prime_width_is_compared_whole() -> None:
    assert sketch.folds(1021) == 1  # its only other divisor would leave a single number


@torch.no_grad()
def test_a_sketch_is_sums_of_neighbouring_features_with_alternating_signs() -> None:
    with Trial(vit(WIDE), Options(placement="branch", unread="keep")) as trial:
        batch = Batch((IMAGES,), {})
        trial.plain(batch)
        trial.record(batch)
        assert len(trial.sites) == 2
        for site in trial.sites:
            recorded = trial.recorded(site.id)
            assert recorded is not None
            rehearsal, entry, inputs, start = recorded
            _, values = rehearsal.run(inputs, {}, start, list(entry.metrics.values()))
            features, found = (values[entry.metrics[kind]] for kind in ("features", "sketch"))
            signs = torch.tensor([1.0, -1.0, 1.0])
            expected = (features.unflatten(2, (-1, 3)) * signs).sum(-1)
            assert found.shape == (2, 65, 128)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_similarities_are_kept_as_well_as_the_module_says() -> None:
    random = torch.Generator().manual_seed(1)
    first = torch.randn(4000, 1152, generator=random)
    for share in (0.0, 0.3, 1.0):  # of noise: pairs that are equal, alike, and as good as independent
        second = first + share * torch.randn(4000, 1152, generator=random)
        true = torch.cosine_similarity(first, second, dim=1)
        signs = torch.tensor([1.0, -1.0] * 5)[:9]
        small = [(t.unflatten(1, (-1, 9)) * signs).sum(-1) for t in (first, second)]
        deviation = (torch.cosine_similarity(small[0], small[1], dim=1) - true).std()
        assert deviation <= 1.2 * float((1 - true**2).mean()) / math.sqrt(sketch.WIDTH) + 1e-6


def test_branches_of_wide_models_take_it_and_narrow_ones_and_streams_do_not() -> None:
    def kinds(dim: int, placement: str) -> set[str]:
        plan = tofu_fx.explain(vit(dim), IMAGES, options={"placement": placement, "profitable_only": False}).plan
        return {row.match for row in plan.sites}

    assert kinds(WIDE, "branch") == {"sketch"}
    assert kinds(NARROW, "branch") == {"features"}
    assert kinds(WIDE, "stream") == {"keys"}


@torch.no_grad()
def test_it_can_be_asked_for_on_a_stream_and_changes_nothing_where_nothing_is_folded() -> None:
    narrow, wide = vit(NARROW), vit(WIDE)
    assert same_bits(compiled(narrow, r=9, match="sketch")(IMAGES), compiled(narrow, r=9, match="features")(IMAGES))
    assert not same_bits(compiled(wide, r=9, match="sketch")(IMAGES), compiled(wide, r=9, match="features")(IMAGES))


@pytest.mark.parametrize("placement", ["stream", "branch"])
def test_all_proofs_hold(placement: str) -> None:
    proofs = prove(vit(WIDE), IMAGES, r=9, options={"placement": placement, "match": "sketch"}).check()
    assert len(proofs.matched) == 2


def test_it_is_no_candidate_where_nothing_is_folded_and_on_a_stream() -> None:
    for dim, placement in ((NARROW, "branch"), (WIDE, "stream")):
        with Trial(vit(dim), Options(placement=placement)) as trial:  # type: ignore[arg-type]
            trial.plain(Batch((IMAGES,), {}))
            assert all("sketch" not in entry.metrics for entry in trial.rehearsed())
