"""The `tofu-fx` command, from its command line to what the user reads."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tofu_fx import cli


def _command_that_raises(error: BaseException) -> cli.Command:
    def run(args: argparse.Namespace) -> None:
        raise error

    return cli.Command("fail", "always fails", lambda parser: None, run)


def _set_commands(monkeypatch: pytest.MonkeyPatch, *commands: cli.Command) -> None:
    monkeypatch.setattr(cli, "COMMANDS", commands)


def test_entry_point_is_the_main_function() -> None:
    (entry,) = metadata.entry_points(group="console_scripts", name="tofu-fx")
    assert entry.load() is cli.main


def test_version_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tofu_fx.cli", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"tofu-fx {metadata.version('tofu-fx')}")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command.name in shown for command in cli.COMMANDS)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "COMMAND"),
        (["no-such-command"], "no-such-command"),
        (["demo", "--ratios", "1.5"], "between 0 and 1"),
        (["demo", "--ratios", "half"], "between 0 and 1"),
        (["demo", "--batch", "0"], "positive whole number"),
        (["demo", "--strategies", "melt"], "melt"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert expected in capsys.readouterr().err


def test_failure_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _set_commands(monkeypatch, _command_that_raises(ValueError("too\nbad")))
    assert cli.main(["fail"]) == 1
    assert capsys.readouterr().err == "tofu-fx: error: too bad (--debug shows where)\n"


@pytest.mark.parametrize("argv", [["--debug", "fail"], ["fail", "--debug"]])
def test_debug_shows_the_traceback(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _set_commands(monkeypatch, _command_that_raises(ValueError("too bad")))
    assert cli.main(argv) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "in run" in shown


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_commands(monkeypatch, _command_that_raises(KeyboardInterrupt()))
    assert cli.main(["fail"]) == 130


def test_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ["timm", *(name for name in sys.modules if name.startswith("timm."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["demo", "--quick", "--output", str(tmp_path / "a.png")]) == 1
    shown = capsys.readouterr().err
    assert "timm" in shown
    assert "pip install 'tofu-fx[demo]'" in shown


def test_output_folder_is_checked_before_the_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["demo", "--quick", "--output", str(tmp_path / "nowhere" / "a.png")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_quick_demo_prints_the_table_and_writes_the_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    picture = tmp_path / "demo.png"
    code = cli.main(
        ["--debug", "demo", "--quick", "--ratios", "0.5", "--strategies", "mlerp", "prune", "--output", str(picture)]
    )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(word in shown.out for word in ("Plain aot_eager", "mlerp", "prune", "accuracy", "images/s", "GFLOPs"))
