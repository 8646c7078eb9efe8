"""A plan as a table, as a picture, and beside another plan."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from tofu_fx import Plan, TofuError
from tofu_fx.extras import MissingExtraError
from tofu_fx.plan import table as plans
from tofu_fx.plan.records import Calibration, Figures, PlanRow, Spread
from tofu_fx.plan.table import differences, follow_tokens, plan_diff


def row(layer: int, strategy: str, r: int, **more: Any) -> PlanRow:
    name = f"blocks.{layer}.attn"
    identity = {"id": name, "module_path": name, "tokens": 17, "heads": 3, "dim": 48, **more}
    return PlanRow.model_validate({"strategy": strategy, "r": r, **identity})


HAND_MADE = Plan(sites=[row(0, "prune", 4), row(1, "mlerp", 0), row(2, "mean", 3)])


def calibrated() -> Plan:
    measured = {"linearity": Spread(mean=0.812, std=0.021), "pair_linearity": Spread(mean=0.934, std=0.05)}
    rows = [
        row(0, "prune", 4, error=0.0125, reason="alone, merging costs more", **measured),
        row(1, "mlerp", 0, match="heads", error=0.0, reason="cheaper elsewhere", **measured),
        row(2, "mlerp", 3, match="queries_keys", error=0.25, reason="merging costs less [2]"),
    ]
    calibration = Calibration(
        target="speedup", value=1.5, policy="linearity", threshold=0.9, metric="kl", seed=0, samples=48,
        forward_passes=20.0, seconds=61.0, device="a fast one", libraries={},
        predicted=Figures(error=0.2625, flops=0.61, speedup=1.55),
        measured=Figures(error=0.31, flops=0.61, speedup=1.52),
        compared={"depth rule": Figures(error=0.77, flops=0.6)}, notes=["planned twice"],
    )  # fmt: skip
    return Plan(model="some_vit", calibration=calibration, sites=rows)


def text(table: Table, width: int = 160) -> str:
    file = io.StringIO()
    Console(width=width, file=file).print(table)
    return file.getvalue()


def test_tokens_are_followed_through_each_stream() -> None:
    other = {"tokens": 50}
    plan = Plan(
        sites=[row(0, "prune", 4), row(9, "mean", 10, **other), row(1, "mlerp", 3), row(0, "mlerp", 5, graph=1)]
    )
    assert [(step.arriving, step.leaving) for step in follow_tokens(plan)] == [(17, 13), (50, 40), (13, 10), (17, 12)]


def test_table_has_a_row_a_site_with_the_decision_and_what_was_measured() -> None:
    shown = text(calibrated().table())
    for words in (
        "some_vit: target speedup 1.5",
        "predicted: error 0.263 (kl), 61.0% of the FLOPs, 1.55x the speed",
        "measured: error 0.31 (kl), 61.0% of the FLOPs, 1.52x the speed",
        "48 samples",
        "depth rule instead: error 0.77",
        "planned twice",
        "merging costs less [2]",
    ):
        assert words in shown
    lines = shown.splitlines()
    (first,) = (number for number, line in enumerate(lines) if "blocks.0.attn" in line)
    assert lines[first].split() == [
        "blocks.0.attn", "17", "→", "13", "prune", "0.812", "±0.021", "0.013", "alone,", "merging", "costs", "more",
    ]  # fmt: skip
    assert lines[first + 1].split() == ["keys", "0.934", "±0.050"]
    (kept,) = (line for line in lines if "blocks.1.attn" in line)
    assert kept.split()[:3] == ["blocks.1.attn", "13", "none"]
    assert "heads" not in shown  # what a site that keeps its tokens would compare them by says nothing


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_a_terminal_without_cutting_anything_off(width: int) -> None:
    shown = text(calibrated().table(), width)
    assert "…" not in shown
    for words in ("blocks.2.attn", "13 → 10", "queries_keys", "0.812 ±0.021"):
        assert words in shown


def test_table_of_a_plan_made_by_hand_has_no_empty_columns() -> None:
    table = HAND_MADE.table()
    assert [str(column.header) for column in table.columns] == ["site", "tokens", "strategy,\nmatch"]
    shown = text(table)
    assert "3 sites, 7 tokens go; not calibrated" in shown
    assert "13 → 10" in shown


def test_equal_plans_do_not_differ() -> None:
    assert differences(HAND_MADE, Plan.load(HAND_MADE.model_dump())) == []
    table = plan_diff(HAND_MADE, HAND_MADE)
    assert table.row_count == 0
    assert "no difference" in text(table)


def test_strategy_of_a_row_that_takes_nothing_is_no_difference_and_measurements_are_none() -> None:
    changed = [site.model_copy(update={"error": 0.5, "reason": "seen"}) for site in HAND_MADE.sites]
    changed[1] = changed[1].model_copy(update={"strategy": "prune", "match": "heads"})
    assert differences(HAND_MADE, Plan(sites=changed)) == []


@pytest.mark.parametrize(
    ("update", "before", "after"),
    [
        ({"r": 5}, "prune 4 by keys", "prune 5 by keys"),
        ({"strategy": "mlerp"}, "prune 4 by keys", "mlerp 4 by keys"),
        ({"match": "heads"}, "prune 4 by keys", "prune 4 by heads"),
        ({"r": 0}, "prune 4 by keys", "none goes"),
        ({"tokens": 37}, "17 tokens", "37 tokens"),
    ],
)
def test_each_change_of_a_row_is_a_difference(update: dict[str, Any], before: str, after: str) -> None:
    sites = [HAND_MADE.sites[0].model_copy(update=update), *HAND_MADE.sites[1:]]
    ((site, first, second),) = differences(HAND_MADE, Plan(sites=sites))
    assert site == "blocks.0.attn"
    assert before in first
    assert after in second
    shown = text(plan_diff(HAND_MADE, Plan(sites=sites), ("old.json", "new.json")))
    assert all(words in shown for words in ("1 site differs", "old.json", "new.json", before, after))


def test_sites_of_one_plan_only_are_shown_as_such() -> None:
    shorter = Plan(sites=HAND_MADE.sites[:2])
    ((site, first, second),) = differences(shorter, HAND_MADE)
    assert (site, first, second) == ("blocks.2.attn", "", "17 tokens: mean 3 by keys")
    assert "no such site" in text(plan_diff(shorter, HAND_MADE))
    wider = [HAND_MADE.sites[0].model_copy(update={"heads": 6}), *HAND_MADE.sites[1:]]
    assert [name for name, *_ in differences(HAND_MADE, Plan(sites=wider))] == [
        "blocks.0.attn (graph 0, 3 heads, width 48)",
        "blocks.0.attn (graph 0, 6 heads, width 48)",
    ]


class Drawn:
    """The figure that was saved, instead of a file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.figure: Any = None
        monkeypatch.setattr(plans, "save_figure", lambda figure, path: setattr(self, "figure", figure))

    def labels(self) -> list[str]:
        return [axes.get_ylabel().splitlines()[0] for axes in self.figure.axes]


