"""Calibration of models whose tokens are reduced in the branches of their blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tofu_fx
from tests.harness import randomise
from tests.zoo.diffusion_catalogue import Called, unet
from tofu_fx.calibration.uniform import uniform_plans
from tofu_fx.errors import CalibrationError, TofuError


@pytest.fixture(scope="module")
def denoiser() -> tuple[nn.Module, list[tuple[Any, ...]]]:
    """A small UNet of two image sizes, and batches of several timesteps."""
    generator = torch.Generator().manual_seed(5)
    batches = [
        (torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([t, 1000 - t]), torch.randn(2, 7, 24))
        for t in (50, 400)
    ]
    return randomise(Called(unet(mid_block_type=None))), batches


@pytest.fixture(scope="module")
def plan(denoiser: tuple[nn.Module, list[tuple[Any, ...]]]) -> tofu_fx.Plan:
    model, batches = denoiser
    return tofu_fx.calibrate(model, batches, flops=0.95, batch_size=2, inner_backend="eager", progress=False)


def test_plan_says_where_each_site_is_reduced(plan: tofu_fx.Plan) -> None:
    assert len(plan.sites) == 3, "the attentions over the largest image"
    for row in plan.sites:
        assert (row.placement, row.branches, row.cell, row.grid) == ("branch", ["attention"], 2, [16, 16])
        assert row.linearity is not None
    assert plan.calibration is not None
    assert plan.calibration.measured.flops is not None
    assert plan.calibration.measured.flops <= 0.95
    assert any(row.r for row in plan.sites)


def test_plan_is_no_worse_than_the_schedules_that_it_is_compared_with(plan: tofu_fx.Plan) -> None:
    assert plan.calibration is not None
    error = plan.calibration.measured.error
    assert error is not None
    assert all(error <= other.error for other in plan.calibration.compared.values() if other.error is not None)


def test_schedules_that_it_is_compared_with_are_those_of_branches(plan: tofu_fx.Plan) -> None:
    """The best one that needs no calibration is the default: compared by hidden states, the same share everywhere."""
    assert plan.calibration is not None
    assert {row.match for row in plan.sites if row.r} <= {"features", "keys", "heads", "queries_keys", "fisher"}
    assert "uniform mean" in plan.calibration.compared


def test_uniform_schedule_of_branches_is_the_default_ratio_at_its_cost(
    denoiser: tuple[nn.Module, list[tuple[Any, ...]]],
) -> None:
    model, batches = denoiser
    explained = tofu_fx.explain(model, *batches[0], options={"ratio": 0.4, "profitable_only": False})
    share = explained.flops_after / explained.flops_before
    found = uniform_plans(model, batches, [share + 1e-6])
    rows = found["uniform mean", share + 1e-6].sites
    assert [(row.strategy, row.match, row.r) for row in rows] == [
        (row.strategy, row.match, row.r) for row in explained.plan.sites
    ]


def test_saved_plan_gives_the_error_that_was_measured(
    plan: tofu_fx.Plan, denoiser: tuple[nn.Module, list[tuple[Any, ...]]], tmp_path: Any
) -> None:
    model, batches = denoiser
    plan.save(tmp_path / "plan.json")
    assert tofu_fx.Plan.load(tmp_path / "plan.json") == plan
    options = {"plan": str(tmp_path / "plan.json"), "inner_backend": "eager", "on_error": "raise"}
    torch._dynamo.reset()
    call, errors = torch.compile(model, backend="tofu", options=options), []
    with torch.no_grad():
        for batch in batches:
            wanted = model(*batch)
            errors.extend(_relative(found, plain) for found, plain in zip(call(*batch), wanted, strict=True))
    assert plan.calibration is not None
    # The same float32 operations in other batches; the metric is the mean over samples.
    assert sum(errors) / len(errors) == pytest.approx(plan.calibration.measured.error, rel=1e-3)


def _relative(found: Tensor, plain: Tensor) -> float:
    return float((found - plain).norm() / plain.norm())


def test_placement_can_be_told(denoiser: tuple[nn.Module, list[tuple[Any, ...]]]) -> None:
    _, batches = denoiser
    model = randomise(Called(unet(channels=(32,), mid_block_type=None)))
    options = {"placement": "stream"}
    plan = tofu_fx.calibrate(
        model, batches, flops=0.97, batch_size=2, inner_backend="eager", options=options, progress=False
    )
    assert {row.placement for row in plan.sites} == {"stream"}


def test_what_calibration_decides_is_no_option_of_it(denoiser: tuple[nn.Module, list[tuple[Any, ...]]]) -> None:
    model, batches = denoiser
    with pytest.raises(CalibrationError, match="decides on 'ratio' itself"):
        tofu_fx.calibrate(model, batches, options={"ratio": 0.5}, progress=False)


def test_pipeline_is_refused_and_the_module_to_take_is_named() -> None:
    components = {"vae": nn.Linear(2, 2), "unet": nn.Linear(8, 8), "scheduler": object()}
    pipeline = SimpleNamespace(components=components, __call__=lambda x: x)
    for refused in (lambda: tofu_fx.explain(pipeline, 1), lambda: tofu_fx.calibrate(pipeline, [torch.ones(1)])):
        with pytest.raises(TofuError, match=r"pipe\.unet = torch\.compile\(pipe\.unet, backend='tofu'\)"):
            refused()
