"""The `tofu-fx` command, from its command line to what the user reads."""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from tofu_fx import TofuWarning, cli


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
        (["calibrate", "timm:x"], "-o/--output"),
        (["calibrate", "timm:x", "-o", "p.json", "--flops", "0.5", "--speedup", "2"], "not allowed with"),
        (["calibrate", "timm:x", "-o", "p.json", "--speedup", "0.9"], "a number above 1"),
        (["calibrate", "timm:x", "-o", "p.json", "--error", "none"], "a number above 0"),
        (["explain", "timm:x", "--plan", "p.json", "--ratio", "0.5"], "not allowed with"),
        (["explain", "timm:x", "--r", "8,x"], "one a layer, as 8,8,4"),
        (["explain", "timm:x", "--pretrained", "--weights", "w.safetensors"], "not allowed with"),
        (["bench", "timm:x", "--ratio", "0.5,2"], "between 0 and 1"),
        (["plan"], "ACTION"),
        (["plan", "show"], "plan"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", ["calibrate", "explain", "bench"])
def test_help_of_a_command_has_the_sources_and_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"tofu-fx {command} timm:vit_base_patch16_224" in shown
    assert all(words in shown for words in ("hf:NAME_OR_FOLDER", "MODULE:FUNCTION", "FILE.npz", "--inputs"))


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


def test_own_warnings_are_one_line_and_those_of_others_keep_their_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(args: argparse.Namespace) -> None:
        warnings.warn("tofu_fx: nothing was accelerated", TofuWarning, stacklevel=1)
        warnings.warn("old", UserWarning, stacklevel=1)

    _set_commands(monkeypatch, cli.Command("warn", "warns", lambda parser: None, warn))
    assert cli.main(["warn"]) == 0
    own, other, *_ = capsys.readouterr().err.splitlines()
    assert own == "tofu-fx: warning: nothing was accelerated"
    assert other.startswith(__file__)


def test_exit_code_of_a_command_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_commands(monkeypatch, cli.Command("three", "says 3", lambda parser: None, lambda args: 3))
    assert cli.main(["three"]) == 3


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
