"""The `tofu-fx` command.

A subcommand is one `Command` in `COMMANDS`: what it is called, a function that adds its arguments, and a function that
runs it. Both import what they need themselves, so that `tofu-fx --help` stays quick.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: what the user types.
        help: one line for the list of commands.
        add_arguments: adds its arguments to its own parser.
        run: does the work; whatever it raises is printed as one line (with --debug, as a traceback) and exits with 1.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, such as 0.5, got {text!r}")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    from tofu_fx.demo.run import BATCH, RATIOS, STRATEGIES

    parser.add_argument("--output", type=Path, default=Path("tofu_demo.png"), help="the picture to write (%(default)s)")
    ratios = " ".join(map(str, RATIOS))
    parser.add_argument(
        "--ratios", type=_ratio, nargs="+", default=RATIOS, metavar="R", help=f"shares of tokens to remove ({ratios})"
    )
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES, help="(all of them)")
    parser.add_argument("--batch", type=_positive, default=BATCH, help="images a call (%(default)s)")
    parser.add_argument("--threads", type=_positive, help="CPU threads (torch's own choice)")
    parser.add_argument("--quick", action="store_true", help="few images, no C++ compiling: a check, no measurement")


def _demo(args: argparse.Namespace) -> None:
    from rich.console import Console

    from tofu_fx.demo.run import Settings, run_demo

    settings = Settings(
        output=args.output,
        ratios=tuple(dict.fromkeys(args.ratios)),
        strategies=tuple(dict.fromkeys(args.strategies)),
        batch=args.batch,
        threads=args.threads,
        quick=args.quick,
    )
    # Results on stdout, the moving bar on stderr: `tofu-fx demo > table.txt` keeps what matters.
    run_demo(settings, Console(), Console(stderr=True))


COMMANDS = (
    Command("demo", "a trained ViT on real images: plain inductor against tofu, and a picture", _demo_arguments, _demo),
)


def build_parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="tofu-fx", description="Token reduction for transformers in torch.compile graphs."
    )
    parser.add_argument("--version", action="version", version=f"tofu-fx {metadata.version('tofu-fx')}")
    parser.add_argument("--debug", action="store_true", help="on an error, print the traceback")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in commands:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        # Accepted after the command as well; SUPPRESS keeps its default from undoing one given before the command.
        subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code.

    0: done. 1: it failed, and one line on stderr says why (`--debug`: the traceback). 2: the command line is wrong.
    130: interrupted.
    """
    try:
        args = build_parser(COMMANDS).parse_args(argv)
    except SystemExit as leaving:  # argparse has printed what there is to say
        return leaving.code if isinstance(leaving.code, int) else 2
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("tofu-fx: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        else:
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"tofu-fx: error: {text} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
