"""Every command and snippet of the README is run, or is what CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fresh import run_code, run_script
from tofu_fx.cli import COMMANDS, build_parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [code for language, code in FENCED if language == "python"]
SHELL = [line for language, code in FENCED if language in ("", "bash", "sh") for line in code.strip().splitlines()]

DENSE = ("denoiser", "timesteps", "placement", "speed", "show")
PARTS = ("saliency", "sentences", "search", "cifar", "times", "show")

#: commands that take minutes -> the short form of the same command that shows that it runs
SHORT = {
    "python examples/saliency.py": ["python", "examples/saliency.py", "--help"],
    "python examples/train_digits.py": ["python", "examples/train_digits.py", "--help"],
    "python benchmarks/vit_cpu.py": ["python", "benchmarks/vit_cpu.py", "--help"],
    **{f"python benchmarks/quality.py {part}": ["python", "benchmarks/quality.py", "--help"] for part in PARTS},
    **{f"python benchmarks/dense.py {part}": ["python", "benchmarks/dense.py", "--help"] for part in DENSE},
    "python examples/diffusion.py": ["python", "examples/diffusion.py", "--help"],
    "python benchmarks/levers.py --photographs 12 --r 19 12": ["python", "benchmarks/levers.py", "--help"],
}


def test_there_are_two_commands_and_ci_runs_them_as_they_stand() -> None:
    block = README.split("<!-- commands -->")[1].split("<!-- /commands -->")[0]
    commands = [line for line in block.splitlines() if line.startswith("pip install")]
    assert commands == ["pip install -e '.[demo]' && tofu-fx demo", "pip install -e '.[test]' && pytest"]
    assert "/<!-- commands -->/,/<!-- \\/commands -->/p" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_snippets_run(number: int, tmp_path: Path) -> None:
    done = run_code(PYTHON[number], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_snippet_of_the_page_on_diffusion_is_one_of_these() -> None:
    page = (ROOT / "docs" / "dense.md").read_text(encoding="utf-8")
    assert set(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)) <= set(PYTHON)


@pytest.mark.parametrize("command", [line for line in SHELL if line.startswith("tofu-fx")])
def test_command_lines_are_understood(command: str) -> None:
    # What the commands do is tested in tests/cli, with models that need no download.
    args = build_parser(COMMANDS).parse_args(command.split()[1:])
    assert args.command == command.split()[1]
    assert callable(args.run)


OTHER = [line for line in SHELL if line.startswith("python ")]


def test_somebody_says_how_each_other_command_is_run() -> None:
    assert not [command for command in OTHER if command not in SHORT]


@pytest.mark.parametrize("short", sorted({" ".join(SHORT[command]) for command in OTHER if command in SHORT}))
def test_other_commands_run(short: str, tmp_path: Path) -> None:
    _, script, *rest = short.split()
    done = run_script(ROOT / script, rest, ROOT, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert script.split("/")[-1] in done.stdout
