"""What is installed is what is on disk, under one name."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

ROOT = Path(__file__).parents[2]


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def test_listed_packages_are_the_folders_with_python_files() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("tofu_fx/**/*.py")}
    assert (ROOT / "passes" / "__init__.py").is_file()
    assert set(settings["packages"]) == found | {"tofu_fx.passes"}
    assert settings["package-dir"] == {"tofu_fx.passes": "passes"}


def test_bare_import_of_passes_is_refused() -> None:
    done = python("import passes", ROOT)
    assert done.returncode != 0
    assert "import tofu_fx.passes, not passes" in done.stderr


def test_backend_resolves_by_name_in_a_fresh_process_without_an_import(tmp_path: Path) -> None:
    done = python(
        "import sys, torch\n"
        "found = torch._dynamo.lookup_backend('tofu')\n"
        "print(found.__module__, 'tofu' in torch._dynamo.list_backends())",
        tmp_path,
    )
    assert done.stdout.split() == ["tofu_fx.backend", "True"], done.stderr


def test_every_pass_is_a_file_a_function_and_a_name() -> None:
    from tofu_fx.passes.find_streams import STEPS

    from tofu_fx.pipeline import PASSES

    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    # giving_up.py is no pass, but what two of them do where a stream is lost.
    assert {p.__name__ for p in (*PASSES, *STEPS)} | {"giving_up"} == files
    assert all(p.__module__ == f"tofu_fx.passes.{p.__name__}" for p in PASSES)
    assert all(p.__doc__ and sys.modules[p.__module__].__doc__ for p in PASSES)


def test_wheel_has_one_top_level_name_and_everything_in_it(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    # From a copy: a build leaves folders in its source tree.
    import shutil

    source = tmp_path / "source"
    source.mkdir()
    for name in ("tofu_fx", "passes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"tofu_fx"}
    on_disk = {f"tofu_fx/{path.relative_to(ROOT / 'tofu_fx')}" for path in ROOT.glob("tofu_fx/**/*.py")}
    on_disk |= {f"tofu_fx/passes/{path.name}" for path in ROOT.glob("passes/*.py")}
    assert {name for name in names if name.endswith(".py")} == on_disk
    assert "tofu_fx/py.typed" in names
