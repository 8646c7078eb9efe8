"""The modules of examples/, and the files that they need."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """A module of examples/, which find each other as scripts do: beside themselves."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def needed(*paths: Path) -> None:
    """Skip the test where a file is not there."""
    for path in paths:
        if not path.is_file():
            pytest.skip(f"needs {path.name}, which is not part of the repository: it is not at {path}")
