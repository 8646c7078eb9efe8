"""Linearity: chord over path, against closed forms, and on the branch that is found in a graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import ZOO
from tofu_fx.calibration.batches import Batch
from tofu_fx.calibration.linearity import STEPS, fractional_linearity, site_linearity, spread
from tofu_fx.calibration.trial import Trial
from tofu_fx.plan.options import Options

GENERATOR = torch.Generator().manual_seed(0)
X0, X1 = (torch.randn(3, 7, 5, generator=GENERATOR) for _ in range(2))


def test_affine_branch_has_linearity_one() -> None:
    weight = torch.randn(5, 4, generator=GENERATOR)
    found = fractional_linearity(lambda x: x @ weight + 3.0, X0, X1)
    # Ten differences of float32 products of five terms against one: relative rounding of a few 1e-7.
    assert torch.allclose(found, torch.ones(3, 7), atol=2e-6)
    assert found.max() <= 1


def test_half_circle_is_the_closed_form() -> None:
    # Equal angles on a half circle: chord 2, path N chords of 2 sin(pi / 2N).
    def circle(x: Tensor) -> Tensor:
        return torch.cat([torch.cos(math.pi * x), torch.sin(math.pi * x)], -1)

    for steps in (1, 2, STEPS, 100):
        found = fractional_linearity(circle, torch.zeros(1, 2, 1), torch.ones(1, 2, 1), steps)
        expected = 1 / (steps * math.sin(math.pi / (2 * steps)))
        assert found[0].tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_there_and_back_again_is_zero() -> None:
    found = fractional_linearity(lambda x: (x - 0.5) ** 2, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), 10)
    assert found.item() == pytest.approx(0.0, abs=1e-7)


def test_parabola_beyond_its_vertex_is_the_closed_form() -> None:
    # x^2 from -1 to 2: chord 3, path 1 + 4; with 9 steps one of them ends at the vertex.
    found = fractional_linearity(lambda x: x**2, torch.full((1, 1, 1), -1.0), torch.full((1, 1, 1), 2.0), 9)
    assert found.item() == pytest.approx(3 / 5, rel=1e-5)


def test_constant_branch_says_nothing() -> None:
    found = fractional_linearity(lambda x: torch.zeros_like(x), X0, X1)
    assert found.isnan().all()
    assert spread([found]) is None


class _Straight(nn.Module):
    """Blocks whose MLP is one linear layer, or bends."""

    def __init__(self, bend: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))
        self.branch = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU() if bend else nn.Identity(), nn.Linear(32, 16)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, branch in zip(self.attention, self.branch, strict=True):
            x = x + attention(x, x, x)[0]
            x = x + branch(x)
        return x.mean(1)


def _scores(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor] | None]:
    with Trial(model.eval(), Options(unread="keep")) as trial:
        batch = Batch((x,))
        trial.record(batch)
        order = torch.arange(len(x)).roll(1)
        found = []
        for entry in trial.rehearsed():
            recorded = trial.recorded(entry.site.id)
            assert recorded is not None
            rehearsal, entry, inputs, start = recorded
            found.append(site_linearity(rehearsal, entry, inputs, start, order))
        return found


@pytest.mark.parametrize("bend", [False, True])
def test_branch_behind_a_site_is_found_in_the_graph(bend: bool) -> None:
    x = torch.randn(4, 12, 16, generator=GENERATOR)
    scores = _scores(_Straight(bend), x)
    assert len(scores) == 2
    for score in scores:
        assert score is not None
        between, pairs = score
        assert between.shape == (4, 12)
        assert pairs.shape == (4 * 2,)  # a quarter of the 6 tokens that could go, of each sample
        if bend:
            assert between.mean() < 0.99
        else:
            assert torch.allclose(between, torch.ones(4, 12), atol=1e-5)
            assert torch.allclose(pairs, torch.ones(8), atol=1e-5)


def test_score_is_that_of_the_model_computed_by_hand() -> None:
    model, x = _Straight(True).eval(), torch.randn(4, 12, 16, generator=GENERATOR)
    first: Any = model.attention[0]
    with torch.no_grad():
        stream = x + first(x, x, x)[0]
        expected = fractional_linearity(model.branch[0], stream, stream.roll(1, 0))
        score = _scores(model, x)[0]
    assert score is not None
    assert torch.allclose(score[0], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_avg_of_patches", "deit_distilled"])
def test_every_block_of_a_real_model_has_a_score(name: str) -> None:
    entry = ZOO[name]
    scores = _scores(entry.model(), entry.batch())
    assert len(scores) == 3
    assert all(score is not None and 0 < score[0].nanmean() <= 1 for score in scores)
