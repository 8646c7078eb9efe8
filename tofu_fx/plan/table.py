"""A plan as a table and as a picture, and what differs between two plans."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tofu_fx.plan.counts import stream_of, walk
from tofu_fx.plan.figure import GREY, INK, LOOKS, new_figure, save_figure
from tofu_fx.plan.projections import described
from tofu_fx.plan.records import Calibration, Figures, PlanRecord, PlanRow, Spread
from tofu_fx.wording import printable

#: more sites than this have no room for a number beside each
ANNOTATED = 30
#: letters that a line of a title or caption gets, if it needs them, although the columns be narrower
WIDTH = 72


@dataclass(frozen=True)
class Step:
    """A row, and how many tokens arrive at its site and leave it."""

    row: PlanRow
    arriving: int
    leaving: int

    @property
    def strategy(self) -> str:
        """The row's strategy, "none" where no token goes."""
        return self.row.strategy if self.row.r else "none"


def follow_tokens(plan: PlanRecord) -> list[Step]:
    """The token counts at each site, in the order of the rows (see ``tofu_fx.plan.counts``)."""
    return [Step(row, passage.arriving, passage.leaving) for row, passage in walk(plan.sites, lambda row, _: row.r)]


def plan_table(plan: PlanRecord) -> Table:
    """The plan as a rich table: a row a site. What no row knows (a plan made by hand has no scores) has no column.

    Linearity stands in two lines, between samples over between the tokens that would be merged: this way the table is
    narrow enough for a terminal of 80 columns.
    """
    columns: dict[str, Any] = {
        "site": lambda step: step.row.id,
        "tokens": lambda step: f"{step.arriving} → {step.leaving}" if step.row.r else str(step.leaving),
        "strategy,\nmatch": lambda step: f"{step.strategy}\n{step.row.match}" if step.row.r else step.strategy,
    }
    if any(row.linearity or row.pair_linearity for row in plan.sites):
        columns["linearity,\nof pairs"] = lambda step: (
            f"{_spread(step.row.linearity)}\n{_spread(step.row.pair_linearity)}"
        )
    if any(row.error is not None for row in plan.sites):
        columns["error"] = lambda step: _number(step.row.error)
    if any(row.reason for row in plan.sites):
        columns["reason"] = lambda step: step.row.reason
    title, caption = _title(plan), _caption(plan)
    table = Table(
        title=_text(title), caption=_text(caption) if caption else None, title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), min_width=_least_width(f"{title}\n{caption}"),
    )  # fmt: skip
    for name in columns:
        counted = name not in ("site", "reason")
        right = name in ("tokens", "error")
        table.add_column(name, justify="right" if right else "left", no_wrap=counted, overflow="fold")
    for step in follow_tokens(plan):
        table.add_row(*(_text(cell(step)) for cell in columns.values()))
    return table


def differences(a: PlanRecord, b: PlanRecord) -> list[tuple[str, str, str]]:
    """For each site that differs: its id, and what each plan does there ("" where it has no such site).

    A site is the same where graph, id, heads and width are. The strategy of a row that takes no token decides nothing,
    so such rows do not differ by it.
    """
    rows_a, rows_b = ({(r.graph, r.id, r.heads, r.dim): r for r in plan.sites} for plan in (a, b))
    ids = [row.id for row in (*rows_a.values(), *rows_b.values())]
    found = []
    for key in dict.fromkeys([*rows_a, *rows_b]):
        in_a, in_b = (_decision(rows[key], plan) if key in rows else "" for rows, plan in ((rows_a, a), (rows_b, b)))
        if in_a == in_b:
            continue
        # Two rows of one id are two kinds of site (or two graphs): say which.
        ambiguous = ids.count(key[1]) > 1 and not (in_a and in_b)
        name = f"{key[1]} (graph {key[0]}, {key[2]} heads, width {key[3]})" if ambiguous else key[1]
        found.append((name, in_a, in_b))
    return found


