"""`tofu-fx bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tofu_fx.cli import inputs, models
from tofu_fx.cli.calibrate import add_inner_backend
from tofu_fx.cli.command import Command, CommandError, note, positive, require_folder, shares
from tofu_fx.plan.words import Strategy

if TYPE_CHECKING:
    from rich.table import Table

    from tofu_fx.calibration.batches import Batch
    from tofu_fx.cli.forms import Loaded

BUDGETS = [0.9, 0.75, 0.6, 0.5]

EPILOG = f"""\
{models.SOURCES}
{inputs.SOURCES}
examples:
  tofu-fx bench timm:vit_base_patch16_224
  tofu-fx bench timm:vit_base_patch16_224 --ratio 0.3,0.5,0.7 --strategy mlerp --batch 32
  tofu-fx bench timm:vit_base_patch16_224 --pretrained --plan plan.json --plan edited.json
  tofu-fx bench timm:vit_base_patch16_224 --pretrained --inputs photos/ --sweep --csv sweep.csv --png sweep.png

--sweep calibrates a plan for each budget, compares it with uniform schedules, and measures the error of the outputs: it
takes many minutes with inductor. For accuracy instead of error, call tofu_fx.sweep(..., evaluate=...) from Python.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    parser.add_argument(
        "--plan", type=Path, action="append", default=[], metavar="FILE", help="a plan to time (may be repeated)"
    )
    parser.add_argument(
        "--ratio",
        type=shares,
        default=[],
        metavar="R",
        help="shares of tokens to remove, as 0.3,0.5 (without --plan: 0.5)",
    )
    parser.add_argument("--strategy", choices=get_args(Strategy), default="auto", help="for --ratio (%(default)s)")
    inputs.add_input_arguments(parser, samples=48)
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="samples a call (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=15, metavar="N", help="timed calls of each (%(default)s)")
    add_inner_backend(parser)
    parser.add_argument("--sweep", action="store_true", help="schedules and calibrated plans at several budgets")
    parser.add_argument(
        "--flops", type=shares, default=None, metavar="S", help="with --sweep: budgets (0.9,0.75,0.6,0.5)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with --sweep: the rows")
    parser.add_argument("--png", type=Path, metavar="FILE", help="with --sweep: quality against speed")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    for option in ("csv", "png", "flops"):
        if getattr(args, option) is not None and not args.sweep:
            raise CommandError(f"--{option} belongs to --sweep; add that, or leave it out")
    if args.sweep and (args.plan or args.ratio):
        raise CommandError("--sweep makes its own schedules: leave out --plan and --ratio")
    require_folder(args.csv, "--csv")
    require_folder(args.png, "--png")
    if args.sweep:
        _sweep(args, Console())
    else:
        Console().print(_bench(args))


def _sweep(args: argparse.Namespace, console: Any) -> None:
    import tofu_fx

    loaded = models.load_model(args)
    found = inputs.read_inputs(args, loaded)
    inputs.warn_of_chance(args, loaded)
    with inputs.named_refusals(args):
        result = tofu_fx.sweep(
            loaded.model,
            found,
            flops=args.flops or BUDGETS,
            inner_backend=args.inner_backend,
            seed=args.seed,
            batch_size=args.batch,
            progress=not args.quiet,
        )
    console.print(result.table())
    if args.csv is not None:
        result.save_csv(args.csv)
    if args.png is not None:
        result.plot(args.png)


def _bench(args: argparse.Namespace) -> Table:
    import torch

    from tofu_fx import Plan
    from tofu_fx.calibration.batches import read_batches
    from tofu_fx.calibration.progress import Progress
    from tofu_fx.calibration.refusals import model_refusals

    options: dict[str, dict[str, Any]] = {str(path): {"plan": Plan.load(path)} for path in args.plan}
    for ratio in args.ratio or ([] if args.plan else [0.5]):
        options[f"{args.strategy}, ratio {ratio:g}"] = {"ratio": ratio, "strategy": args.strategy}
    args.samples = args.batch  # one call's
    loaded = models.load_model(args)
    batch = read_batches(inputs.read_inputs(args, loaded), args.batch)[0]
    if batch.samples < args.batch:
        note(f"the batch has {batch.samples} samples only")
    refusals = inputs.named_refusals(args), model_refusals(loaded.model, batch)
    with torch.no_grad(), Progress(not args.quiet) as bar, refusals[0], refusals[1]:
        return _time(args, loaded, batch, options, bar)


def _time(
    args: argparse.Namespace, loaded: Loaded, batch: Batch, options: dict[str, dict[str, Any]], bar: Any
) -> Table:
    import time
    from functools import partial

    import torch
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from tofu_fx.calibration.timing import call_with, compile_variant, device_name, room_for_variants, time_calls
    from tofu_fx.report.explain import share_of_flops

    plain = f"plain {args.inner_backend}"
    bar.phase("counting operations", len(options))
    shares_left = {plain: 1.0}
    for name, chosen in options.items():
        shares_left[name] = share_of_flops(loaded.model, batch, chosen)
        bar.advance(1)
    bar.phase(f"compiling with {args.inner_backend}", len(options) + 1)
    calls, compiling = {}, {}
    with room_for_variants():
        for name in (plain, *options):
            start = time.perf_counter()
            run = compile_variant(loaded.model, options.get(name), args.inner_backend)
            calls[name] = partial(call_with, run, batch)
            calls[name]()
            compiling[name] = time.perf_counter() - start
            bar.advance(1)
        bar.phase("timing, in turns", 1)
        timed = time_calls(calls, loaded.device, rounds=args.rounds)
        bar.advance(1)
    torch._dynamo.reset()
    about = f"{loaded.name}: batches of {batch.samples}, {args.dtype}, on {device_name(loaded.device)}"
    table = Table(
        title=Text(about),
        caption=f"Medians of {args.rounds} calls of each, in turns; speed-up is the median of the ratios to plain.",
        title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in ("", "FLOPs", "ms a call", "samples/s", "speed-up", "compile"):
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column), overflow="fold")
    for name, found in timed.items():
        table.add_row(
            Text(name),
            f"{shares_left[name]:.1%}",
            f"{1e3 * found.seconds:.1f}",
            f"{batch.samples / found.seconds:.0f}",
            f"{found.speedup:.2f}x",
            f"{compiling[name]:.1f} s",
            end_section=name == plain,
        )
    return table


COMMAND = Command(
    "bench", "time a model through plain inductor and through tofu, in turns", _add_arguments, _run, EPILOG
)
