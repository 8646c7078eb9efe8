"""A dense model on fewer tokens: DINOv2 saliency maps of photographs, plain against `backend="tofu"`.

    python examples/saliency.py                                # 84 photographs, r = 12 in each of 12 layers
    python examples/saliency.py --every 1                      # all 250
    python examples/saliency.py --strategy mlerp switched      # the paper's order, switched after --switch 3 layers
    python examples/saliency.py --strategy mlerp --speed       # images/s through inductor besides

Prints how far the maps of each strategy are from those of the plain model, and writes a picture: photo, plain map,
tofu map, merged tokens. The head needs every token in its place on the 16 x 16 grid; the compiler finds that out from
the graph and restores whole tokens there, so nothing in the model knows that it ran on fewer.

The weights and photographs are not part of this repository: give their places with --model and --photos.
The first line takes about 85 s of CPU time; on two cores that other jobs kept busy as well, 2 to 3 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from saliency_model import GRID, MODEL, PHOTOS, SaliencyModel, load_model, load_photos, normalise
from torch import Tensor

import tofu_fx
from tofu_fx.demo.draw import fill_groups, group_borders
from tofu_fx.extras import MissingExtraError, need

SWITCHED = "switched"
STRATEGIES = ("prune", "mean", "mlerp", SWITCHED, "auto")
DRAWN = 6
SPEED_CALLS = 7


@dataclass
class Variant:
    """One way to run the model.

    Attributes:
        name: "plain" or a strategy.
        label: what the table calls it.
        options: for `torch.compile(..., backend="tofu")`; None for the plain model.
        maps: float32 `[n, 1, 224, 224]`, once it ran.
        images_per_second: through inductor; None if not asked for.
    """

    name: str
    label: str
    options: dict[str, Any] | None
    maps: Tensor = field(default_factory=lambda: torch.empty(0))
    images_per_second: float | None = None

    def errors(self, plain: Variant) -> Tensor:
        """Mean absolute error of each photograph's map against the plain model's, `[n]`."""
        return (self.maps - plain.maps).abs().mean((1, 2, 3))


def switched_plan(plan: tofu_fx.Plan, layers: int) -> tofu_fx.Plan:
    """The paper's order with a switch of one's own: prune in the first `layers` rows of a plan, mlerp after."""
    rows = [
        row.model_copy(update={"strategy": "prune" if depth < layers else "mlerp"})
        for depth, row in enumerate(plan.sites)
    ]
    return tofu_fx.Plan(sites=rows)


def make_variants(strategies: Sequence[str], r: int, switch: int, plan: tofu_fx.Plan) -> list[Variant]:
    """The plain model, then a variant for each strategy; `plan` is what the switched one is edited from."""
    layers = len(plan.sites)
    labels = {
        SWITCHED: f"prune {switch}, then mlerp",
        "auto": f"auto: prune {-(-layers // 2)}, then mlerp",
    }
    variants = [Variant("plain", "plain", None)]
    for strategy in strategies:
        switched = {"plan": switched_plan(plan, switch)}
        options = switched if strategy == SWITCHED else {"r": r, "strategy": strategy}
        # An example must not pass over a failure in silence by compiling the untouched graph.
        variants.append(Variant(strategy, labels.get(strategy, strategy), {**options, "on_error": "raise"}))
    return variants


def compile_variant(variant: Variant, model: SaliencyModel, inner_backend: str) -> Callable[[Tensor], Tensor]:
    """The variant as a function of a batch, compiled at its first call; plain eager is the model itself."""
    if variant.options is None:
        return model if inner_backend == "eager" else torch.compile(model, backend=inner_backend, dynamic=False)
    options = {**variant.options, "inner_backend": inner_backend}
    return torch.compile(model, backend="tofu", options=options, dynamic=False)


def run_maps(
    call: Callable[[Tensor], Tensor], images: Tensor, batch: int, workers: int, advance: Callable[[int], None]
) -> Tensor:
    """All maps `[n, 1, 224, 224]`, `workers` batches at a time.

    A last batch that is not full is filled up, so that one shape is compiled.
    """

    @torch.no_grad()  # which is a setting of each thread
    def maps_of(part: Tensor) -> Tensor:
        missing = min(batch, len(images)) - len(part)
        maps = call(torch.cat([part, images[:missing]]))[: len(part)]
        advance(len(part))
        return maps

    first, *others = images.split(batch)
    with ThreadPoolExecutor(workers) as pool:
        # The first one compiles; the others start when it is done.
        return torch.cat([maps_of(first), *pool.map(maps_of, others)])


def measure_speed(
    calls: Sequence[Callable[[Tensor], Tensor]], images: Tensor, advance: Callable[[int], None]
) -> list[float]:
    """Images a second of each call: those of one batch over the median time, the first, compiling one not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(SPEED_CALLS + 1):
        # In turns, so that whatever else the machine does meets all of them.
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call(images)
            if turn:
                taken.append(time.perf_counter() - start)
            advance(1)
    return [len(images) / statistics.median(taken) for taken in seconds]


