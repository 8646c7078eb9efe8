"""Autocast regions inside of a graph, followed by whoever computes its nodes one by one.

A region is two nodes, ``_enter_autocast(device, dtype, enabled, cache)`` and ``_exit_autocast(enter)``. While a graph
is traced with make_fx, or while its fake values are computed, calling them only records them: the dtypes of all that
lies between would be those without autocast.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.fx import Node

_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


class Autocasts:
    """The regions that are open now. A context manager: what is still open at its end, or at an error, is closed."""

    def __init__(self) -> None:
        self._open: dict[Node, tuple[str, bool, torch.dtype, bool]] = {}

    def visit(self, node: Node) -> None:
        """Open or close the region that a node opens or closes; other nodes are none of its business."""
        if node.target is _ENTER:
            self._enter(node, *node.args)
        elif node.target is _EXIT:
            self._leave(node.args[0])

    def _enter(
        self, node: Node, device: Any, dtype: Any = None, enabled: Any = True, cache_enabled: Any = None
    ) -> None:
        # The flags, not torch.autocast: that one records itself in the graph that is being traced.
        before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
        self._open[node] = (device, *before)
        dtype = before[1] if dtype is None else dtype
        # PyTorch switches autocast off, with a warning, for a dtype that the device does not cast to.
        torch.set_autocast_enabled(device, enabled and dtype in (torch.bfloat16, torch.float16))
        torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(before[2] if cache_enabled is None else cache_enabled)
        torch.autocast_increment_nesting()

    def _leave(self, node: Any) -> None:
        device, enabled, dtype, cache_enabled = self._open.pop(node)
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cache_enabled)

    def __enter__(self) -> Autocasts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(list(self._open)):
            self._leave(node)


def is_region(node: Node) -> bool:
    """Whether a node opens or closes a region."""
    return node.target in (_ENTER, _EXIT)
