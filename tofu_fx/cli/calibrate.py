"""`tofu-fx calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from tofu_fx.cli import inputs, models
from tofu_fx.cli.command import Command, above_one, above_zero, note, positive, require_folder, share
from tofu_fx.plan.words import Placement

EPILOG = f"""\
{models.SOURCES}
{inputs.SOURCES}
examples:
  tofu-fx calibrate timm:vit_base_patch16_224 --pretrained --inputs photos/ --speedup 1.5 -o plan.json
  tofu-fx calibrate timm:vit_small_patch16_224 --weights mine.safetensors --inputs photos.npz --flops 0.6 -o plan.json
  tofu-fx calibrate hf:facebook/dinov2-small --inputs photos/ --error 0.05 -o plan.json --plot plan.png
  tofu-fx calibrate mymodels:build --inputs photos/ -o plan.json

then, in Python:
  torch.compile(model, backend="tofu", options={{"plan": "plan.json"}})
"""


PLACEMENT = "tokens go on the residual stream, or in the branches of each block (%(default)s)"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the plan to write, as JSON")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--speedup", type=above_one, metavar="X", help="times the speed of the plain model, such as 1.5"
    )
    target.add_argument("--flops", type=share, metavar="S", help="share of the operations that is left, such as 0.6")
    target.add_argument("--error", type=above_zero, metavar="E", help="error of the outputs that is allowed")
    inputs.add_input_arguments(parser, samples=48)
    parser.add_argument("--placement", choices=get_args(Placement), default="auto", help=PLACEMENT)
    parser.add_argument("--metric", choices=("relative_l2", "kl"), help="what error is (kl for class scores)")
    parser.add_argument(
        "--policy", choices=("auto", "sensitivity", "linearity"), default="auto", help="prune or merge by (%(default)s)"
    )
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="samples a call (%(default)s)")
    add_inner_backend(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the plan into a picture, too")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table")


def add_inner_backend(parser: argparse.ArgumentParser) -> None:
    """--inner-backend."""
    parser.add_argument(
        "--inner-backend",
        choices=("inductor", "aot_eager", "eager"),
        default="inductor",
        help="what compiles the graphs that are timed (%(default)s)",
    )


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    import tofu_fx

    require_folder(args.output, "--output")
    require_folder(args.plot, "--plot")
    loaded = models.load_model(args)
    found = inputs.read_inputs(args, loaded)
    inputs.warn_of_chance(args, loaded)
    with inputs.named_refusals(args):
        plan = tofu_fx.calibrate(
            loaded.model,
            found,
            speedup=args.speedup,
            flops=args.flops,
            error=args.error,
            metric=args.metric,
            policy=args.policy,
            seed=args.seed,
            batch_size=args.batch,
            inner_backend=args.inner_backend,
            options={"placement": args.placement},
            progress=not args.quiet,
        )
    plan.save(args.output)
    if not args.quiet:
        Console().print(plan.table())
        note(f"the plan is in {args.output}")
    if args.plot is not None:
        plan.plot(args.plot)


COMMAND = Command(
    "calibrate", "measure a model on some inputs, and plan where tokens go and how", _add_arguments, _run, EPILOG
)
