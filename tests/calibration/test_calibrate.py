"""`tofu_fx.calibrate` on small models: what comes out is measured, true, and leaves the model as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tofu_fx
from tests.harness import compiled, randomise, relative_error, same_bits, tensors
from tests.zoo import ZOO
from tofu_fx import Plan
from tofu_fx.calibration.uniform import uniform_plans

ENTRY = ZOO["vit_avg_of_patches"]
QUICK: dict[str, Any] = {"inner_backend": "eager", "progress": False}


def images(samples: int = 6) -> Tensor:
    shape = ENTRY.batch().shape[1:]
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(1))


def measured_error(model: Any, x: Tensor, plan: Plan) -> float:
    """The mean relative L2 error of each sample, written once more."""
    with torch.no_grad():
        plain, reduced = model(x), compiled(model, plan=plan)(x)
    off = (reduced - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    return float(off.mean())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomise(ENTRY.model())


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return tofu_fx.calibrate(model, images(), flops=0.75, metric="relative_l2", **QUICK)


def test_plan_keeps_to_its_operations(model: nn.Module, plan: Plan) -> None:
    explained = tofu_fx.explain(model, images(4), options={"plan": plan})
    share = explained.flops_after / explained.flops_before
    assert share <= 0.75
    assert share > 0.65  # and does not remove far more than it may
    assert plan.calibration is not None
    assert plan.calibration.measured.flops == pytest.approx(share, abs=1e-4)


def test_measured_error_is_that_of_the_compiled_model(model: nn.Module, plan: Plan) -> None:
    assert plan.calibration is not None
    assert plan.calibration.measured.error == pytest.approx(measured_error(model, images(), plan), rel=1e-4)


def test_compared_schedules_are_measured_at_no_more_operations(model: nn.Module, plan: Plan) -> None:
    assert plan.calibration is not None
    compared = plan.calibration.compared
    assert set(compared) == {"depth rule", "uniform mlerp", "uniform mean", "uniform prune"}
    plans = uniform_plans(model, images(4), [0.75])
    for name, figures in compared.items():
        assert figures.flops is not None
        assert 0.6 < figures.flops <= 0.75
        assert figures.error == pytest.approx(measured_error(model, images(), plans[name, 0.75]), rel=1e-4)
    assert plan.calibration.measured.error is not None
    assert plan.calibration.measured.error <= min(figures.error or 0 for figures in compared.values())


def test_everything_measured_is_in_the_file(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert Plan.load(tmp_path / "plan.json") == plan
    assert content["calibration"]["libraries"]["torch"] == torch.__version__
    assert content["calibration"]["samples"] == 6
    for row in content["sites"]:
        assert 0 < row["linearity"]["mean"] <= 1
        assert 0 < row["pair_linearity"]["mean"] <= 1
        assert row["reason"]
    assert content["fingerprint"]


def test_model_is_left_as_it_was(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.blocks[1].eval()  # type: ignore[union-attr, operator, index]
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        with pytest.warns(tofu_fx.TofuWarning, match="training mode"):
            tofu_fx.calibrate(model, images(2), flops=0.8, **QUICK)
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert torch.is_grad_enabled()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.eval()


def test_without_a_target_the_default_ratio_is_spread(model: nn.Module) -> None:
    found = tofu_fx.calibrate(model, images(4), **QUICK)
    default = tofu_fx.explain(model, images(4), options={"ratio": 0.5})
    assert found.calibration is not None
    assert found.calibration.target == "none"
    share = default.flops_after / default.flops_before
    assert found.calibration.measured.flops is not None
    assert share - 0.08 < found.calibration.measured.flops <= share + 1e-4


@pytest.mark.true_speed
def test_error_target_is_met_by_the_fastest_plan_found(model: nn.Module) -> None:
    found = tofu_fx.calibrate(model, images(4), error=0.15, metric="relative_l2", **QUICK)
    assert sum(row.r for row in found.sites) > 0
    assert measured_error(model, images(4), found) <= 0.15 * (1 + 1e-4)
    assert found.calibration is not None
    _check_speed_is_predicted_or_excused(found)


def _check_speed_is_predicted_or_excused(plan: Plan) -> None:
    # So small a model may take as long with fewer tokens; then that is said and no speed is predicted.
    assert plan.calibration is not None
    excused = any("takes as long with fewer tokens" in note for note in plan.calibration.notes)
    assert excused == (plan.calibration.predicted.speedup is None)
    assert plan.calibration.measured.speedup is not None


def test_error_and_speed_are_predicted_and_measured(plan: Plan) -> None:
    _check_speed_is_predicted_or_excused(plan)
    assert plan.calibration is not None
    assert plan.calibration.predicted.error == pytest.approx(plan.calibration.measured.error, rel=0.5)


def test_class_scores_are_compared_by_divergence(model: nn.Module) -> None:
    found = tofu_fx.calibrate(model, images(4), flops=0.8, **QUICK)
    assert found.calibration is not None
    assert found.calibration.metric == "kl"
    with torch.no_grad():
        plain = model(images(4)).double().log_softmax(-1)
        reduced = compiled(model, plan=found)(images(4)).double().log_softmax(-1)
    divergence = (plain.exp() * (plain - reduced)).sum(-1).mean().item()
    assert found.calibration.measured.error == pytest.approx(divergence, rel=1e-3)


def test_users_metric_decides_and_its_single_number_counts_for_each_sample(model: nn.Module) -> None:
    calls = []

    def first_logit(outputs: Tensor, plain: Tensor) -> float:
        calls.append(outputs.shape)
        return float((outputs[:, 0] - plain[:, 0]).abs().mean())

    found = tofu_fx.calibrate(model, [images(6)[:4], images(6)[4:]], flops=0.8, metric=first_logit, **QUICK)
    assert calls
    assert found.calibration is not None
    assert found.calibration.metric == "first_logit"
    with torch.no_grad():
        error = first_logit(compiled(model, plan=found)(images(6)), model(images(6)))
    assert found.calibration.measured.error == pytest.approx(error, rel=1e-3)


def test_linearity_policy_prunes_below_its_threshold_and_merges_above(model: nn.Module) -> None:
    found = tofu_fx.calibrate(model, images(4), flops=0.7, policy="linearity", **QUICK)
    assert found.calibration is not None
    assert found.calibration.policy == "linearity"
    threshold = found.calibration.threshold
    assert threshold is not None
    for row in found.sites:
        assert row.linearity is not None
        if row.r and "linearity" in row.reason:
            assert (row.strategy == "prune") == (row.linearity.mean < threshold)


@pytest.mark.nightly("two calibrations; how labels are read is held by test_rehearsal.py for every change")
def test_loader_with_labels_is_as_good_as_its_images(model: nn.Module) -> None:
    dataset = torch.utils.data.TensorDataset(images(6), torch.arange(6))
    loader = torch.utils.data.DataLoader(dataset, batch_size=3)
    a = tofu_fx.calibrate(model, loader, flops=0.8, **QUICK)
    b = tofu_fx.calibrate(model, [images(6)[:3], images(6)[3:]], flops=0.8, **QUICK)
    assert a.sites == b.sites


def test_plan_serves_every_batch_size_and_another_image_size_as_shares(model: nn.Module, plan: Plan) -> None:
    with torch.no_grad():
        together = compiled(model, plan=plan)(images(5))
        alone = torch.cat([compiled(model, plan=plan)(image[None]) for image in images(5)])
    assert relative_error(alone, together) < 1e-5

    dims = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10, "global_pool": "avg"}
    larger = timm.create_model("vit_base_patch16_224", img_size=128, **dims).eval()
    x = torch.randn(2, 3, 128, 128)
    explained = tofu_fx.explain(larger, x, options={"plan": plan})
    with torch.no_grad(), pytest.warns(tofu_fx.TofuWarning, match="shares of the tokens"):
        assert compiled(larger, plan=plan)(x).isfinite().all()
    kept = [row.tokens_out / row.tokens_in for row in explained.sites]
    left, shares = plan.sites[0].tokens, []
    for row in plan.sites:
        shares.append((left - row.r) / left)
        left -= row.r
    assert (explained.tokens_before, len(kept)) == (65, 3)
    assert kept == pytest.approx(shares, abs=0.05)  # 37 tokens are coarser than 65


def test_stream_too_short_for_all_layers_gets_a_plan() -> None:
    # 4 patches: the third of six sites may get one token, so it and those after it can never reduce any.
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=6, embed_dim=48, num_heads=3, num_classes=10, global_pool="avg"
    )
    randomise(model)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = tofu_fx.calibrate(model, x, flops=0.9, **QUICK)
    assert [row.id for row in found.sites] == [f"blocks.{i}.attn" for i in range(6)]
    assert "fewer than two" in found.sites[-1].reason
    with torch.no_grad():
        assert compiled(model, plan=found)(x).isfinite().all()


def test_same_seed_decides_alike_and_a_compiled_model_stands_for_the_model_inside(model: nn.Module, plan: Plan) -> None:
    wrapped = torch.compile(model, backend="eager")
    found = tofu_fx.calibrate(wrapped, images(), flops=0.75, metric="relative_l2", **QUICK)
    assert found.sites == plan.sites


def test_more_batch_sizes_than_dynamo_would_compile_are_all_measured(model: nn.Module) -> None:
    batches = [images(n) for n in range(1, 4)]
    # Its limit is 8 by default; beyond that it would run plain, and measure nothing.
    with torch._dynamo.config.patch(recompile_limit=1):
        found = tofu_fx.calibrate(model, batches, flops=0.8, metric="relative_l2", **QUICK)
    errors = [measured_error(model, batch, found) * len(batch) for batch in batches]
    assert found.calibration is not None
    assert found.calibration.measured.error == pytest.approx(sum(errors) / 6, rel=1e-3)


@pytest.mark.parametrize(
    "name", ["hf_beit", pytest.param("hf_clip", marks=pytest.mark.nightly("7 s; it is filled as BEiT is"))]
)
def test_model_that_fills_tensors_in_place_is_measured_as_compiled(name: str) -> None:
    entry = ZOO[name]
    model, x = entry.model(), entry.batch(4)
    found = tofu_fx.calibrate(model, x, flops=0.85, metric=_first_tensor, **QUICK)
    with torch.no_grad():
        expected = _first_tensor(compiled(model, plan=found)(x), model(x))
    assert found.calibration is not None
    assert found.calibration.measured.error == pytest.approx(expected, rel=1e-3)
    explained = tofu_fx.explain(model, x, options={"plan": found})
    assert found.calibration.measured.flops == pytest.approx(explained.flops_after / explained.flops_before, abs=1e-4)


def _first_tensor(outputs: Any, plain: Any) -> float:
    a, b = tensors(outputs)[0], tensors(plain)[0]
    return float(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).mean())


def test_operations_of_graphs_without_attention_count(model: nn.Module) -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.model = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1), nn.Conv2d(64, 3, 3, 1, 1)), model

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            torch._dynamo.graph_break()
            return self.model(y)

    whole, x = Stem().eval(), images(4)
    found = tofu_fx.calibrate(whole, x, flops=0.97, metric="relative_l2", **QUICK)
    explained = tofu_fx.explain(whole, x, options={"plan": found})
    assert found.calibration is not None
    assert found.calibration.measured.flops == pytest.approx(explained.flops_after / explained.flops_before, abs=1e-4)
    assert explained.flops_after <= 0.97 * explained.flops_before
    for plan in uniform_plans(whole, x, [0.97]).values():
        explained = tofu_fx.explain(whole, x, options={"plan": plan})
        assert explained.flops_after <= 0.97 * explained.flops_before


def test_buffers_that_the_model_changes_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = randomise(ENTRY.model())
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)  # type: ignore[operator, union-attr]
            return self.model(x)

    counting = Counting().eval()
    tofu_fx.calibrate(counting, images(2), flops=0.8, **QUICK)
    assert counting.calls.item() == 0  # type: ignore[operator, union-attr]


def test_interrupt_leaves_nothing_half_written(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from tofu_fx.calibration.tune import Tuner

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "measure", interrupted)
    model.train()
    with pytest.raises(KeyboardInterrupt), pytest.warns(tofu_fx.TofuWarning):
        tofu_fx.calibrate(model, images(2), flops=0.8, **QUICK)
    assert model.training
    assert torch.is_grad_enabled()
    model.eval()


def test_saving_over_a_plan_replaces_it_as_a_whole(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_text()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Plan(sites=[]).save(path)
    assert path.read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]


def test_site_ids_survive_a_new_process(model: nn.Module, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    torch.save((model, images(2)), tmp_path / "model.pt")  # the models of the tests take long to import
    code = (
        f"import torch, tofu_fx\nmodel, x = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"found = tofu_fx.explain(model, x, options={{'plan': {str(tmp_path / 'plan.json')!r}}})\n"
        "print([(row.id, row.r) for row in found.plan.sites])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([(row.id, row.r) for row in plan.sites])


def test_model_of_two_graphs_gets_one_plan() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = randomise(ENTRY.model(), 1), randomise(ENTRY.model(), 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            torch._dynamo.graph_break()
            return y + self.second(x)

    model, x = Broken().eval(), images(4)
    found = tofu_fx.calibrate(model, x, flops=0.8, metric="relative_l2", **QUICK)
    assert [row.graph for row in found.sites] == [0, 0, 0, 1, 1, 1]
    assert found.calibration is not None
    assert sum(row.r for row in found.sites) > 0
    assert found.calibration.measured.error == pytest.approx(measured_error(model, x, found), rel=1e-3)


def test_plan_found_for_the_default_is_no_worse_than_plain_bits_when_it_takes_nothing(model: nn.Module) -> None:
    nothing = Plan(sites=[row.model_copy(update={"r": 0}) for row in tofu_fx.explain(model, images(2)).plan.sites])
    with torch.no_grad(), pytest.warns(tofu_fx.TofuWarning, match="take no token"):
        assert same_bits(compiled(model, plan=nothing)(images(2)), model(images(2)))
