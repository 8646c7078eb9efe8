"""A clock around the token operators, shared by the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from tofu_fx.ops import fuse


def share_in_operators(call: Callable[[], Any], rounds: int = 10) -> float:
    """Share of a run that is spent matching and merging.

    (A profiler's own cost, paid at each of the operator's many small ATen calls, would count double here.)
    """
    inside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                inside += time.perf_counter() - start

        return run

    with mock.patch.object(fuse, "_fuse", timed(fuse._fuse)):
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        return inside / (time.perf_counter() - start)
