"""Every snippet of docs/testing.md, docs/rules.md and docs/standalone.md runs."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from tests.fresh import run_code

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "testing.md").read_text(encoding="utf-8")


def snippets(text: str) -> list[str]:
    return [textwrap.dedent(found) for found in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]


SNIPPETS = snippets(TEXT)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number: int, tmp_path: Path) -> None:
    run(SNIPPETS[number], tmp_path)


def test_a_rule_as_the_contributors_page_writes_it(tmp_path: Path) -> None:
    run("\n".join(snippets((DOCS / "rules.md").read_text(encoding="utf-8"))), tmp_path)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_rewritten_graphs_as_their_page_writes_them(number: int, tmp_path: Path) -> None:
    found = snippets((DOCS / "standalone.md").read_text(encoding="utf-8"))
    assert len(found) == 3
    run(found[number], tmp_path)


def run(code: str, folder: Path) -> None:
    done = run_code(code, folder)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_assertion_is_in_the_table() -> None:
    from tofu_fx.testing import assertions

    public = {
        name for name, value in vars(assertions).items() if getattr(value, "__module__", "") == assertions.__name__
    }
    named = set(re.findall(r"^\| `(\w+)\(", TEXT, flags=re.MULTILINE))
    assert named == {name for name in public if not name.startswith("_")}
