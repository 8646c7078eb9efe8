"""Measuring speed: several ways to run the same call, in turns in one process, and their ratios to the first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tofu_fx.calibration.batches import Batch


@dataclass(frozen=True)
class Timed:
    """Seconds of a call (median over the rounds), and how many times faster than the first way (median of ratios)."""

    seconds: float
    speedup: float


def time_calls(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int = 7, warmup: int = 2
) -> dict[str, Timed]:
    """Time several calls in turns, so that a machine whose speed drifts drifts for all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + warmup):
        for name, call in calls.items():
            _synchronise(device)
            start = time.perf_counter()
            call()
            _synchronise(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    first = seconds[next(iter(calls))]
    return {
        name: Timed(statistics.median(taken), statistics.median(a / b for a, b in zip(first, taken, strict=True)))
        for name, taken in seconds.items()
    }


@contextmanager
def room_for_variants() -> Iterator[None]:
    """Within it, any number of variants of one model are compiled, and none silently runs as plain Python."""
    # Dynamo counts compilations by code object, not by model: after eight variants of one forward it would stop.
    many = {"recompile_limit": 10_000, "accumulated_recompile_limit": 100_000, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(many):  # type: ignore[no-untyped-call, unused-ignore]
        yield


def compile_variant(model: Any, options: Mapping[str, Any] | None, inner_backend: str) -> Any:
    """The model compiled through tofu with some options, or plain where there are none (a module stays a module).

    A pass that fails is an error when it is first called: a model that was compiled untouched would be measured as if
    it were reduced.
    """
    if options is None:
        return torch.compile(model, backend=inner_backend, dynamic=False)
    chosen = {**options, "inner_backend": inner_backend, "on_error": "raise"}
    return torch.compile(model, backend="tofu", dynamic=False, options=chosen)


def call_with(compiled: Any, batch: Batch) -> Any:
    """The outputs for a batch; what tofu raises while compiling comes out as it was raised."""
    try:
        return compiled(*batch.args, **batch.kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise (error.inner_exception or error) from None


def device_name(device: torch.device) -> str:
    """A device in words: the GPU's name, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    return str(device)


def _processor() -> str:
    from torch.backends import cpu

    return f"CPU ({cpu.get_cpu_capability()})"


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
