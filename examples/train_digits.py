"""Train the vision transformer that `tofu-fx demo` runs, and write tofu_fx/demo/digits_vit.safetensors.

    python examples/train_digits.py                   # the file that the package carries
    python examples/train_digits.py --epochs 2 --fine-epochs 1 --output try.safetensors

The model is timm's own VisionTransformer; token reduction takes no part in the training. Most epochs run with 4x4
patches, 65 tokens instead of 257, which is far quicker; then timm resamples the patch and position
embeddings to 2x2 patches and the last epochs fine-tune those.
While training, a second head names each digit from the mean of its own patches: without that, it takes the class token
long to find out that there are four digits to look at. The second head is thrown away.
Nothing is chosen by test accuracy: the weights after the last epoch are the ones saved.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from tofu_fx.demo.data import NUMBER_DIGITS, Numbers, Scans, load_scans, load_test_numbers, make_numbers
from tofu_fx.demo.model import ARCHITECTURE, WEIGHTS, build_model, load_model, read_digits, save_model
from tofu_fx.extras import need

WARMUP_SHARE = 0.05
COARSE_PATCH = 4


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Cells `[n, 1, S, S]`, each turned, scaled, sheared and shifted a little, then lightened or darkened."""
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    turn, shear, scale_x, scale_y = uniform(0.22), uniform(0.2), 1 + uniform(0.15), 1 + uniform(0.15)
    cos, sin = turn.cos(), turn.sin()
    row_x = torch.stack([cos * scale_x, -sin * scale_y + shear, uniform(0.14)], dim=1)
    row_y = torch.stack([sin * scale_x, cos * scale_y, uniform(0.14)], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    noise = 0.04 * torch.randn(images.shape, generator=generator)
    return (moved * (1 + uniform(0.2))[:, None, None, None] + noise).clamp(0, 1)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Start where a narrow model learns quickly: Xavier weights in the blocks, sines and cosines as positions.

    timm's own start (a deviation of 0.02 everywhere) suits layers several times as wide.
    """
    for layer in model.get_submodule("blocks").modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    grid = [size // COARSE_PATCH for size in ARCHITECTURE["img_size"]]
    positions = need("timm.layers").build_sincos2d_pos_embed(grid, ARCHITECTURE["embed_dim"])
    # The class token's own place, the first, keeps timm's start.
    model.get_parameter("pos_embed")[:, 1:] = 0.5 * positions


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear warm-up, then half a cosine down to 1% of the peak."""
    warmup = max(1, int(steps * WARMUP_SHARE))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


@torch.no_grad()
def accuracy(model: nn.Module, numbers: Numbers, batch: int = 100) -> float:
    """The share of digits read rightly, 0 to 1."""
    model.eval()
    found = torch.cat([read_digits(model(images)) for images in numbers.images.split(batch)])
    return float((found == numbers.labels).double().mean())


def optimizer_for(parameters: list[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    """AdamW that leaves biases, norms and embeddings undecayed, as vision transformers are usually trained."""
    decayed = [p for p in parameters if p.ndim == 2]
    other = [p for p in parameters if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, 10), labels.flatten(), label_smoothing=0.05)


def mean_of_places(model: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens `[n, 1 + patches, C]` to the mean of the patches under each digit, `[n, 4, C]`."""
    rows, columns = model.get_submodule("patch_embed").grid_size
    patches = tokens[:, 1:].unflatten(1, (rows, NUMBER_DIGITS, columns // NUMBER_DIGITS))
    return patches.mean((1, 3))


def train_epoch(
    model: nn.Module,
    place_head: nn.Module,
    optimizer: torch.optim.Optimizer,
    scans: Scans,
    rates: list[float],
    batch: int,
    generator: torch.Generator,
    advance: Callable[[], None],
) -> tuple[float, float]:
    """One pass over the scans in a new arrangement, a learning rate for each step; the mean loss and the accuracy."""
    model.train()
    order = torch.randperm(len(scans.labels), generator=generator)
    losses, right = [], []
    for rate, chosen in zip(rates, order.split(batch * NUMBER_DIGITS), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate
        numbers = make_numbers(augment(scans.images[chosen], generator), scans.labels[chosen])
        tokens = model.forward_features(numbers.images)
        logits = model.forward_head(tokens)
        loss = loss_of(logits, numbers.labels)
        optimizer.zero_grad()
        (loss + loss_of(place_head(mean_of_places(model, tokens)), numbers.labels)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        right.append(float((read_digits(logits) == numbers.labels).float().mean()))
        advance()
    return sum(losses) / len(losses), sum(right) / len(right)


def train(args: argparse.Namespace, console: Console) -> nn.Module:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    scans, _ = load_scans()
    # The first 150 of the 600 hold every test scan once: enough to watch by.
    unseen = load_test_numbers()
    watched = Numbers(unseen.images[:150], unseen.labels[:150])
    steps = len(scans.labels) // (args.batch * NUMBER_DIGITS)
    model = build_model(patch_size=COARSE_PATCH)
    initialise(model)
    place_head = nn.Linear(ARCHITECTURE["embed_dim"], 10)
    phases = [("4x4", args.epochs, args.lr), ("2x2", args.fine_epochs, args.fine_lr)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name, epochs, peak in phases:
            if name == "2x2":
                model.set_input_size(patch_size=ARCHITECTURE["patch_size"])
            optimizer = optimizer_for([*model.parameters(), *place_head.parameters()], args.weight_decay)
            task = progress.add_task(f"{name} patches", total=epochs * steps)
            for epoch in range(epochs):
                rates = [learning_rate(epoch * steps + step, epochs * steps, peak) for step in range(steps)]
                loss, seen = train_epoch(
                    model,
                    place_head,
                    optimizer,
                    scans,
                    rates,
                    args.batch,
                    generator,
                    lambda task=task: progress.advance(task),
                )
                read = accuracy(model, watched)
                progress.console.print(
                    f"{name} patches, epoch {epoch + 1:3d}  loss {loss:.4f}  train {seen:.2%}  test {read:.2%}"
                )
    return model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=120, help="epochs with 4x4 patches")
    parser.add_argument("--fine-epochs", type=int, default=20, help="epochs with 2x2 patches after that")
    parser.add_argument("--batch", type=int, default=8, help="numbers a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="the peak learning rate with 4x4 patches")
    parser.add_argument("--fine-lr", type=float, default=3e-4, help="the peak learning rate with 2x2 patches")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    console = Console()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model = train(args, console)
    facts = {
        "script": "examples/train_digits.py",
        "class": "timm.models.VisionTransformer",
        "data": "four-digit numbers of scikit-learn load_digits scans (1197 to train, 600 to test), 8x8 to 16x16",
        "epochs": {"4x4 patches": args.epochs, "2x2 patches": args.fine_epochs},
        "seed": args.seed,
        "threads": args.threads,
        "torch": torch.__version__,
    }
    # Rounding to float16 comes first, so that the accuracy stated is that of the file.
    save_model(model, args.output, facts)
    facts["test_accuracy"] = accuracy(load_model(args.output), load_test_numbers())
    save_model(model, args.output, facts)
    size = args.output.stat().st_size / 1e6
    minutes = (time.perf_counter() - start) / 60
    console.print(
        f"{args.output}: {size:.2f} MB, {ARCHITECTURE['depth']} layers of {ARCHITECTURE['embed_dim']}, "
        f"test accuracy {facts['test_accuracy']:.2%}, trained in {minutes:.1f} minutes"
    )


if __name__ == "__main__":
    main()
