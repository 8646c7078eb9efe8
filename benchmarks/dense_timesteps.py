"""Whether one plan serves all timesteps of a denoiser, or each timestep wants one of its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import tofu_fx

#: of the denoiser's eight: nearly a picture, half of each, nearly noise
ALONE = (60, 435, 935)
EAGER = {"inner_backend": "eager", "on_error": "raise"}

#: the picture with its noise, its timestep and its label
Batch = tuple[Tensor, Tensor, Tensor]


def timesteps(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Relative L2 of the prediction on held-out pictures at each timestep: one plan, own plans, the default schedule.

    The plan for all timesteps is calibrated on `args.pictures` batches of every timestep each, a timestep's own plan on
    as many pictures of that one.
    """
    import diffusion_model as example

    model = example.load_model()

    def batches(split: str, chosen: Sequence[int], count: int) -> dict[int, Batch]:
        pictures, labels = example.load_pictures("cifar", split, count)
        found = {}
        for timestep in chosen:
            noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(timestep))
            times = torch.full((count,), timestep)
            found[timestep] = (example.noise_schedule().add_noise(pictures, noise, times), times, labels)
        return found

    def calibrated(chosen: Sequence[int], count: int) -> tofu_fx.Plan:
        given = list(batches("train", chosen, count).values())
        return tofu_fx.calibrate(model, given, flops=args.flops, inner_backend="eager", batch_size=16)

    each = max(1, args.pictures // len(example.TIMESTEPS))
    plans = {"one plan": calibrated(example.TIMESTEPS, each)}
    plans |= {f"plan of {timestep}": calibrated([timestep], args.pictures) for timestep in ALONE}
    held_out = batches("test", example.TIMESTEPS, args.pictures)
    ways = {name: {"plan": plan} for name, plan in plans.items()}
    ways["uniform mean"] = {"ratio": _ratio(model, held_out[ALONE[0]], args.flops), "profitable_only": False}
    rows = []
    for name, options in ways.items():
        torch._dynamo.reset()
        call = torch.compile(model, backend="tofu", options={**EAGER, **options})
        share = tofu_fx.explain(model, *held_out[ALONE[0]], options={**EAGER, **options})
        errors = {timestep: _error(call, model, batch) for timestep, batch in held_out.items()}
        row = {"row": name, "flops": round(share.flops_after / share.flops_before, 4)}
        row |= {f"t = {timestep}": round(error, 5) for timestep, error in errors.items()}
        rows.append({**row, "mean": round(sum(errors.values()) / len(errors), 5)})
        console.print(rows[-1])
    chosen = {name: [[row.strategy, row.match, row.r] for row in plan.sites] for name, plan in plans.items()}
    return {"pictures": args.pictures, "flops": args.flops, "rows": rows, "plans": chosen}


@torch.no_grad()
def _error(call: Any, model: nn.Module, batch: Batch) -> float:
    """Mean over the pictures of a batch."""
    off = []
    for start in range(0, len(batch[0]), 16):
        part = tuple(value[start : start + 16] for value in batch)
        plain = model(*part)
        off.append((call(*part) - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1))
    return float(torch.cat(off).mean())


def _ratio(model: nn.Module, batch: Batch, flops: float) -> float:
    """The ratio whose share of the operations is nearest, from above in cost."""
    low, high = 0.0, 0.75
    for _ in range(8):
        middle = (low + high) / 2
        found = tofu_fx.explain(model, *batch, options={**EAGER, "ratio": middle, "profitable_only": False})
        low, high = (low, middle) if found.flops_after <= flops * found.flops_before else (middle, high)
    return high
