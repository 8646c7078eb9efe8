"""Train the denoiser of `examples/diffusion_model.py`, and write examples/denoiser.safetensors.

    python examples/train_diffusion.py --minutes 61                          # as for the carried file: one core
    python examples/train_diffusion.py --minutes 61 --resume                 # go on where a run was cut off
    python examples/train_diffusion.py --source digits --minutes 5 --output digits.safetensors

The first part of the time goes to pictures of half the size, 16x16, which is four to five times as quick for each: the
model learns there what the classes look like. The rest goes to the 32x32 pixels that the model is for. Token
reduction takes no part in the training.

The model predicts the velocity (v-prediction) at a random timestep for each picture; in a tenth of the cases it is not
told the class. What is written are not the last weights but their running average, and nothing is ever chosen by
the held-out loss, which is shown while training. A checkpoint is written beside it, to --folder, every few minutes.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusion_model import (
    NULL,
    SIZE,
    SOURCES,
    TRAIN_TIMESTEPS,
    WEIGHTS,
    Denoiser,
    build_model,
    default_source,
    denoising_loss,
    load_model,
    load_pictures,
    save_model,
    velocity_loss,
)
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from tofu_fx.extras import MissingExtraError

FOLDER = Path(tempfile.gettempdir()) / "tofu_fx_denoiser"
CHECKPOINT = "checkpoint.pt"
NO_CLASS_SHARE = 0.1
WARMUP_SHARE = 0.02
AVERAGE_DECAY = 0.999
HELD_OUT_SEED = 1


@dataclass
class Run:
    """What a checkpoint holds, besides the generator's state: a training under way.

    Attributes:
        model: as it is trained.
        average: the running average of its weights, which is what gets written.
        optimizer: AdamW.
        generator: of everything random but the initial weights.
        steps: done so far.
        seconds: spent on them, over all runs.
        pictures: seen at half and at full size.
    """

    model: Denoiser
    average: Denoiser
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    steps: int
    seconds: float
    pictures: list[int]


def start_run(args: argparse.Namespace) -> Run:
    torch.manual_seed(args.seed)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=args.weight_decay)
    return Run(model, copy.deepcopy(model), optimizer, torch.Generator().manual_seed(args.seed), 0, 0.0, [0, 0])


def save_run(run: Run, source: str, folder: Path) -> None:
    """Write the checkpoint in one move, so that a run killed meanwhile leaves the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "source": source,
        "model": run.model.state_dict(),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generator": run.generator.get_state(),
        "steps": run.steps,
        "seconds": run.seconds,
        "pictures": run.pictures,
    }
    torch.save(state, folder / f"{CHECKPOINT}.part")
    (folder / f"{CHECKPOINT}.part").replace(folder / CHECKPOINT)


def resume_run(args: argparse.Namespace) -> Run:
    """The run of the checkpoint in `args.folder`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it was trained on other pictures.
    """
    path = args.folder / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: leave out --resume, or pass its --folder")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["source"] != args.source:
        raise ValueError(f"{path} was trained on {state['source']}, not on {args.source}: pass --source")
    run = start_run(args)
    for name in ("model", "average", "optimizer"):
        getattr(run, name).load_state_dict(state[name])
    run.generator.set_state(state["generator"])
    run.steps, run.seconds, run.pictures = state["steps"], state["seconds"], state["pictures"]
    return run


def done_share(run: Run, args: argparse.Namespace) -> float:
    """How much of the training is done, 0 to 1: by steps if their number was given, else by time."""
    share: float = run.steps / args.steps if args.steps else run.seconds / (60 * args.minutes)
    return min(share, 1.0)