def make_table(variants: Sequence[Variant], explanation: tofu_fx.Explanation, title: str) -> Table:
    """A row a variant: how far its maps are from the plain ones, and what it computes."""
    plain = variants[0]
    table = Table(title=title, title_justify="left")
    for name in ("strategy", "error", "worst photo", "tokens at the end", "FLOPs"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    if plain.images_per_second is not None:
        table.add_column("images/s", justify="right")
    share = explanation.flops_after / explanation.flops_before
    for variant in variants:
        errors = variant.errors(plain)
        cells = ["", "", str(explanation.tokens_before), "100%"]
        if variant is not plain:
            cells = [f"{errors.mean():.4f}", f"{errors.max():.4f}", str(explanation.tokens_after), f"{share:.0%}"]
        if plain.images_per_second is not None and variant.images_per_second is not None:
            speed_up = variant.images_per_second / plain.images_per_second
            cells.append(f"{variant.images_per_second:.1f} ({speed_up:.2f}x)")
        table.add_row(variant.label, *cells, end_section=variant is plain)
    return table


def fill_photo(photo: Tensor, groups: Tensor) -> Tensor:
    """A photo `[3, S, S]`, its `groups` `[16, 16]` in their mean colours; a patch that is alone keeps its pixels."""
    return torch.stack([fill_groups(channel, groups) for channel in photo])


def draw(
    path: Path, photos: Tensor, plain: Tensor, tofu: Tensor, groups: Tensor, heading: str, names: Sequence[str]
) -> None:
    """Write the picture: a column a photograph; rows photo, plain map, tofu map, merged tokens.

    Args:
        path: the PNG to write; its folder must exist.
        photos: `[n, 3, S, S]`, 0 to 1.
        plain: maps of the plain model, `[n, 1, S, S]`.
        tofu: maps of the reduced model, `[n, 1, S, S]`.
        groups: int64 `[n, 256]`, which final token each patch belongs to.
        heading: the title over everything.
        names: what the four rows are called.
    """
    side, gap, left, top = 1.7, 0.08, 1.2, 0.45  # inches
    width, height = left + len(photos) * (side + gap), top + 4 * (side + gap)
    # The object interface with the Agg canvas: no display is needed and the caller's pyplot state is left alone.
    figure = need("matplotlib.figure").Figure(figsize=(width, height), facecolor="white")
    need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    figure.text(0.1 / width, 1 - 0.28 / height, heading, fontsize=11)
    errors = (tofu - plain).abs().mean((1, 2, 3))
    box = {"facecolor": "black", "alpha": 0.5, "edgecolor": "none", "pad": 1.5}

    def axes_at(row: int, column: int) -> Any:
        corner = (left + column * (side + gap), height - top - row * (side + gap) - side)
        axes = figure.add_axes((corner[0] / width, corner[1] / height, side / width, side / height))
        axes.set(xticks=[], yticks=[])
        return axes

    for row, name in enumerate(names):
        middle = height - top - row * (side + gap) - side / 2
        figure.text((left - gap) / width, middle / height, name, ha="right", va="center", fontsize=9.5)
    for column in range(len(photos)):
        axes_at(0, column).imshow(photos[column].permute(1, 2, 0).numpy())
        axes_at(1, column).imshow(plain[column, 0].numpy(), cmap="magma", vmin=0, vmax=1)
        axes = axes_at(2, column)
        axes.imshow(tofu[column, 0].numpy(), cmap="magma", vmin=0, vmax=1)
        axes.text(6, 216, f"error {errors[column]:.4f}", fontsize=8, color="white", bbox=box)
        axes = axes_at(3, column)
        cells = groups[column].view(GRID, GRID)
        filled = fill_photo(photos[column], cells).permute(1, 2, 0).numpy()
        axes.imshow(filled, extent=(0, GRID, GRID, 0))
        borders = group_borders(cells)
        axes.add_collection(need("matplotlib.collections").LineCollection(borders, colors="white", linewidths=0.6))
    figure.savefig(path, dpi=130)


def run(args: argparse.Namespace, console: Console) -> None:
    # One thread a batch and several batches at a time: threads that share a batch wait for each other, which on cores
    # that others keep busy takes longer than not sharing.
    torch.set_num_threads(1)
    model, photos = load_model(args.model), load_photos(args.photos, args.every)
    images = normalise(photos)
    # One strategy is enough: the tokens and the FLOPs are those of every other. And one photograph: a share is wanted.
    explanation = tofu_fx.explain(model, images[:1], options={"r": args.r, "strategy": "mlerp", "on_error": "raise"})
    if not explanation.matched:
        raise SystemExit(f"saliency: {explanation.graphs[0].outcome if explanation.graphs else 'nothing was traced'}")
    variants = make_variants(args.strategy, args.r, args.switch, explanation.plan)
    plain, *reduced = variants
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Variants share one forward, and Dynamo stops after eight compilations of one code object.
    room = torch._dynamo.config.patch(recompile_limit=64)
    with room, Progress(*columns, console=console) as progress:
        for variant in variants:
            task = progress.add_task(variant.label, total=len(images))
            call = compile_variant(variant, model, "eager")
            advance = partial(progress.advance, task)
            variant.maps = run_maps(call, images, args.batch, args.threads, advance)
        torch.set_num_threads(args.threads)
        if args.speed:
            task = progress.add_task("compiling with inductor, then in turns", total=len(variants) * (SPEED_CALLS + 1))
            calls = [compile_variant(variant, model, "inductor") for variant in variants]
            rates = measure_speed(calls, images[: args.batch], partial(progress.advance, task))
            for variant, rate in zip(variants, rates, strict=True):
                variant.images_per_second = rate
        task = progress.add_task("drawing", total=1)
        shown = next((variant for variant in reduced if variant.name == "mlerp"), reduced[0])
        # Evenly spread over what was measured: no choosing of photogenic ones.
        chosen = torch.linspace(0, len(photos) - 1, min(DRAWN, len(photos))).long()
        (groups,) = tofu_fx.token_groups(model, images[chosen], options=shown.options)
        heading = (
            f"Saliency with {explanation.tokens_before} tokens, and with {explanation.tokens_after} after "
            f"{explanation.matched} layers ({shown.label}): mean absolute error {shown.errors(plain).mean():.4f} "
            f"on {len(photos)} photographs"
        )
        merged = f"tokens merged\n{groups.shape[1] - 1} to {explanation.tokens_after - 1}"
        names = ("photo", "plain map", "tofu map", merged)
        # The class token comes first and is no patch.
        draw(args.output, photos[chosen], plain.maps[chosen], shown.maps[chosen], groups[:, 1:].cpu(), heading, names)
        progress.advance(task)
    title = f"mean absolute error of {len(photos)} maps, r = {args.r} in each of {explanation.matched} layers"
    console.print(make_table(variants, explanation, title))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="the weights (safetensors)")
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="a tar of photographs")
    parser.add_argument("--r", type=int, default=12, help="tokens to remove in each layer")
    parser.add_argument(
        "--strategy",
        nargs="+",
        choices=STRATEGIES,
        default=["prune", "mean", "mlerp"],
        help="one or several; 'switched' prunes in the first layers and merges with mlerp after, see --switch",
    )
    parser.add_argument("--switch", type=int, default=3, help="layers that 'switched' prunes in")
    parser.add_argument("--every", type=int, default=3, help="take every n-th photograph")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--speed", action="store_true", help="measure images/s through inductor (minutes of compiling)")
    parser.add_argument("--output", type=Path, default=Path("tofu_saliency.png"), help="the picture to write")
    args = parser.parse_args()
    for name in ("r", "every", "batch", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output {args.output}: the folder {args.output.parent} does not exist")
    return args


@torch.no_grad()
def main() -> None:
    args = parse()
    console = Console()
    start = time.perf_counter()
    try:
        run(args, console)
    except (FileNotFoundError, MissingExtraError) as error:
        raise SystemExit(f"saliency: {error}") from None
    console.print(f"Picture: {args.output} ({time.perf_counter() - start:.0f} s in all)", highlight=False)


if __name__ == "__main__":
    main()
