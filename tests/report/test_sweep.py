"""`tofu_fx.sweep`: every schedule at every budget, measured, and what is made of the rows."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console

import tofu_fx
from tofu_fx import CalibrationError, Sweep, TofuError
from tofu_fx.calibration.timing import room_for_variants
from tofu_fx.calibration.uniform import UNIFORM
from tofu_fx.report import swept as swept_module

BUDGETS = (0.75, 0.9)


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=64, embed_dim=48, num_heads=3, num_classes=5, global_pool="avg"
    )
    return model.eval()


def images(samples: int = 4) -> torch.Tensor:
    return torch.randn(samples, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def run(**more: Any) -> Sweep:
    """A quick one: few samples, nothing compiled by inductor."""
    arguments = {"inner_backend": "eager", "progress": False, "calibrated": False, "flops": BUDGETS, **more}
    return tofu_fx.sweep(vit(), images(), **arguments)


@pytest.fixture(scope="module")
def swept() -> Sweep:
    # Three batches, the last of which is shorter.
    inputs = [images(2), images(2) + 1, images(1)]
    return tofu_fx.sweep(vit(), inputs, flops=BUDGETS, inner_backend="eager", progress=False)


@pytest.fixture
def one_schedule(monkeypatch: pytest.MonkeyPatch) -> str:
    """Leaves one of the uniform schedules: what is asked of a sweep then does not depend on how many there are."""
    for name in [name for name in UNIFORM if name != "uniform mean"]:
        monkeypatch.delitem(UNIFORM, name)  # type: ignore[arg-type]
    return "uniform mean"


def test_every_schedule_has_a_row_for_every_budget_after_plain(swept: Sweep) -> None:
    assert swept.unreachable == []
    schedules = ["calibrated", *UNIFORM]
    assert [(row.schedule, row.budget) for row in swept.rows] == [
        ("plain", None), *((name, budget) for name in schedules for budget in (0.9, 0.75)),
    ]  # fmt: skip
    assert (swept.batch, swept.samples, swept.inner_backend, swept.measure) == (2, 4, "eager", "kl")


def test_rows_are_within_their_budget_and_plans_can_be_used(swept: Sweep) -> None:
    plain, *others = swept.rows
    assert (plain.flops, plain.speedup, plain.error, plain.plan) == (1.0, 1.0, 0.0, None)
    for row in others:
        assert row.budget is not None
        assert row.plan is not None
        # The even schedules come as near as whole tokens let them; the operations counted are the graph's own.
        assert row.budget - 0.1 < row.flops <= row.budget + 1e-9
        assert row.speedup > 0
        assert row.seconds > 0
        assert row.score is None
    last = others[-1]
    explained = tofu_fx.explain(vit(), images(2), options={"plan": last.plan})
    assert explained.flops_after / explained.flops_before == pytest.approx(last.flops)


def test_every_variant_ran_reduced_although_one_forward_was_compiled_more_often_than_dynamo_allows(
    swept: Sweep,
) -> None:
    assert len(swept.rows) > torch._dynamo.config.recompile_limit
    assert all(row.error is not None and row.error > 1e-12 for row in swept.rows[1:])


def test_errors_are_those_of_the_plans(swept: Sweep) -> None:
    (row,) = (row for row in swept.rows if (row.schedule, row.budget) == ("uniform prune", 0.75))
    model, found = vit(), []
    with torch.no_grad():
        fast = torch.compile(model, backend="tofu", options={"plan": row.plan, "inner_backend": "eager"})
        for batch in (images(2), images(2) + 1):
            plain, reduced = model(batch).log_softmax(-1), fast(batch).log_softmax(-1)
            found.append((plain.exp() * (plain - reduced)).sum(-1).mean())
    assert row.error == pytest.approx(float(sum(found)) / 2, rel=1e-3)


def test_calibrated_rows_carry_how_they_were_made(swept: Sweep) -> None:
    found = [row for row in swept.rows if row.schedule == "calibrated"]
    assert [row.plan.calibration.value for row in found if row.plan and row.plan.calibration] == [0.9, 0.75]


def test_csv_reads_back(swept: Sweep, tmp_path: Path) -> None:
    swept.save_csv(tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["schedule"] for row in read] == [row.schedule for row in swept.rows]
    for line, row in zip(read, swept.rows, strict=True):
        assert line["budget"] == ("" if row.budget is None else str(row.budget))
        assert line["score"] == ""
        for name in ("flops", "speedup", "seconds", "error"):
            assert float(line[name]) == getattr(row, name)


def test_table_shows_every_row(swept: Sweep) -> None:
    file = io.StringIO()
    Console(width=80, file=file).print(swept.table())
    lines = file.getvalue().splitlines()
    (header,) = (line for line in lines if "schedule" in line)
    assert header.split() == ["schedule", "budget", "FLOPs", "speed-up", "ms", "a", "call", "error"]
    (line,) = (line for line in lines if "uniform mean" in line and " 0.75 " in line)
    row = next(row for row in swept.rows if (row.schedule, row.budget) == ("uniform mean", 0.75))
    assert line.split()[2:] == [
        "0.75", f"{row.flops:.1%}", f"{row.speedup:.2f}x", f"{1e3 * row.seconds:.1f}", f"{row.error:.4g}",
    ]  # fmt: skip
    assert "kl, mean over 4 samples" in file.getvalue()


def test_picture_has_a_line_for_each_schedule(swept: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept.plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    figures: list[Any] = []
    monkeypatch.setattr(swept_module, "save_figure", lambda figure, path: figures.append(figure))
    swept.plot("unused.png")
    (axes,) = figures[0].axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    for schedule in ("plain", "calibrated", *UNIFORM):
        rows = [row for row in swept.rows if row.schedule == schedule]
        assert drawn[schedule] == ([row.speedup for row in rows], [row.error for row in rows])


def test_evaluate_gets_the_compiled_models_and_its_values_are_the_scores(one_schedule: str) -> None:
    seen: list[torch.Tensor] = []

    def evaluate(model: Any) -> float:
        assert isinstance(model, torch.nn.Module)
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(model(images(3)))
        return 10.0 - len(seen)

    result = run(flops=[0.75], evaluate=evaluate)
    assert result.measure == "score"
    assert [row.score for row in result.rows] == [9.0, 8.0]
    assert all(row.error is None for row in result.rows)
    with torch.no_grad():
        assert torch.equal(seen[0], vit()(images(3)))
    assert not torch.allclose(seen[0], seen[1], atol=1e-6)


def test_model_is_left_as_it_was_found(one_schedule: str) -> None:
    model = vit().train()
    model.blocks[1].eval()
    tofu_fx.sweep(model, images(), flops=[0.75], inner_backend="eager", calibrated=False, progress=False)
    assert model.training
    assert not model.blocks[1].training
    assert torch.is_grad_enabled()


def test_budget_out_of_reach_is_named_and_the_others_are_measured(one_schedule: str) -> None:
    result = run(flops=[0.75, 0.05])
    assert [row.budget for row in result.rows] == [None, 0.75]
    (said,) = result.unreachable
    assert said.startswith(f"{one_schedule} 0.05: ")
    file = io.StringIO()
    Console(width=120, file=file).print(result.table())
    assert f"{one_schedule} 0.05: " in file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"flops": []}, r"flops: expected some shares .*got \[\]"),
        ({"flops": 0.5}, r"flops: expected some shares .*got 0\.5"),
        ({"flops": [0.5, 1.5]}, r"flops: .*below 1, got 1\.5"),
        ({"flops": [0.05]}, r"no schedule reaches flops=0\.05"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"metric": "ssim"}, "metric: .*'ssim'"),
        ({"evaluate": lambda model: None}, "evaluate: .*returned None"),
        ({"evaluate": lambda model: math.nan}, "evaluate: .*returned nan"),
    ],
)
def test_wrong_arguments_say_what_was_wanted(arguments: dict[str, Any], expected: str, one_schedule: str) -> None:
    with pytest.raises(CalibrationError, match=expected):
        run(**{"flops": [0.75], **arguments})


def test_model_without_attention_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 5))
    with pytest.raises(CalibrationError, match="no site"):
        tofu_fx.sweep(model, images(), inner_backend="eager", progress=False)


def test_csv_that_cannot_be_written_says_why(swept: Sweep, tmp_path: Path) -> None:
    with pytest.raises(TofuError, match=r"nowhere.*No such file"):
        swept.save_csv(tmp_path / "nowhere" / "sweep.csv")


def test_variant_beyond_dynamos_limit_is_an_error_instead_of_plain_python() -> None:
    with room_for_variants():
        assert torch._dynamo.config.recompile_limit > 1000
        assert torch._dynamo.config.fail_on_recompile_limit_hit
    assert not torch._dynamo.config.fail_on_recompile_limit_hit
