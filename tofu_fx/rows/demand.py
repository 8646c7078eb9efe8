"""Which rows of each tensor of a graph are read, from the outputs backward.

A class token is taken (``select``), the last position kept (``slice``): what leads there needs those rows only, up to
the attention whose keys and values need all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from tofu_fx.axes.atoms import Barrier, hint
from tofu_fx.fx.nodes import argument, is_op
from tofu_fx.rows.carriers import carriers, shape

_END = 2**63 - 1
#: rows are dropped if no more than this share of them is read: to leave out one of many costs a copy of the others
MOST_READ = 0.5


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor: the dim, and their positions in order; negative ones count from the end."""

    dim: int
    positions: tuple[int, ...]


def demanded(graph: Graph) -> dict[Node, Rows]:
    """For each node of which only some rows are read, and can be computed alone, these.

    They are never more than ``MOST_READ`` of all.
    """
    found: dict[Node, Rows] = {}
    for node in reversed(graph.nodes):
        if node.op != "call_function" or not _is_tensor(node.meta.get("val")):
            continue
        try:
            rows = _joined([_wanted(user, node, found.get(user)) for user in node.users])
            few = rows is not None and len(rows.positions) <= MOST_READ * shape(node)[rows.dim]
            if rows is not None and few and carriers(node, rows.dim) is not None:
                found[node] = rows
        except Barrier:  # a size that is only known when the model runs
            pass
        if node not in found and not isinstance(node.meta["val"], torch.Tensor):
            for part in node.users:  # there are no rows of several tensors together: each is cut for itself
                found.pop(part, None)
    return found


def _is_tensor(value: Any) -> bool:
    several = value if isinstance(value, (tuple, list)) else [value]
    return bool(several) and all(isinstance(part, torch.Tensor) for part in several)


def _wanted(user: Node, node: Node, rows: Rows | None) -> list[Rows] | None:
    """The rows of a node that a reader of it reads, of which itself the ``rows`` are read; None: all."""
    own = taken(user)
    if own is not None and user.args[0] is node and user.all_input_nodes == [node]:
        return [own]
    operands = carriers(user, rows.dim) if rows is not None else None
    if rows is None or operands is None:
        return None
    dims = [operand.dim for operand in operands if operand.node is node]
    if not dims or len(dims) != _count(user, node):  # it is read in another role as well
        return None
    return [Rows(dim, rows.positions) for dim in dims]


def taken(node: Node) -> Rows | None:
    """The rows that a select or a slice takes of its operand; None for any other op, and where all are taken."""
    if not is_op(node, "select", "slice"):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    value = source.meta["val"]
    dim = int(argument(node, "dim")) % value.dim()
    size: Any = value.shape[dim]
    if is_op(node, "select"):
        index = argument(node, "index")
        return Rows(dim, _normalised([index], size)) if isinstance(index, int) else None
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    start, end = 0 if start is None else start, _END if end is None else end
    if step != 1 or not isinstance(start, int) or not isinstance(end, int):
        return None
    if isinstance(size, int):
        positions = range(*slice(start, end).indices(size))
        return Rows(dim, tuple(positions)) if 0 < len(positions) < size else None
    if 0 <= start < end <= hint(size):
        return Rows(dim, tuple(range(start, end)))
    if start < 0 and (end >= hint(size) or end == 0 or start < end < 0):
        return Rows(dim, tuple(range(start, end if end < 0 else 0)))
    return None


def _normalised(positions: Iterable[int], size: Any) -> tuple[int, ...]:
    return tuple(p % size if isinstance(size, int) else p for p in positions)


def _count(user: Node, node: Node) -> int:
    """How often a node stands among the arguments of another."""
    leaves, _ = torch.utils._pytree.tree_flatten((user.args, user.kwargs))
    return sum(leaf is node for leaf in leaves)


def _joined(wanted: list[list[Rows] | None]) -> Rows | None:
    """What several readers read together; None if that is all, or along several dims."""
    if not wanted or any(rows is None for rows in wanted):
        return None
    several = [rows for some in wanted if some is not None for rows in some]
    dims = {rows.dim for rows in several}
    positions = sorted({p for rows in several for p in rows.positions}, key=lambda p: (p < 0, p))
    return Rows(dims.pop(), tuple(positions)) if len(dims) == 1 else None
