"""docs/models.md is what the results file says, and that covers the catalogue without a failure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.zoo import CATALOGUE

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT / "benchmarks"))
models: Any = __import__("models")
ROWS: dict[str, Any] = json.loads((RESULTS / "models.json").read_text())["rows"]
WALK: dict[str, Any] = json.loads((RESULTS / "timm_walk.json").read_text())
FAMILIES: dict[str, Any] = json.loads((RESULTS / "transformers_walk.json").read_text())


def test_page_is_made_from_the_results() -> None:
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == models.render(ROWS, WALK, FAMILIES)


def test_every_model_of_the_catalogue_is_on_the_page_and_none_failed() -> None:
    assert list(ROWS) == list(CATALOGUE)
    assert len(ROWS) > 100
    assert not [name for name, row in ROWS.items() if models.outcome(row) == "failed"]


@pytest.mark.parametrize("name", CATALOGUE)
def test_row_says_what_the_catalogue_expects(name: str) -> None:
    case, row = CATALOGUE[name], ROWS[name]
    assert row["sites"] == case.sites
    assert sum(row["declined"].values()) == len(case.declined)
    reasons = " ".join([*row["declined"], *row["said"]])
    assert all(words in reasons for words in (*case.declined, case.reason))


def test_one_model_of_every_file_of_timm_was_walked_and_none_failed() -> None:
    assert len(WALK["rows"]) > 90
    assert not [row["model"] for row in WALK["rows"] if row["outcome"] == "failed"]


def test_families_of_transformers_were_walked_and_none_failed() -> None:
    outcomes = [row["outcome"] for row in FAMILIES["rows"]]
    assert len(outcomes) > 600
    assert outcomes.count("accelerated") >= 100
    assert not [row["module"] for row in FAMILIES["rows"] if row["outcome"] == "failed"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"error": "RuntimeError: x"}, "failed"),
        ({"sites": 3, "declined": {}, "said": [], "backend": "", "proofs": {"failures": []}}, "accelerated"),
        ({"sites": 3, "declined": {}, "said": [], "backend": "NaN", "proofs": {"failures": []}}, "failed"),
        ({"sites": 3, "declined": {}, "said": [], "backend": "", "proofs": {"failures": ["identity"]}}, "failed"),
        ({"sites": 0, "declined": {"windows": 2}, "said": [], "backend": "", "proofs": {"failures": []}}, "declined"),
        ({"sites": 0, "declined": {}, "said": ["no attention"], "backend": "", "proofs": {"failures": []}}, "plain"),
    ],
)
def test_outcome_of_a_row(row: dict[str, Any], expected: str) -> None:
    assert models.outcome(row) == expected
