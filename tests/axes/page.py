"""The table as docs/rules.md shows it: ops that are alike along every axis in one line.

python -m tests.axes.page writes it.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.axes.harness import BARRIER, CARRIED, CAUTIOUS, SIZED
from tests.axes.table import KNOWN

DOCS = Path(__file__).parents[2] / "docs" / "rules.md"
AXES = ("token", "sample", "heads", "feature")
START, END = "<!-- table -->", "<!-- /table -->"


def _cell(op: str, axis: str) -> str:
    """All verdicts of an op along an axis, the safest first."""
    found = {row.verdict for row in KNOWN if row.op == op and row.axis in (axis, "none")}
    return ", ".join(verdict for verdict in (CARRIED, SIZED, BARRIER, CAUTIOUS) if verdict in found)


def lines() -> list[str]:
    """The lines of the table."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for op in dict.fromkeys(row.op for row in KNOWN):
        alike.setdefault(tuple(_cell(op, axis) for axis in AXES), []).append(f"`{op}`")
    head = ["| op | tokens | samples | heads | features |", "|---|---|---|---|---|"]
    return [*head, *(f"| {' '.join(ops)} | {' | '.join(cells)} |" for cells, ops in alike.items())]


def main() -> None:
    """Write the table into the page."""
    table = "\n".join([START, *lines(), END])
    text = DOCS.read_text(encoding="utf-8")
    DOCS.write_text(re.sub(f"{START}.*{END}", lambda _: table, text, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
