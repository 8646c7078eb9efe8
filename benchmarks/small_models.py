"""Is a model that is too small to gain slower for being compiled with tofu? The ten smallest of the catalogue.

    python benchmarks/small_models.py      # about ten minutes on two cores: twenty cold compiles

The smallest by parameters of those that have a site. Each is compiled by plain inductor and by tofu with its default
options, one after the other in one process, and then timed in turns. Where every site is declined, tofu compiles the
untouched graph.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tofu_fx  # noqa: E402
from tests.zoo import CATALOGUE  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "small_models.json"
ROUNDS, CALLS = 41, 5


def smallest(count: int) -> list[str]:
    """Names of the models with sites that have the fewest parameters."""
    parameters = {
        name: sum(parameter.numel() for parameter in case.make().parameters())
        for name, case in CATALOGUE.items()
        if case.sites
    }
    return sorted(parameters, key=parameters.__getitem__)[:count]


def seconds(call: Any, args: Any, kwargs: Any) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call(*args, **kwargs)
    return (time.perf_counter() - start) / CALLS


def measure(name: str) -> dict[str, Any]:
    case = CATALOGUE[name]
    model = case.model()
    args, kwargs = case.inputs()
    matched = tofu_fx.explain(model, *args, **kwargs).matched
    torch._dynamo.reset()
    calls = {"plain": torch.compile(model), "tofu": torch.compile(model, backend="tofu")}
    for call in calls.values():
        for _ in range(3):
            call(*args, **kwargs)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS):
        for which in sorted(calls, reverse=turn % 2 == 1):
            times[which].append(seconds(calls[which], args, kwargs))
    ratios = [a / b for a, b in zip(times["tofu"], times["plain"], strict=True)]
    return {
        "reduced": matched,
        "plain_us": round(1e6 * statistics.median(times["plain"])),
        "tofu_us": round(1e6 * statistics.median(times["tofu"])),
        "ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    console, rows = Console(), {}
    for name in smallest(10):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            rows[name] = measure(name)
        console.print(name, rows[name], highlight=False)
    table = Table(title="ten smallest models, median time of a call", title_justify="left")
    for column in ("model", "sites reduced", "plain inductor, µs", "tofu, µs", "tofu / plain"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in rows.items():
        table.add_row(name, *(str(row[key]) for key in ("reduced", "plain_us", "tofu_us", "ratio")))
    console.print(table)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
