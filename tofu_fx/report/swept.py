"""What a sweep measured: its rows as a table, as CSV and as a picture."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, field

from rich import box
from rich.table import Table
from rich.text import Text

from tofu_fx.errors import TofuError
from tofu_fx.plan.figure import GREY, INK, new_figure, save_figure
from tofu_fx.plan.plan import Plan
from tofu_fx.wording import printable

PLAIN, CALIBRATED = "plain", "calibrated"
#: the columns of the CSV
COLUMNS = ("schedule", "budget", "flops", "speedup", "seconds", "score", "error")
#: schedule -> colour and marker in the picture
LINES = {
    CALIBRATED: ("#c0392b", "o"),
    "depth rule": (INK, "s"),
    "uniform mlerp": ("#2471a3", "^"),
    "uniform mean": ("#e8a33a", "D"),
    "uniform prune": (GREY, "v"),
}


@dataclass(frozen=True)
class SweepRow:
    """One schedule at one budget, as measured.

    Attributes:
        schedule: "plain", "calibrated" or a key of ``planning.uniform.UNIFORM``.
        budget: the share of the plain model's operations that was asked for; None for plain.
        flops: the share that is left, in (0, 1].
        speedup: times the speed of plain, the median of ratios of neighbouring calls.
        seconds: median of a call of one batch.
        score: what ``evaluate`` returned, higher is better; None without it.
        error: mean error of the outputs against plain's over the samples, lower is better; None with ``evaluate``.
        plan: what was run; None for plain.
    """

    schedule: str
    budget: float | None
    flops: float
    speedup: float
    seconds: float
    score: float | None
    error: float | None
    plan: Plan | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Sweep:
    """What ``tofu_fx.sweep`` measured.

    Attributes:
        rows: plain first, then each schedule from the largest budget to the smallest.
        measure: what quality is: "score", or the name of the output error.
        batch: samples in a timed call.
        samples: samples that the error is the mean of; 0 where ``evaluate`` chose its own.
        device: the device's name.
        inner_backend: what compiled plain and the reduced graphs.
        unreachable: schedules and budgets that are not among the rows, with the reason.
    """

    rows: list[SweepRow]
    measure: str
    batch: int
    samples: int
    device: str
    inner_backend: str
    unreachable: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """The rows as a rich table."""
        caption = [f"Calls of {self.batch} samples on {self.device}, in turns; medians."]
        caption += [f"error: {self.measure}, mean over {self.samples} samples"] if self.measure != "score" else []
        below = Text(printable("\n".join([*caption, *self.unreachable])))
        table = Table(
            title=f"plain {self.inner_backend} against tofu", caption=below,
            title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
        )  # fmt: skip
        quality = "score" if self.measure == "score" else "error"
        for name in ("schedule", "budget", "FLOPs", "speed-up", "ms a call", quality):
            table.add_column(name, justify="left" if name == "schedule" else "right", no_wrap=True)
        for place, row in enumerate(self.rows):
            last = place + 1 == len(self.rows) or self.rows[place + 1].schedule != row.schedule
            table.add_row(
                row.schedule,
                "" if row.budget is None else f"{row.budget:g}",
                f"{row.flops:.1%}",
                f"{row.speedup:.2f}x",
                f"{1e3 * row.seconds:.1f}",
                f"{self._quality(row):.4g}",
                end_section=last,
            )
        return table

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as CSV with a header; what is None is an empty field.

        Raises:
            TofuError: the file cannot be written.
        """
        try:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                writer.writerows([getattr(row, name) for name in COLUMNS] for row in self.rows)
        except OSError as error:
            raise TofuError(f"table {os.fspath(path)!r} cannot be written: {error.strerror}") from None

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw quality against measured speed-up, a line a schedule and a star for plain.

        Raises:
            MissingExtraError: matplotlib is not installed.
            TofuError: the picture cannot be written there.
        """
        figure = new_figure(7.5, 5)
        axes = figure.subplots()
        plain, *others = self.rows
        axes.plot([plain.speedup], [self._quality(plain)], "*", color="black", markersize=13, label="plain")
        for schedule, (colour, marker) in LINES.items():
            points = [(row.speedup, self._quality(row)) for row in others if row.schedule == schedule]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=schedule)
        better = "higher is better" if self.measure == "score" else "lower is better"
        name = "score" if self.measure == "score" else f"error of the outputs ({self.measure})"
        axes.set(xlabel=f"measured speed-up over plain {self.inner_backend}", ylabel=f"{name}, {better}")
        axes.set_title(f"{self.device}, batch {self.batch}", loc="left", fontsize=10, color=INK)
        axes.grid(color="#e5e5e5", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        figure.tight_layout()
        save_figure(figure, path)

    def _quality(self, row: SweepRow) -> float:
        value = row.score if self.measure == "score" else row.error
        assert value is not None
        return value
