"""The `tofu-fx` command.

A subcommand is a module of this package with one `Command` in it; `COMMANDS` lists them. `models.py` and `inputs.py`
know the ways to name a model and its inputs.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from tofu_fx.cli import bench, calibrate, demo, explain, plan
from tofu_fx.cli.command import Command, add_debug
from tofu_fx.errors import TofuWarning
from tofu_fx.wording import printable, shortened

__all__ = ["COMMANDS", "Command", "build_parser", "main"]

COMMANDS = (demo.COMMAND, explain.COMMAND, calibrate.COMMAND, plan.COMMAND, bench.COMMAND)

EPILOG = """\
where to begin:
  tofu-fx demo                                              a trained model, no download: what it does and costs
  tofu-fx explain timm:vit_base_patch16_224                 what would be reduced in a model, and what not, and why
  tofu-fx calibrate timm:vit_base_patch16_224 --pretrained --inputs photos/ --speedup 1.5 -o plan.json
  tofu-fx bench timm:vit_base_patch16_224 --pretrained --plan plan.json

and in Python: torch.compile(model, backend="tofu", options={"plan": "plan.json"})

exit codes:
  0    done
  1    it failed; one line on stderr says why (--debug: the traceback)
  2    the command line is wrong
  3    `plan diff`: the plans differ
  130  interrupted
"""


#: characters of an error, at most: those of other libraries may hold a whole file
LONGEST = 2000


class _Parser(argparse.ArgumentParser):
    """Shows what was given without obeying it: arguments often come from a script or a file name."""

    def error(self, message: str) -> NoReturn:
        super().error(_line(message))


def _line(text: str) -> str:
    return printable(shortened(" ".join(text.split()), LONGEST))


def build_parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="tofu-fx",
        description="Token reduction for transformers in torch.compile graphs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tofu-fx {metadata.version('tofu-fx')}")
    parser.add_argument("--debug", action="store_true", help="on an error, print the traceback")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in commands:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_debug(subparser)
        subparser.set_defaults(run=command.run)
        command.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code.

    0: done. 1: it failed, and one line on stderr says why (`--debug`: the traceback). 2: the command line is wrong.
    3: `plan diff` was asked to compare plans that differ. 130: interrupted.
    """
    try:
        args = build_parser(COMMANDS).parse_args(argv)
    except SystemExit as leaving:  # argparse has printed what there is to say
        return leaving.code if isinstance(leaving.code, int) else 2
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return args.run(args) or 0
    except KeyboardInterrupt:
        print("tofu-fx: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - a command ends with a message, not with a traceback
        if args.debug:
            traceback.print_exc()
        else:
            # Dynamo wraps what a backend raises in an advice for those who write backends.
            cause = getattr(error, "inner_exception", None) or error
            text = _line(str(cause)) or type(cause).__name__
            print(f"tofu-fx: error: {text} (--debug shows where)", file=sys.stderr)
        return 1


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:  # noqa: ARG001 - as warnings.showwarning is called
    """Our own warnings as one line without the place in our source; those of others as Python shows them."""
    if issubclass(category, TofuWarning):
        print(f"tofu-fx: warning: {_line(str(message).removeprefix('tofu_fx: '))}", file=sys.stderr)
    else:
        filename, lineno = rest[0], rest[1]
        sys.stderr.write(printable(warnings.formatwarning(message, category, filename, lineno)))
