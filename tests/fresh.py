"""Programs in processes of their own, as a user would start them, that need not import torch each time.

A server is started once for each worker of pytest. It imports the libraries and nothing more, and forks for every
program: none sees what another, or a test, has made.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "timm", "diffusers", "hypothesis", "tofu_fx", "tests.fresh"])


class Done(NamedTuple):
    """How a program ended, and what it printed and warned of."""

    returncode: int
    stdout: str
    stderr: str


def run_code(code: str, folder: Path) -> Done:
    """Run a text as ``python -c`` would, in a folder."""
    return _run(folder, folder, _execute, code)


def run_script(script: Path, arguments: Sequence[str], folder: Path, output: Path) -> Done:
    """Run a file as ``python script arguments`` would, in a folder; ``output`` is for what it prints."""
    return _run(folder, output, _execute_file, str(script), list(arguments))


def _run(folder: Path, output: Path, execute: object, *given: object) -> Done:
    files = [output / "stdout.txt", output / "stderr.txt"]
    arguments = (str(folder), [str(file) for file in files], execute, given)
    process = _CONTEXT.Process(target=_start, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return Done(process.exitcode, *(file.read_text(encoding="utf-8") for file in files))


def _start(folder: str, files: Sequence[str], execute: object, given: Sequence[object]) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.chdir(folder)
    sys.path.insert(0, "")
    execute(*given)  # type: ignore[operator]


def _execute(code: str) -> None:
    exec(compile(code, "<snippet>", "exec"), {"__name__": "__main__"})


def _execute_file(script: str, arguments: list[str]) -> None:
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