def plan_diff(a: PlanRecord, b: PlanRecord, names: tuple[str, str] = ("a", "b")) -> Table:
    """The sites at which two plans differ, as a rich table of no rows where there is none.

    Args:
        a: one plan.
        b: the other.
        names: what to call them.
    """
    found = differences(a, b)
    several = "site differs" if len(found) == 1 else "sites differ"
    about = [f"{name}: {'; '.join(_title(plan).splitlines())}" for name, plan in zip(names, (a, b), strict=True)]
    table = Table(
        title=f"{len(found)} {several}" if found else "no difference",
        caption=_text("\n".join(about)) if found else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        min_width=_least_width("\n".join(about)) if found else None,
    )
    for column in ("site", *names):
        table.add_column(_text(column), overflow="fold")
    for site, *decisions in found:
        table.add_row(_text(site), *(_text(decision or "no such site") for decision in decisions))
    return table


def draw_plan(plan: PlanRecord, path: str | os.PathLike[str]) -> None:
    """Draw a plan: linearity, tokens and strategy, and predicted error, for each site from the first layer to the last.

    Args:
        plan: what is not known of it (a plan made by hand has no linearity and no error) has no panel.
        path: the picture to write, PNG or another format of matplotlib's; its folder must exist.

    Raises:
        MissingExtraError: matplotlib is not installed.
        TofuError: the picture cannot be written there.
    """
    steps = follow_tokens(plan)
    panels = [_draw_tokens]
    if any(step.row.linearity or step.row.pair_linearity for step in steps):
        panels.insert(0, _draw_linearity)
    if any(step.row.error is not None for step in steps):
        panels.append(_draw_errors)
    width, margin = min(24.0, max(7.0, 2.5 + 0.5 * len(steps))), 0.35 + 0.22 * (_title(plan).count("\n") + 1)
    height = 2.4 * len(panels) + 1.2 + margin
    figure = new_figure(width, height)
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, draw in zip(all_axes, panels, strict=True):
        draw(axes, steps, plan.calibration)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.7)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            above = {"loc": "lower right", "bbox_to_anchor": (1, 0.98), "ncols": len(LOOKS), "frameon": False}
            axes.legend(fontsize=8, **above)
    slanted = {"rotation": 45, "ha": "right", "fontsize": 8, "parse_math": False}  # a "$" is no formula
    all_axes[-1].set_xticks(range(len(steps)), [printable(step.row.id) for step in steps], **slanted)
    all_axes[-1].set_xlim(-0.6, max(len(steps) - 0.4, 0.6))
    look = {"ha": "left", "va": "top", "fontsize": 11, "color": INK, "parse_math": False}
    figure.text(0.02, 1 - 0.15 / height, printable(_title(plan)), **look)
    figure.align_ylabels(all_axes)
    figure.tight_layout(rect=(0, 0, 1, 1 - margin / height))
    save_figure(figure, path)


def _draw_linearity(axes: Any, steps: Sequence[Step], calibration: Calibration | None) -> None:
    scores = {
        "between samples": ([step.row.linearity for step in steps], INK, "o", -0.1),
        "between tokens to merge": ([step.row.pair_linearity for step in steps], "#e8703a", "s", 0.1),
    }
    for label, (values, colour, marker, shift) in scores.items():
        known = [(place + shift, score) for place, score in enumerate(values) if score is not None]
        if known:
            means, spreads = [score.mean for _, score in known], [score.std for _, score in known]
            places = [place for place, _ in known]
            style = {"fmt": marker, "color": colour, "capsize": 3, "markersize": 5, "elinewidth": 1}
            axes.errorbar(places, means, yerr=spreads, label=label, **style)
    threshold = calibration.threshold if calibration and calibration.policy == "linearity" else None
    if threshold is not None and 0 < threshold <= 1:
        axes.axhline(threshold, color=GREY, linestyle="--", linewidth=1, label="threshold (prune below)")
    axes.set_ylabel("linearity (1: linear)")


