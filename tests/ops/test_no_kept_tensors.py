"""No tensor of a device is kept by the package: made while a CUDA graph is captured, it would live in the graph."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.ops.streams import stream
from tofu_fx.ops import fuse_tokens
from tofu_fx.ops.matching import sides


def kept_tensors() -> Iterator[Tensor]:
    """Every tensor that a module of the package, or a cache of one of its functions, holds."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "tofu_fx"]
    stack: list[Any] = [value for module in modules for value in vars(module).values()]
    seen = set()
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, ModuleType):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set, frozenset)) or hasattr(value, "cache_info"):
            stack += gc.get_referents(value)  # of a function with a cache: its results, too


def test_nothing_but_places_on_cpu_is_kept_after_a_run() -> None:
    x, metric, size = stream(tokens=17)
    for grid in (None, [1, 4, 4, 2], [1, 4, 4, 2, 3]):
        fuse_tokens(x, metric, size, 3, "mlerp", 1, 0, grid)
        # What is made for a device that is not the CPU; without a GPU "meta" stands for one.
        for side in sides(16, tuple(grid or ()), torch.device("meta")):
            assert side.device.type == "meta"
    kept = list(kept_tensors())
    assert kept, "the places of a grid on CPU should be seen here"
    assert {t.device.type for t in kept} == {"cpu"}
