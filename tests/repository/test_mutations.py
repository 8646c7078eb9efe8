"""Planted faults: ten of them, held against `prove`; and that the tool and its results are sound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, SAMPLE, Mutant
from tests.mutations import RESULTS, ROOT, Moved, fingerprint, load, mutated, planted, table

NAMES = [mutant.name for mutant in MUTANTS]


def test_there_are_forty_faults_and_more_in_every_part_of_the_compiler() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 40
    rooms = {Path(mutant.file).relative_to("tofu_fx").parts[0] for mutant in MUTANTS if "tofu_fx" in mutant.file}
    assert {"axes", "sites", "rewriting", "ops"} <= rooms
    files = {Path(mutant.file).stem for mutant in MUTANTS}
    assert {
        "reductions",
        "companions",
        "rewriter",
        "reducer",
        "versions",
        "restore",
        "weights",
        "masks",
        "layout",
    } <= files
    assert "cpu" in files
    assert set(SAMPLE) <= set(NAMES)


@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
def test_the_text_of_a_fault_stands_where_it_is_planted(mutant: Mutant) -> None:
    assert mutated(mutant) != (ROOT / mutant.file).read_text(encoding="utf-8")


def test_a_text_that_is_gone_is_an_error_that_names_the_fault() -> None:
    gone = Mutant("a fault that was", "tofu_fx/axes/rules/table.py", "no such text", "", (), "")
    with pytest.raises(Moved, match=r"'a fault that was': its text stands 0 times in tofu_fx/axes/rules/table\.py"):
        mutated(gone)


def test_a_copy_differs_by_the_fault_alone() -> None:
    with planted(MUTANTS[0], tests=False) as folder:
        changed = [
            path
            for path in folder.glob("*/**/*.py")
            if path.read_text() != (ROOT / path.relative_to(folder)).read_text()
        ]
        assert [str(path.relative_to(folder)) for path in changed] == [MUTANTS[0].file]


@pytest.mark.skipif(not RESULTS.is_file(), reason="no results are committed yet: run python -m tests.mutations")
def test_results_are_of_these_faults_and_nobody_missed_one_without_a_reason() -> None:
    results = load()
    assert set(results) == set(NAMES), "run python -m tests.mutations"
    for mutant in MUTANTS:
        found = results[mutant.name]
        assert found["hash"] == fingerprint(mutant), f"{mutant.name!r} is another now: run python -m tests.mutations"
        assert found["tests"], f"no test sees {mutant.name!r}"
        assert found["prove"] or mutant.unseen, f"prove does not see {mutant.name!r}, and no reason is given"
    assert json.loads(RESULTS.read_text()) == results
    assert "survivors: none" in table(results)


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_proofs_see_a_sample_of_the_faults_and_nothing_where_there_is_none() -> None:
    code = "from tests.mutations import sample; sample()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert list(seen) == ["no fault", *SAMPLE]
    assert seen.pop("no fault") == ""
    assert not [name for name, what in seen.items() if not what or what.startswith("error")], seen