def learning_rate(share: float, peak: float) -> float:
    """A linear warm-up, then half a cosine down to 1% of the peak; `share` is how much of the training is done."""
    rate = peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
    return min(rate, peak * (0.05 + 0.95 * share / WARMUP_SHARE))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, steps: int) -> None:
    """Move the average towards the model: quickly at first, when the average still holds the random start."""
    decay = min(AVERAGE_DECAY, (1 + steps) / (10 + steps))
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def make_batch(
    images: Tensor, labels: Tensor, count: int, args: argparse.Namespace, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random pictures, at random mirrored where that leaves them what they are, and their labels or none."""
    chosen = torch.randint(len(images), (count,), generator=generator)
    batch, named = images[chosen], labels[chosen]
    mirrored = torch.rand(count, generator=generator) < 0.5
    if args.source == "cifar":
        batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
    unnamed = torch.rand(count, generator=generator) < NO_CLASS_SHARE
    return batch, named.masked_fill(unnamed, NULL)


def train_step(run: Run, images: Tensor, labels: Tensor, args: argparse.Namespace) -> float:
    """One update of the weights and of their average; the loss before it."""
    start = time.perf_counter()
    share = done_share(run, args)
    coarse = share < args.coarse_share
    # A picture of full size takes several times as long: half as many a step keep the steps frequent.
    count = args.batch if coarse else max(1, args.batch // 2)
    batch, named = make_batch(images, labels, count, args, run.generator)
    if coarse:
        batch = F.avg_pool2d(batch, 2)
    timesteps = torch.randint(TRAIN_TIMESTEPS, (count,), generator=run.generator)
    noise = torch.randn(batch.shape, generator=run.generator)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(share, args.lr)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
        loss = velocity_loss(run.model, batch, named, timesteps, noise)
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    update_average(run.average, run.model, run.steps)
    run.steps += 1
    run.pictures[0 if coarse else 1] += count
    run.seconds += time.perf_counter() - start
    return loss.item()


def train(run: Run, args: argparse.Namespace, progress: Progress) -> None:
    """Train until the time is over or the steps are done, with a checkpoint every few minutes and at the end."""
    images, labels = load_pictures(args.source, "train")
    watched = load_pictures(args.source, "test", args.watched)
    task = progress.add_task("train", total=1.0)
    losses: list[float] = []
    saved = run.seconds
    while (share := done_share(run, args)) < 1:
        losses.append(train_step(run, images, labels, args))
        progress.update(task, completed=share)
        if run.seconds - saved >= 60 * args.save_minutes or done_share(run, args) == 1:
            save_run(run, args.source, args.folder)
            held_out = denoising_loss(run.average, *watched, torch.Generator().manual_seed(HELD_OUT_SEED))
            progress.console.print(
                f"minute {run.seconds / 60:5.1f}  step {run.steps:6d}  pictures {run.pictures[0]} + {run.pictures[1]}"
                f"  loss {sum(losses) / len(losses):.4f}  held out {held_out:.4f}",
                highlight=False,
            )
            losses, saved = [], run.seconds


def run_training(args: argparse.Namespace, console: Console) -> None:
    torch.set_num_threads(args.threads)
    # Before the minutes of training: pictures that are missing should not be found out after them.
    images, labels = load_pictures(args.source, "test", args.test_images)
    run = resume_run(args) if args.resume else start_run(args)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        train(run, args, progress)
    facts: dict[str, object] = {
        "script": "examples/train_diffusion.py",
        "class": "diffusers.UNet2DConditionModel",
        "source": args.source,
        "data": {"cifar": "CIFAR-10", "digits": "scikit-learn load_digits, 8x8 to 32x32"}[args.source],
        "prediction": "velocity",
        "pictures_seen": {f"{SIZE // 2} pixels": run.pictures[0], f"{SIZE} pixels": run.pictures[1]},
        "steps": run.steps,
        "minutes": round(run.seconds / 60, 1),
        "seed": args.seed,
        "threads": args.threads,
        "torch": torch.__version__,
    }
    # Rounding to float16 comes first, so that the loss stated is that of the file.
    save_model(run.average, args.output, facts)
    loss = denoising_loss(load_model(args.output), images, labels, torch.Generator().manual_seed(HELD_OUT_SEED))
    held_out = {"held_out_loss": loss, "held_out_images": len(images), "held_out_seed": HELD_OUT_SEED}
    save_model(run.average, args.output, {**facts, **held_out})
    console.print(
        f"Held-out loss: {loss:.4f} of {len(images)} pictures\n"
        f"Trained in {run.seconds / 60:.1f} minutes, {run.steps} steps\n"
        f"Denoiser: {args.output} ({args.output.stat().st_size / 1e6:.2f} MB)",
        highlight=False,
    )


def parse(flags: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=SOURCES, default=default_source(), help="the pictures")
    parser.add_argument("--minutes", type=float, default=61.0, help="how long to train, of all runs together")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--coarse-share", type=float, default=0.4, help="how much of that at half the size, 0 to 1")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step at half the size; half as many at full")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="the peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--no-bfloat16", dest="bfloat16", action="store_false", help="train in float32 throughout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--watched", type=int, default=50, help="test pictures of the loss shown while training")
    parser.add_argument("--test-images", type=int, default=200, help="test pictures of the loss that the file states")
    parser.add_argument("--save-minutes", type=float, default=4.0, help="time between checkpoints")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the checkpoint is")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="the file to write (safetensors)")
    args = parser.parse_args(flags)
    for name in ("steps", "batch", "threads", "watched", "test_images"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("minutes", "save_minutes"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0, got {getattr(args, name)}")
    if not 0 <= args.coarse_share <= 1:
        parser.error(f"--coarse-share must be from 0 to 1, got {args.coarse_share}")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output {args.output}: the folder {args.output.parent} does not exist")
    return args


def main() -> None:
    args = parse()
    try:
        run_training(args, Console())
    except (FileNotFoundError, ValueError, MissingExtraError) as error:
        raise SystemExit(f"train_diffusion: {error}") from None


if __name__ == "__main__":
    main()
