"""One spelling for each view: what follows need not know that ``mT`` is a transpose and ``narrow`` a slice.

The op that takes another's place gives the same view of the same memory, and so the same bits, strides and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from tofu_fx.fx.nodes import argument, is_op

aten = torch.ops.aten


def respell(graph: Graph) -> None:
    """Write each view of a graph in the spelling that the rules know, in place; meta stays."""
    for node in graph.nodes:
        for names, spelling in _SPELLINGS.items():
            if is_op(node, *names):
                found = spelling(node)
                if found is not None:
                    node.target, node.args, node.kwargs = found[0], found[1:], {}


def _turned(node: Node) -> tuple[Any, ...] | None:
    """The matrices of a tensor turned; a complex one would be conjugated as well."""
    source = node.args[0]
    assert isinstance(source, Node)
    conjugated = not is_op(node, "mT") and source.meta["val"].is_complex()
    return None if conjugated or source.meta["val"].dim() < 2 else (aten.transpose.int, source, -2, -1)


def _reversed(node: Node) -> tuple[Any, ...]:
    rank = node.meta["val"].dim()
    return aten.permute.default, node.args[0], list(reversed(range(rank)))


def _sliced(node: Node) -> tuple[Any, ...] | None:
    dim, start, length = (argument(node, name) for name in ("dim", "start", "length"))
    source = node.args[0]
    assert isinstance(source, Node)
    if not isinstance(start, int) or not isinstance(length, int):
        return None  # a position that is computed
    if start < 0:
        size = source.meta["val"].shape[dim]
        if not isinstance(size, int):
            return None
        start += size
    return aten.slice.Tensor, source, dim, start, start + length


def _expanded(node: Node) -> tuple[Any, ...]:
    return aten.expand.default, node.args[0], argument(node, "size")


def _exchanged(node: Node) -> tuple[Any, ...]:
    return aten.transpose.int, *node.args


_SPELLINGS: dict[tuple[str, ...], Callable[[Node], tuple[Any, ...] | None]] = {
    ("mT", "mH", "adjoint", "matrix_H"): _turned,
    ("numpy_T",): _reversed,
    ("narrow",): _sliced,
    ("broadcast_to",): _expanded,
    ("swapaxes", "swapdims"): _exchanged,
}
