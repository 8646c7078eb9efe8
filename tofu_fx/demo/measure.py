"""Plain inductor against tofu, measured in one process: the variants take turns on the same batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tofu_fx
from tofu_fx.demo.data import NUMBER_DIGITS, Numbers
from tofu_fx.demo.model import read_digits

PLAIN = "plain"


@dataclass
class Variant:
    """One way to run the model, and what was measured of it.

    Attributes:
        strategy: "plain", or the strategy that tofu was given.
        ratio: the share of tokens that tofu was told to remove; 0 for plain.
        inner_backend: the backend that compiles the graph ("inductor", or "aot_eager" in a quick run).
        call: the compiled model, images `[batch, 1, 16, 64]` to logits `[batch, 40]`.
        tokens: how many tokens the last layer works on.
        flops: floating-point operations for one image.
        compile_seconds: from nothing to the first result.
        batch_size: images in each timed call.
        seconds: one wall time for each call.
        found: int64 `[n, 4]`, the digits read in the images run so far.
    """

    strategy: str
    ratio: float
    inner_backend: str
    call: Callable[[Tensor], Tensor]
    tokens: int = 0
    flops: float = 0.0
    compile_seconds: float = 0.0
    batch_size: int = 0
    seconds: list[float] = field(default_factory=list)
    found: Tensor = field(default_factory=lambda: torch.empty(0, NUMBER_DIGITS, dtype=torch.long))

    @property
    def label(self) -> str:
        """What a reader calls it, such as "mlerp 0.5"."""
        return f"plain {self.inner_backend}" if self.strategy == PLAIN else f"{self.strategy} {self.ratio:g}"

    @property
    def options(self) -> dict[str, Any]:
        """What a user passes as `torch.compile(model, backend="tofu", options=...)` to get this variant."""
        # on_error: by default a failed pass leaves the graph untouched, and the demo would measure plain against plain.
        return {
            "ratio": self.ratio,
            "strategy": self.strategy,
            "inner_backend": self.inner_backend,
            "on_error": "raise",
        }

    @property
    def median_seconds(self) -> float:
        """The median wall time of a call."""
        return statistics.median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """Images a second at the median wall time."""
        return self.batch_size / self.median_seconds

    def accuracy(self, labels: Tensor) -> float:
        """The share of digits read rightly, 0 to 1; `labels` is `[n, 4]`."""
        return float((self.found == labels).double().mean())


def make_variants(
    model: nn.Module, strategies: Sequence[str], ratios: Sequence[float], inner_backend: str
) -> list[Variant]:
    """Plain first, then every strategy at every ratio; nothing is compiled before the first call."""
    plain: Callable[[Tensor], Tensor] = torch.compile(model, backend=inner_backend)
    variants = [Variant(PLAIN, 0.0, inner_backend, plain)]
    for strategy in strategies:
        for ratio in ratios:
            variant = Variant(strategy, ratio, inner_backend, model)
            variant.call = torch.compile(model, backend="tofu", options=variant.options)
            variants.append(variant)
    return variants


@torch.no_grad()
def count_work(variants: Sequence[Variant], model: nn.Module, sample: Tensor) -> Iterator[Variant]:
    """Fill in each variant's tokens and operations, and yield it when it has them.

    To be used up before anything is compiled: `tofu_fx.explain` clears what Dynamo has compiled.
    """
    plain, *others = variants
    for variant in others:
        explanation = tofu_fx.explain(model, sample, options=variant.options)
        variant.tokens, variant.flops = explanation.tokens_after, explanation.flops_after / len(sample)
        plain.tokens, plain.flops = explanation.tokens_before, explanation.flops_before / len(sample)
        yield variant


@torch.no_grad()
def compile_variant(variant: Variant, sample: Tensor) -> None:
    """Compile by calling it on `sample`, and keep the time that took."""
    start = time.perf_counter()
    variant.call(sample)
    variant.compile_seconds = time.perf_counter() - start


def batches(numbers: Numbers, size: int) -> list[Tensor]:
    """The images in batches of exactly `size`, the last one filled up with its own first image.

    A shorter last batch would be another shape, and a second compilation of every variant.
    """
    parts = list(numbers.images.split(size))
    missing = size - len(parts[-1])
    parts[-1] = torch.cat([parts[-1], parts[-1][:1].expand(missing, -1, -1, -1)])
    return parts


@torch.no_grad()
def run_batch(variants: Sequence[Variant], batch: Tensor, turn: int, count: int) -> None:
    """Run and time every variant on one batch, and keep what it read in the first `count` images.

    The variants take turns, so that a slow moment of the machine is shared by all, and `turn` rotates who goes first.
    """
    start_at = turn % len(variants)
    for variant in [*variants[start_at:], *variants[:start_at]]:
        start = time.perf_counter()
        logits = variant.call(batch)
        variant.seconds.append(time.perf_counter() - start)
        variant.batch_size = len(batch)
        variant.found = torch.cat([variant.found, read_digits(logits[:count])])
