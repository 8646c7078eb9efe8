"""Pictures from a diffusion model on fewer tokens: plain, `backend="tofu"` and tomesd side by side.

    python examples/diffusion.py                                # ratios 0.3, 0.5 and 0.6, a picture of each class
    python examples/diffusion.py --ratio 0.5 --steps 50
    python examples/diffusion.py --methods tofu --inner-backend aot_eager     # no minutes of compiling
    python examples/diffusion.py --train-minutes 5              # no carried weights: train a short one first

Draws the same classes from the same noise with each, and prints how far the pictures are from those of the plain model
(PSNR, higher is closer), the denoising loss on held-out pictures, and the seconds that drawing took. The denoiser is
diffusers' UNet2DConditionModel, see `diffusion_model.py`. tomesd merges tokens by replacing the forward of its
transformer blocks, here without randomness; it is left out if it is not installed (`pip install tomesd`).

The loss needs CIFAR-10's test pictures, which are not part of this repository; without them its column is empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusion_model import (
    CLASSES,
    NULL,
    TRAIN_TIMESTEPS,
    WEIGHTS,
    Denoiser,
    denoising_loss,
    load_model,
    load_pictures,
    read_facts,
    sample,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from tofu_fx.errors import TofuError
from tofu_fx.plan.figure import new_figure, save_figure

METHODS = ("tofu", "tomesd")
STRATEGIES = ("auto", "prune", "mean", "mlerp")
# Each 2x2 cell of tokens keeps at least one.
MOST = 0.75
LOSS_SEED = 1


@dataclass
class Variant:
    """One way to run the denoiser.

    Attributes:
        method: "plain" (eager), "compiled" (plain too, by the inner backend alone), "tofu" or "tomesd".
        label: what the table and the picture call it.
        ratio: the share of the tokens merged; 0 for the plain ones.
        images: `[n, 3, 32, 32]`, -1 to 1, once it ran.
        loss: on held-out pictures; None where there are none.
        seconds: that drawing the images took, compiling not counted.
    """

    method: str
    label: str
    ratio: float = 0.0
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    loss: float | None = None
    seconds: float = 0.0

    def psnr(self, plain: Variant) -> float:
        """Of all images together against the plain model's, in dB; infinite if they are the same."""
        error = (self.images - plain.images).double().square().mean()
        return float(10 * torch.log10(4 / error))


def make_variants(methods: Sequence[str], ratios: Sequence[float], inner_backend: str) -> list[Variant]:
    """The plain model first, then a variant for each method and ratio."""
    variants = [Variant("plain", "plain")]
    if "tofu" in methods and inner_backend != "eager":
        # What tofu's seconds are to be held against: compiled by the same backend.
        variants.append(Variant("compiled", f"plain, {inner_backend}"))
    return variants + [Variant(method, f"{method} {ratio:g}", ratio) for method in methods for ratio in ratios]


@contextmanager
def prepare(model: Denoiser, variant: Variant, inner_backend: str, strategy: str = "auto") -> Iterator[nn.Module]:
    """The denoiser as the variant runs it; a compiled one compiles at its first call."""
    if variant.method == "tomesd":
        tomesd = importlib.import_module("tomesd")
        # max_downsample=1 merges at full resolution only, as tomesd does by default.
        tomesd.apply_patch(model.unet, ratio=variant.ratio, max_downsample=1, use_rand=False)
        try:
            yield model
        finally:
            tomesd.remove_patch(model.unet)
    elif variant.method == "tofu":
        # An example must not pass over a failure in silence by compiling the untouched graph.
        options: dict[str, Any] = {"ratio": variant.ratio, "placement": "branch", "on_error": "raise"}
        options |= {"strategy": strategy, "inner_backend": inner_backend}
        unet = torch.compile(model.unet, backend="tofu", options=options, dynamic=False)
        yield Denoiser(cast(nn.Module, unet), model.prompts)
    elif variant.method == "compiled":
        unet = torch.compile(model.unet, backend=inner_backend, dynamic=False)
        yield Denoiser(cast(nn.Module, unet), model.prompts)
    else:
        yield model


def run_variant(
    variant: Variant,
    model: nn.Module,
    held_out: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    args: argparse.Namespace,
    advance: Callable[[], None],
) -> None:
    """Fill in the variant's loss, images and seconds; `model` is the denoiser as the variant runs it."""
    # The first call compiles. As many pictures as a guided step runs, so that one shape is compiled.
    batch = 2 * len(labels)
    sample(model, labels, 1, args.guidance, args.seed)
    advance()
    if held_out is not None:
        generator = torch.Generator().manual_seed(LOSS_SEED)
        variant.loss = denoising_loss(model, *held_out, generator, batch)
    advance()
    start = time.perf_counter()
    variant.images = sample(model, labels, args.steps, args.guidance, args.seed)
    variant.seconds = time.perf_counter() - start
    advance()


