"""The demo: compile, measure, print a table, say what it means, draw a picture."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import tofu_fx
from tofu_fx.calibration.timing import room_for_variants
from tofu_fx.demo.data import Numbers, load_test_numbers
from tofu_fx.demo.draw import TokenMap, draw_token_maps
from tofu_fx.demo.measure import PLAIN, Variant, batches, compile_variant, count_work, make_variants, run_batch
from tofu_fx.demo.model import load_model, patch_grid, read_facts
from tofu_fx.extras import need

STRATEGIES = ("prune", "mean", "mlerp", "auto")
RATIOS = (0.3, 0.5)
BATCH = 64
QUICK_BATCH, QUICK_IMAGES = 6, 12
SHOWN = 6
# An accuracy this near to plain's counts as kept in the closing words.
CLOSE = 0.01


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Attributes:
        output: the PNG to write.
        ratios: shares of tokens to remove, each in (0, 1).
        strategies: among "prune", "mean", "mlerp" and "auto".
        batch: images a call.
        threads: CPU threads for torch; None leaves torch's own choice.
        quick: a few images and no C++ compiling; shows that everything works and measures nothing of use.
    """

    output: Path = Path("tofu_demo.png")
    ratios: Sequence[float] = RATIOS
    strategies: Sequence[str] = STRATEGIES
    batch: int = BATCH
    threads: int | None = None
    quick: bool = False


def run_demo(settings: Settings, console: Console, progress_console: Console) -> list[Variant]:
    """Run the whole demo; returns what was measured, plain first.

    Args:
        settings: what to run.
        console: where the table and the findings go.
        progress_console: where the progress bar goes.

    Raises:
        MissingExtraError: a package of the `demo` extra is not installed.
        FileNotFoundError: the folder of `settings.output` does not exist.
    """
    if not settings.output.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {settings.output}: the folder {settings.output.parent} does not exist")
    # The last step's package is asked for first: nobody should wait minutes to read that it is missing.
    need("matplotlib")
    start = time.perf_counter()
    busy = _busy()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model, test = load_model(), load_test_numbers()
    if settings.quick:
        test = Numbers(test.images[:QUICK_IMAGES], test.labels[:QUICK_IMAGES])
    batch_size = min(settings.batch, len(test.labels), QUICK_BATCH if settings.quick else settings.batch)
    _introduce(console, model, test, batch_size)
    inner_backend = "aot_eager" if settings.quick else "inductor"
    with room_for_variants(), _progress(progress_console) as progress:
        variants = make_variants(model, settings.strategies, settings.ratios, inner_backend)
        _work(model, variants, test, batch_size, progress)
        task = progress.add_task("drawing which tokens were merged", total=1)
        _draw(settings, model, variants, test)
        progress.advance(task)
    console.print(make_table(variants, test.labels))
    if settings.quick:
        console.print("A quick run: few images and uncompiled kernels; its speeds and accuracies say little.")
    else:
        console.print(interpret(variants, test.labels), highlight=False)
    if busy:
        console.print(busy, highlight=False)
    console.print(f"Picture: {settings.output} ({time.perf_counter() - start:.0f} s in all)", highlight=False)
    return variants


