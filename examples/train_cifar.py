"""Train the CIFAR-10 classifier of `examples/cifar_model.py`, and write examples/cifar_head.safetensors.

    python examples/train_cifar.py                                # 20 to 30 minutes on two idle cores
    python examples/train_cifar.py --coarse 16000 --fine 1000     # as many pictures as for the carried file
    python examples/train_cifar.py --coarse 2000 --fine 0 --test-images 500 --output try.safetensors

The backbone is DINOv2 ViT-S/14 as fine-tuned for saliency, which made it forget much of what things are: a linear
classifier on its frozen features stays far behind. So each linear layer of its blocks learns a small correction, the
product of two narrow matrices (LoRA), together with the head; the weights themselves stay. Token reduction takes no
part in the training. (Of the carried file the two phases, 98 and 196 pixels, were run one after another by hand, not
in one run of this script.)

Each picture is seen once, at random mirrored, so that the accuracy shown while training is that on pictures not seen
before, and nothing is ever chosen by test accuracy. Most are seen at 98 pixels a side, 50 tokens, which is far quicker;
the last ones at the 196 pixels, 197 tokens, that the model is for.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar_model import FILES, HEAD, LINEAR, SIZE, CifarModel, build_backbone, load_cifar, load_model, prepare
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from saliency_model import MODEL
from torch import Tensor, nn

from tofu_fx.extras import MissingExtraError, need

COARSE_SIZE = SIZE // 2
WARMUP_STEPS = 30
SHOWN_STEPS = 50
EVALUATION_BATCH = 25


class Adapted(nn.Module):
    """A linear layer that stays as it is, plus a correction of rank `rank` that starts at 0."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """What the linear layer gives, corrected."""
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)


def adapt(backbone: nn.Module, rank: int) -> nn.Module:
    """Freeze the backbone and correct each linear layer of its blocks, in place."""
    backbone.requires_grad_(False)
    for block in backbone.blocks:
        for name in LINEAR:
            block.set_submodule(name, Adapted(block.get_submodule(name), rank))
    return backbone


def trained_parameters(model: CifarModel) -> dict[str, nn.Parameter]:
    """The corrections and the head, by the names they have in the file."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear warm-up, then half a cosine down to 2% of the peak."""
    warmup = max(1, min(WARMUP_STEPS, steps // 10))
    rate = peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    return min(rate, peak * (step + 1) / warmup)


def train_phase(
    model: CifarModel,
    images: Tensor,
    labels: Tensor,
    size: int,
    args: argparse.Namespace,
    generator: torch.Generator,
    advance: Callable[[int], None],
    show: Callable[[str], None],
) -> None:
    """One pass over the pictures at `size` pixels a side."""
    trained = trained_parameters(model)
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=args.weight_decay)
    batches = torch.randperm(len(images), generator=generator).split(args.batch)
    peak = args.lr if size == COARSE_SIZE else args.fine_lr
    right, seen = 0, 0
    for step, chosen in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), peak)
        mirrored = (torch.rand(len(chosen), generator=generator) < 0.5)[:, None, None, None]
        batch = torch.where(mirrored, images[chosen].flip(-1), images[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(prepare(batch, size)).float()
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        right += int((logits.argmax(1) == labels[chosen]).sum())
        seen += len(chosen)
        if (step + 1) % SHOWN_STEPS == 0 or step + 1 == len(batches):
            show(f"{size} pixels, step {step + 1:4d} of {len(batches)}: {right / seen:.1%} right since the last line")
            right, seen = 0, 0
        advance(len(chosen))


def train(args: argparse.Namespace, progress: Progress) -> dict[str, Tensor]:
    """The weights trained, by the file's names, in float16."""
    images, labels = load_cifar("train", args.coarse + args.fine, args.train)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    weights: dict[str, Tensor] = {}
    ends = (args.coarse, args.coarse + args.fine)
    for size, start, end in ((COARSE_SIZE, 0, ends[0]), (SIZE, *ends)):
        if start == end:
            continue
        model = CifarModel(adapt(build_backbone(args.backbone, size), args.rank))
        model.load_state_dict(weights, strict=False)
        task = progress.add_task(f"train, {size} pixels", total=end - start)
        train_phase(
            model,
            images[start:end],
            labels[start:end],
            size,
            args,
            generator,
            lambda count, task=task: progress.advance(task, count),
            lambda line: progress.console.print(line, highlight=False),
        )
        weights = {name: value.detach() for name, value in trained_parameters(model).items()}
    return {name: value.half().contiguous() for name, value in weights.items()}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, advance: Callable[[int], None]) -> float:
    """The share of pictures named rightly, 0 to 1."""
    right = 0
    for batch, wanted in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        right += int((model(prepare(batch)).argmax(1) == wanted).sum())
        advance(len(batch))
    return right / len(labels)


def save(weights: dict[str, Tensor], path: Path, facts: dict[str, object]) -> None:
    """Write the weights with `facts` in the metadata, as JSON strings: a safetensors header maps strings to strings."""
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    need("safetensors.torch").save_file(weights, str(path), metadata=metadata)


def run(args: argparse.Namespace, console: Console) -> None:
    start = time.perf_counter()
    torch.set_num_threads(args.threads)
    # Before the minutes of training: a test file that is missing should not be found out after them.
    images, labels = load_cifar("test", args.test_images, args.test)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    facts: dict[str, object] = {
        "script": "examples/train_cifar.py",
        "train_images": {f"{COARSE_SIZE} pixels": args.coarse, f"{SIZE} pixels": args.fine},
        "rank": args.rank,
        "seed": args.seed,
        "threads": args.threads,
        "torch": torch.__version__,
    }
    with Progress(*columns, console=console) as progress:
        weights = train(args, progress)
        trained = time.perf_counter()
        save(weights, args.output, facts)
        task = progress.add_task("test", total=len(images))
        # That of the file, rounded to float16, in the model as others load it.
        model = load_model(args.backbone, args.output)
        share = accuracy(model, images, labels, lambda count: progress.advance(task, count))
    save(weights, args.output, {**facts, "test_accuracy": share, "test_images": len(images)})
    console.print(
        f"Test accuracy: {share:.2%} of {len(images)} pictures\n"
        f"Trained in {(trained - start) / 60:.1f} minutes, tested in {(time.perf_counter() - trained) / 60:.1f}\n"
        f"Head: {args.output} ({args.output.stat().st_size / 1e6:.2f} MB)",
        highlight=False,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, default=MODEL, help="the saliency model (safetensors)")
    parser.add_argument("--train", type=Path, default=FILES["train"], help="the pictures to train on (npz)")
    parser.add_argument("--test", type=Path, default=FILES["test"], help="the pictures to test on (npz)")
    parser.add_argument("--coarse", type=int, default=20000, help=f"training pictures seen at {COARSE_SIZE} pixels")
    parser.add_argument("--fine", type=int, default=4000, help=f"training pictures seen at {SIZE} pixels, others")
    parser.add_argument("--test-images", type=int, default=2000, help="test pictures, 5000 at most")
    parser.add_argument("--rank", type=int, default=16, help="rank of the corrections")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3, help=f"the peak learning rate at {COARSE_SIZE} pixels")
    parser.add_argument("--fine-lr", type=float, default=5e-4, help=f"the peak learning rate at {SIZE} pixels")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--output", type=Path, default=HEAD, help="the file to write (safetensors)")
    args = parser.parse_args()
    for name, least in {"coarse": 0, "fine": 0, "test_images": 1, "rank": 1, "batch": 1, "threads": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if not args.coarse + args.fine:
        parser.error("--coarse and --fine are both 0: there is nothing to train on")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output {args.output}: the folder {args.output.parent} does not exist")
    return args


def main() -> None:
    args = parse()
    try:
        run(args, Console())
    except (FileNotFoundError, ValueError, MissingExtraError) as error:
        raise SystemExit(f"train_cifar: {error}") from None


if __name__ == "__main__":
    main()
