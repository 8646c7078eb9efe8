"""`tofu-fx demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tofu_fx.cli.command import Command, positive, share


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    from tofu_fx.demo.run import BATCH, RATIOS, STRATEGIES

    parser.add_argument("--output", type=Path, default=Path("tofu_demo.png"), help="the picture to write (%(default)s)")
    ratios = " ".join(map(str, RATIOS))
    parser.add_argument(
        "--ratios", type=share, nargs="+", default=RATIOS, metavar="R", help=f"shares of tokens to remove ({ratios})"
    )
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES, help="(all of them)")
    parser.add_argument("--batch", type=positive, default=BATCH, help="images a call (%(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads (torch's own choice)")
    parser.add_argument("--quick", action="store_true", help="few images, no C++ compiling: a check, no measurement")


def _run(args: argparse.Namespace) -> None:
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


COMMAND = Command(
    "demo", "a trained ViT on real images: plain inductor against tofu, and a picture", _add_arguments, _run
)