def test_picture_shows_linearity_tokens_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    calibrated().plot("unused.png")
    assert drawn.labels() == ["linearity (1: linear)", "tokens", "predicted error"]
    linearity, tokens, errors = drawn.figure.axes
    legend = [entry.get_text() for entry in linearity.get_legend().get_texts()]
    assert sorted(legend) == ["between samples", "between tokens to merge", "threshold (prune below)"]
    (steps,) = tokens.get_lines()
    assert steps.get_ydata().tolist() == [17, 13, 13, 10, 10]
    assert {entry.get_text() for entry in tokens.get_legend().get_texts()} == {"prune", "mlerp", "all tokens kept"}
    assert [bar.get_height() for bar in errors.patches] == [0.0125, 0.0, 0.25]
    assert [label.get_text() for label in errors.get_xticklabels()] == [f"blocks.{i}.attn" for i in range(3)]


def test_picture_of_a_plan_made_by_hand_has_the_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    HAND_MADE.plot("unused.png")
    assert drawn.labels() == ["tokens"]


@pytest.mark.parametrize(("name", "start"), [("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml"), ("plan", b"\x89PNG")])
def test_picture_is_written(name: str, start: bytes, tmp_path: Path) -> None:
    calibrated().plot(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_plan_of_no_sites_and_of_many_can_be_shown(tmp_path: Path) -> None:
    for plan in (Plan(sites=[]), Plan(sites=[row(layer, "mlerp", layer % 2) for layer in range(60)])):
        assert plan.table().row_count == len(plan.sites)
        plan.plot(tmp_path / "plan.png")
        assert (tmp_path / "plan.png").stat().st_size > 1000


def test_picture_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    with pytest.raises(TofuError, match=r"plan\.xyz.*'xyz'.*png"):
        HAND_MADE.plot(tmp_path / "plan.xyz")
    with pytest.raises(TofuError, match=r"nowhere.*No such file"):
        HAND_MADE.plot(tmp_path / "nowhere" / "plan.png")


def test_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"a picture needs matplotlib.*pip install 'tofu-fx\[demo\]'"):
        HAND_MADE.plot(tmp_path / "plan.png")
