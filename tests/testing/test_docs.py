"""Every snippet of docs/testing.md runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number: int, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SNIPPETS[number]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_assertion_is_in_the_table() -> None:
    from tofu_fx.testing import assertions

    public = {
        name for name, value in vars(assertions).items() if getattr(value, "__module__", "") == assertions.__name__
    }
    named = set(re.findall(r"^\| `(\w+)\(", TEXT, flags=re.MULTILINE))
    assert named == {name for name in public if not name.startswith("_")}