def make_table(variants: Sequence[Variant], title: str) -> Table:
    """A row a variant: its loss, how far its pictures are from the plain ones, and the seconds."""
    plain = variants[0]
    table = Table(title=title, title_justify="left")
    for name in ("", "held-out loss", "PSNR to plain", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    for i, variant in enumerate(variants):
        loss = "" if variant.loss is None else f"{variant.loss:.4f}"
        if variant is not plain and variant.loss is not None and plain.loss is not None:
            loss += f" ({variant.loss / plain.loss - 1:+.1%})"
        psnr = "" if variant is plain else f"{variant.psnr(plain):.1f} dB"
        last = i + 1 == len(variants) or variants[i + 1].method != variant.method
        table.add_row(variant.label, loss, psnr, f"{variant.seconds:.1f}", end_section=last)
    return table


def draw(path: Path, variants: Sequence[Variant], labels: Tensor, names: Sequence[str], heading: str) -> None:
    """Write the picture: a row a variant, a column a label."""
    side, gap, left, top = 0.9, 0.05, 1.05, 0.65  # inches
    width, height = left + len(labels) * (side + gap), top + len(variants) * (side + gap)
    figure = new_figure(width, height)
    figure.text(0.1 / width, 1 - 0.25 / height, heading, fontsize=10)
    plain = variants[0]
    for row, variant in enumerate(variants):
        bottom = height - top - row * (side + gap) - side
        note = "" if variant is plain else f"\n{variant.psnr(plain):.1f} dB"
        place = ((left - 2 * gap) / width, (bottom + side / 2) / height)
        figure.text(*place, variant.label + note, ha="right", va="center", fontsize=9)
        for column, image in enumerate(variant.images):
            corner = ((left + column * (side + gap)) / width, bottom / height)
            axes = figure.add_axes((*corner, side / width, side / height))
            axes.set(xticks=[], yticks=[])
            axes.imshow(((image + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
            if not row:
                axes.set_title(names[int(labels[column])], fontsize=9, pad=3)
    save_figure(figure, path)


def usable_methods(methods: Sequence[str], console: Console) -> list[str]:
    """The methods asked for, less tomesd if it is not installed, which is said."""
    if "tomesd" in methods and importlib.util.find_spec("tomesd") is None:
        console.print("tomesd is left out: it is not installed (pip install tomesd)")
        return [method for method in methods if method != "tomesd"]
    return list(methods)


def load_held_out(source: str, count: int, console: Console) -> tuple[Tensor, Tensor] | None:
    """Test pictures like those that the denoiser was trained on, or None where they are not."""
    try:
        return load_pictures(source, "test", count)
    except FileNotFoundError:
        console.print("The held-out loss is left out: CIFAR-10's test pictures are not there")
        return None


def train_first(minutes: float, folder: str, console: Console) -> Path:
    """Train a denoiser for so long, without leaving anything behind; its weights."""
    training = importlib.import_module("train_diffusion")
    path = Path(folder) / "denoiser.safetensors"
    flags = ["--minutes", str(minutes), "--folder", folder, "--output", str(path)]
    training.run_training(training.parse([*flags, "--threads", str(torch.get_num_threads())]), console)
    return path


def run(args: argparse.Namespace, weights: Path, console: Console) -> None:
    model, facts = load_model(weights), read_facts(weights)
    labels = torch.tensor(args.labels)
    held_out = load_held_out(facts["source"], 2 * len(labels) * args.loss_batches, console)
    variants = make_variants(usable_methods(args.methods, console), args.ratio, args.inner_backend)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Variants share one forward, and Dynamo stops after eight compilations of one code object.
    room = torch._dynamo.config.patch(recompile_limit=64)
    with room, Progress(*columns, console=console) as progress:
        for variant in variants:
            task = progress.add_task(variant.label, total=3)
            with prepare(model, variant, args.inner_backend, args.strategy) as prepared:
                run_variant(variant, prepared, held_out, labels, args, partial(progress.advance, task))
    names = (*(CLASSES if facts["source"] == "cifar" else "0123456789"), "no class")
    heading = f"{args.steps} steps of DDIM, guidance {args.guidance:g}, from the same noise: tokens merged by ratio"
    drawn = [variant for variant in variants if variant.method != "compiled"]
    draw(args.output, drawn, labels, names, heading)
    pictures = "no" if held_out is None else str(len(held_out[1]))
    title = f"{len(labels)} pictures in {args.steps} steps; loss of {pictures} held-out pictures"
    console.print(make_table(variants, title))


def parse(flags: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="what train_diffusion.py wrote (safetensors)")
    parser.add_argument("--train-minutes", type=float, help="train a denoiser for so long first, instead of --weights")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.3, 0.5, 0.6], help=f"one or several, up to {MOST}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to set beside plain")
    parser.add_argument("--strategy", choices=STRATEGIES, default="auto", help="tofu's; tomesd takes the mean")
    parser.add_argument("--labels", type=int, nargs="+", default=list(range(NULL)), help=f"classes; {NULL} is none")
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--guidance", type=float, default=2.0, help="1 is none")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--loss-batches", type=int, default=3, help="held-out pictures, twice the labels in each batch")
    parser.add_argument("--inner-backend", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path("tofu_diffusion.png"), help="the picture to write")
    args = parser.parse_args(flags)
    for name in ("loss_batches", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 1 <= args.steps <= TRAIN_TIMESTEPS:
        parser.error(f"--steps must be from 1 to {TRAIN_TIMESTEPS}, got {args.steps}")
    if wrong := [ratio for ratio in args.ratio if not 0 < ratio <= MOST]:
        parser.error(f"--ratio must be above 0 and at most {MOST}, got {wrong[0]:g}")
    if wrong := [label for label in args.labels if not 0 <= label <= NULL]:
        parser.error(f"--labels must be from 0 to {NULL}, got {wrong[0]}")
    if args.train_minutes is not None and not args.train_minutes > 0:
        parser.error(f"--train-minutes must be more than 0, got {args.train_minutes:g}")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output {args.output}: the folder {args.output.parent} does not exist")
    return args


def main() -> None:
    args = parse()
    console = Console()
    start = time.perf_counter()
    torch.set_num_threads(args.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            weights = args.weights if args.train_minutes is None else train_first(args.train_minutes, folder, console)
            run(args, weights, console)
    except (FileNotFoundError, ValueError, TofuError) as error:
        raise SystemExit(f"diffusion: {error}") from None
    console.print(f"Picture: {args.output} ({time.perf_counter() - start:.0f} s in all)", highlight=False)


if __name__ == "__main__":
    main()
