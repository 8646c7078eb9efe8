"""`tofu-fx explain`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from tofu_fx.cli import inputs, models
from tofu_fx.cli.command import Command, counts, share
from tofu_fx.plan.words import Match, Placement, Strategy

EPILOG = f"""\
{models.SOURCES}
{inputs.SOURCES}
examples:
  tofu-fx explain timm:vit_base_patch16_224
  tofu-fx explain timm:vit_base_patch16_224 --r 8 --strategy mlerp
  tofu-fx explain hf:facebook/dinov2-small --plan plan.json
  tofu-fx explain mymodels:build --image-size 256 --ratio 0.4
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--plan", type=Path, metavar="FILE", help="a plan, as `tofu-fx calibrate` writes it")
    amount.add_argument("--ratio", type=share, metavar="R", help="share of the tokens gone by the last layer (0.5)")
    amount.add_argument("--r", type=counts, metavar="N", help="tokens gone in each layer: 8, or one a layer as 8,8,4")
    parser.add_argument("--strategy", choices=get_args(Strategy), help="how they go (auto: by depth, or by the plan)")
    parser.add_argument("--match", choices=get_args(Match), help="what tokens are compared by (keys)")
    parser.add_argument("--placement", choices=get_args(Placement), help="on the stream, or in each block's branches")
    unread = "whether rows of tensors that nobody reads are computed (drop)"
    parser.add_argument("--unread", choices=("drop", "keep"), help=unread)
    inputs.add_input_arguments(parser, samples=2)


def _run(args: argparse.Namespace) -> None:
    import torch
    from rich.console import Console

    import tofu_fx
    from tofu_fx.calibration.batches import as_batch
    from tofu_fx.calibration.refusals import model_refusals
    from tofu_fx.plan.options import Options

    keys = ("plan", "ratio", "r", "strategy", "match", "placement", "unread")
    given: dict[str, Any] = {key: getattr(args, key) for key in keys}
    if args.plan is not None:
        given["plan"] = tofu_fx.Plan.load(args.plan)
    # Read before the model is: a contradiction is no reason to wait.
    options = Options.parse({key: value for key, value in given.items() if value is not None})
    loaded = models.load_model(args)
    found = inputs.read_inputs(args, loaded)
    with torch.no_grad(), inputs.named_refusals(args), model_refusals(loaded.model, as_batch(found)):
        if isinstance(found, dict):
            explanation = tofu_fx.explain(loaded.model, options=options, **found)
        else:
            explanation = tofu_fx.explain(loaded.model, found, options=options)
    explanation.print(Console())


COMMAND = Command("explain", "what would be reduced in a model, what not, and why", _add_arguments, _run, EPILOG)
