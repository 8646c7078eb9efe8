"""What a subcommand is, and what several of them share: kinds of arguments, and checks before long work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tofu_fx.errors import TofuError
from tofu_fx.wording import printable, shown


class CommandError(TofuError):
    """A wrong file, model or input on the command line: names what was given, what was expected and what to do."""


@dataclass(frozen=True)
class Command:
    """A subcommand. Its functions import what they need themselves, so that `tofu-fx --help` stays quick.

    Attributes:
        name: what the user types.
        help: one line for the list of commands.
        add_arguments: adds its arguments to its own parser.
        run: does the work and returns the exit code (None: 0); whatever it raises is printed as one line (with --debug,
            as a traceback) and exits with 1.
        epilog: examples, printed below its arguments as they stand.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    epilog: str = ""


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Accept --debug after a subcommand as well."""
    # SUPPRESS keeps its default from undoing one given before the command.
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def share(text: str) -> float:
    """An argument in (0, 1)."""
    return _number(text, lambda value: 0 < value < 1, "a number between 0 and 1, such as 0.5")


def shares(text: str) -> list[float]:
    """An argument that is one number in (0, 1), or several with commas between."""
    return list(dict.fromkeys(share(part) for part in text.split(",")))


def above_one(text: str) -> float:
    """An argument above 1."""
    return _number(text, lambda value: 1 < value < float("inf"), "a number above 1, such as 1.5")


def above_zero(text: str) -> float:
    """An argument above 0."""
    return _number(text, lambda value: 0 < value < float("inf"), "a number above 0, such as 0.05")


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    if not _is_count(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number of at most 9 digits, got {shown(text)}")
    return int(text)


def counts(text: str) -> int | list[int]:
    """An argument that is tokens per layer: one whole number, or several with commas between."""
    parts = text.split(",")
    if not all(map(_is_count, parts)):
        raise argparse.ArgumentTypeError(
            f"expected a whole number, such as 8, or one a layer, as 8,8,4; got {shown(text)}"
        )
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


def require_folder(path: Path | None, option: str) -> None:
    """Refuse an output whose folder does not exist, before the work whose result would be lost."""
    if path is not None and not path.absolute().parent.is_dir():
        raise CommandError(f"{option} {path}: the folder {path.parent} does not exist; create it or name another")


def note(text: str) -> None:
    """Say something beside the results, on stderr."""
    print(printable(f"tofu-fx: {text}"), file=sys.stderr)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9


def _number(text: str, accepts: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not accepts(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {shown(text)}")
    return value