def _draw_tokens(axes: Any, steps: Sequence[Step], calibration: Calibration | None) -> None:  # noqa: ARG001 - as every panel is drawn
    streams: dict[Hashable, list[int]] = {}
    for place, step in enumerate(steps):
        streams.setdefault(stream_of(step.row, place), []).append(place)
    for places in streams.values():
        counts = [steps[places[0]].arriving, *(steps[place].leaving for place in places)]
        edges = [places[0] - 0.5, *places]
        axes.step([*edges, places[-1] + 0.5], [*counts, counts[-1]], where="post", color=INK, linewidth=1.2, zorder=1)
    for strategy, (colour, marker) in LOOKS.items():
        chosen = [(place, step.leaving) for place, step in enumerate(steps) if step.strategy == strategy]
        if chosen:
            label = "all tokens kept" if strategy == "none" else strategy
            axes.scatter(*zip(*chosen, strict=True), color=colour, marker=marker, s=45, label=label, zorder=3)
    if len(steps) <= ANNOTATED:
        for place, step in enumerate(steps):
            if step.row.r:
                at = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 7, "color": GREY}
                axes.annotate(f"-{step.row.r}", (place, step.leaving), **at)
    axes.set_ylim(bottom=0)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("tokens")


def _draw_errors(axes: Any, steps: Sequence[Step], calibration: Calibration | None) -> None:
    colours = [LOOKS[step.strategy][0] for step in steps]
    axes.bar(range(len(steps)), [step.row.error or 0.0 for step in steps], color=colours, width=0.6)
    unit = f"\n({calibration.metric})" if calibration else ""
    axes.set_ylabel(printable(f"predicted error{unit}"), parse_math=False)


def _decision(row: PlanRow, plan: PlanRecord) -> str:
    matrix = getattr(plan, "matrices", {}).get((row.graph, row.id)) if row.match == "fisher" else None
    which = "" if matrix is None else f" ({described(matrix)})"
    return f"{row.tokens} tokens: " + (f"{row.strategy} {row.r} by {row.match}{which}" if row.r else "none goes")


def _title(plan: PlanRecord) -> str:
    name = plan.model or "plan"
    calibration = plan.calibration
    if calibration is None:
        gone = sum(row.r for row in plan.sites)
        return f"{name}: {len(plan.sites)} sites, {gone} tokens go; not calibrated"
    target = "no target" if calibration.value is None else f"target {calibration.target} {calibration.value:g}"
    figures = {"predicted": calibration.predicted, "measured": calibration.measured}
    said = [f"{name}: {target}"]
    said += [f"{when}: {text}" for when, found in figures.items() if (text := _figures(found, calibration.metric))]
    return "\n".join(said)


def _caption(plan: PlanRecord) -> str:
    calibration = plan.calibration
    if calibration is None:
        return ""
    how = (
        f"Measured on {calibration.samples} samples in {calibration.seconds:.0f} s on {calibration.device}; prune or "
        f"merge by {calibration.policy}."
    )
    return "\n".join([how, *_compared(calibration.compared, calibration.metric), *calibration.notes])


def _compared(compared: Mapping[str, Figures], metric: str) -> list[str]:
    return [f"{name} instead: {text}" for name, found in compared.items() if (text := _figures(found, metric))]


def _figures(found: Figures, metric: str) -> str:
    said = []
    if found.error is not None:
        said.append(f"error {found.error:.3g} ({metric})")
    if found.flops is not None:
        said.append(f"{found.flops:.1%} of the FLOPs")
    if found.speedup is not None:
        said.append(f"{found.speedup:.2f}x the speed")
    return ", ".join(said)


def _text(text: str) -> Text:
    """A text of a plan's for the terminal: no markup, no escape sequences."""
    return Text(printable(text))


def _least_width(text: str) -> int:
    return min(WIDTH, max(map(len, text.splitlines())))


def _spread(score: Spread | None) -> str:
    return "" if score is None else f"{score.mean:.3f} ±{score.std:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