def _busy() -> str:
    """A warning if other programs already keep half of the processors at work, else nothing."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    processors = os.cpu_count() or 1
    if load <= processors / 2:
        return ""
    return (
        f"Other programs were running (load {load:.1f} on {processors} processors): the speeds are not to be trusted."
    )


def _progress(console: Console) -> Progress:
    share = TextColumn("{task.percentage:>3.0f}%")
    return Progress(TextColumn("{task.description}"), BarColumn(), share, TimeElapsedColumn(), console=console)


def _introduce(console: Console, model: nn.Module, test: Numbers, batch_size: int) -> None:
    facts = read_facts()
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    layers = facts["architecture"]["depth"]
    console.print(
        f"A vision transformer of {layers} layers and {millions:.1f} M parameters, trained by {facts['script']}; "
        f"{len(test.labels)} four-digit numbers of scanned digits that it has not seen, {batch_size} a batch; "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}.",
        highlight=False,
    )


def _work(model: nn.Module, variants: list[Variant], test: Numbers, batch_size: int, progress: Progress) -> None:
    parts = batches(test, batch_size)
    task = progress.add_task("counting tokens and operations", total=len(variants) - 1)
    for _ in count_work(variants, model, parts[0]):
        progress.advance(task)
    task = progress.add_task("compiling", total=len(variants))
    for variant in variants:
        progress.update(task, description=f"compiling {variant.label}")
        compile_variant(variant, parts[0])
        progress.advance(task)
    progress.update(task, description="compiled")
    task = progress.add_task(f"measuring, {len(variants)} variants in turns", total=len(parts))
    for turn, part in enumerate(parts):
        left = len(test.labels) - turn * batch_size
        run_batch(variants, part, turn, count=min(batch_size, left))
        progress.advance(task)


def make_table(variants: Sequence[Variant], labels: Tensor) -> Table:
    """What was measured, a row a variant; speed-up is plain's median time over the row's."""
    plain = variants[0]
    # Narrow enough for a terminal of 80 columns.
    table = Table(title=f"Plain {plain.inner_backend} against tofu", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("strategy", "ratio", "tokens", "GFLOPs\nan image", "accuracy", "images/s", "speed-up", "compile"):
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for variant in variants:
        is_plain = variant.strategy == PLAIN
        table.add_row(
            variant.strategy,
            "" if is_plain else f"{variant.ratio:g}",
            str(variant.tokens),
            f"{variant.flops / 1e9:.2f} ({variant.flops / plain.flops:.0%})",
            f"{variant.accuracy(labels):.2%}",
            f"{variant.images_per_second:.0f}",
            f"{plain.median_seconds / variant.median_seconds:.2f}x",
            f"{variant.compile_seconds:.1f} s",
            end_section=is_plain,
        )
    return table


def interpret(variants: Sequence[Variant], labels: Tensor) -> str:
    """Two or three sentences on what the numbers mean, made from the numbers."""
    plain, *others = variants
    digit = 1 / labels.numel()
    whole = plain.accuracy(labels)
    fastest = min(others, key=lambda variant: variant.median_seconds)
    speed = plain.median_seconds / fastest.median_seconds
    change = (fastest.accuracy(labels) - whole) * 100
    sentences = [
        f"The fastest, {fastest.label}, runs at {speed:.2f} times the speed of {plain.label} and changes accuracy by "
        f"{change:+.2f} points; its arithmetic alone would allow {plain.flops / fastest.flops:.2f} times."
    ]
    kept = [variant for variant in others if variant.accuracy(labels) >= whole - CLOSE]
    if kept:
        best = min(kept, key=lambda variant: variant.median_seconds)
        sentences.append(
            f"The fastest within {CLOSE * 100:g} points of plain is {best.label}: "
            f"{plain.median_seconds / best.median_seconds:.2f} times the speed."
        )
    sentences.append(f"Accuracy is the share of digits read rightly; one digit is {digit * 100:.2f} points.")
    return " ".join(sentences)


def _drawn(settings: Settings, variants: Sequence[Variant]) -> list[Variant]:
    """The columns of the picture: mlerp at every ratio (or the first strategy asked for), and auto at the highest."""
    shown = "mlerp" if "mlerp" in settings.strategies else settings.strategies[0]
    columns = [variant for variant in variants if variant.strategy == shown]
    highest = [variant for variant in variants if (variant.strategy, variant.ratio) == ("auto", max(settings.ratios))]
    return columns + [variant for variant in highest if variant not in columns]


def _draw(settings: Settings, model: nn.Module, variants: Sequence[Variant], test: Numbers) -> None:
    plain = variants[0]
    # The first ones: no choosing of photogenic ones.
    images, labels = test.images[:SHOWN], test.labels[:SHOWN]
    maps = []
    for variant in _drawn(settings, variants):
        with torch.no_grad():
            (groups,) = tofu_fx.token_groups(model, images, options=variant.options)
        speed = plain.median_seconds / variant.median_seconds
        notes = [f"{plain.tokens} to {variant.tokens} tokens", f"accuracy {variant.accuracy(test.labels):.2%}"]
        notes += [] if settings.quick else [f"{speed:.2f}x"]
        # The class token comes first and is no patch.
        maps.append(TokenMap(variant.label, notes, groups[:, 1:].cpu(), variant.found[:SHOWN]))
    whole = f"{plain.label}: accuracy {plain.accuracy(test.labels):.2%}"
    heading = f"Which patches became one token ({whole} on {len(test.labels)} numbers)"
    caption = (
        "Every outlined region is one token after the last layer, filled with its mean ink; "
        "parts of one token may lie apart. The first test images, not chosen."
    )
    draw_token_maps(settings.output, images, labels, patch_grid(), maps, heading, caption)
