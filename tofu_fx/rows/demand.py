"""Which rows of each tensor of a graph are read, from the outputs backward.

A class token is taken (``select``), the last position kept (``slice``): what leads there needs those rows only, up to
the attention whose keys and values need all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
    """Some rows of a tensor along a dim: at ``positions``, in order, of which negative ones count from the end; or one
    of each sample, at the place that the tensor ``of_sample``, ``[B]``, says. The samples are in dim 0 then.
    """

    dim: int
    positions: tuple[int, ...] = ()
    of_sample: Node | None = None

    @property
    def count(self) -> int:
        """How many these are, of a sample."""
        return len(self.positions) if self.of_sample is None else 1


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
            few = rows is not None and rows.count <= MOST_READ * shape(node)[rows.dim]
            if rows is not None and few and carriers(node, rows.dim) is not None:
                found[node] = rows
        except Barrier:  # a size that is only known when the model runs
            pass
        if not isinstance(node.meta["val"], torch.Tensor):
            for part in node.users:  # several tensors together cannot be cut: each part has the rows of all of them
                if node in found:
                    found[part] = found[node]
                else:
                    found.pop(part, None)
    late = {rows.of_sample for rows in found.values() if rows.of_sample is not None and not _is_early(rows, found)}
    return {node: rows for node, rows in found.items() if rows.of_sample not in late}


def sources(node: Node) -> list[Node]:
    """A node and all that it is computed from, in graph order."""
    reached, todo = {node}, [node]
    while todo:
        for value in todo.pop().all_input_nodes:
            if value not in reached:
                reached.add(value)
                todo.append(value)
    return [other for other in node.graph.nodes if other in reached]


def _is_early(rows: Rows, found: Mapping[Node, Rows]) -> bool:
    """Whether the places can be computed ahead of everything that has rows left out."""
    assert rows.of_sample is not None
    ahead = sources(rows.of_sample)
    changed = any(_changes(user) for node in ahead for user in node.users)
    return not changed and not any(node in found for node in ahead)


def _changes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _is_tensor(value: Any) -> bool:
    several = value if isinstance(value, (tuple, list)) else [value]
    return bool(several) and all(isinstance(part, torch.Tensor) for part in several)


def _wanted(user: Node, node: Node, rows: Rows | None) -> list[Rows] | None:
    """The rows of a node that a reader of it reads, of which itself the ``rows`` are read; None: all."""
    own = taken(user)
    if own is not None and user.args[0] is node and _count(user, node) == 1:
        return [own]
    operands = carriers(user, rows.dim) if rows is not None else None
    if rows is None or operands is None:
        return None
    dims = [operand.dim for operand in operands if operand.node is node]
    if not dims or len(dims) != _count(user, node):  # it is read in another role as well
        return None
    if rows.of_sample is not None and not _carries_samples(user, node):
        return None
    return [replace(rows, dim=dim) for dim in dims]


def _carries_samples(user: Node, node: Node) -> bool:
    """Whether a reader has the samples of an operand, in dim 0 of both."""
    if shape(user)[0] == shape(node)[0] == 1:
        return True
    operands = carriers(user, 0) or []
    own = [operand.dim for operand in operands if operand.node is node]
    return bool(own) and not any(own) and shape(user)[0] == shape(node)[0]


def taken(node: Node) -> Rows | None:
    """The rows that a select, a slice or an index takes of its operand; None for any other op, or if it takes all."""
    if is_op(node, "index"):
        return _taken_of_each_sample(node)
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


def _taken_of_each_sample(node: Node) -> Rows | None:
    """``x[arange(B), places]``: of each sample the row at its place."""
    source, indices = node.args
    if not isinstance(source, Node) or not isinstance(indices, (list, tuple)) or len(indices) != 2:
        return None
    first, places = indices
    if not (isinstance(first, Node) and isinstance(places, Node)) or source in (first, places):
        return None
    size, value = source.meta["val"].shape[0], places.meta["val"]
    counts = is_op(first, "arange") and len(first.args) == 1 and _is_size(first.args[0], size)
    plain = value.dim() == 1 and not value.is_floating_point() and value.dtype is not torch.bool
    return Rows(1, of_sample=places) if counts and plain and hint(value.shape[0]) == hint(size) else None


def _is_size(value: Any, size: Any) -> bool:
    """Whether an argument is a size: the same number, or the same symbol."""
    value = value.meta["val"] if isinstance(value, Node) else value
    return str(value) == str(size)


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
    if any(rows.of_sample is not None for rows in several):
        return several[0] if len(set(several)) == 1 else None
    positions = sorted({p for rows in several for p in rows.positions}, key=lambda p: (p < 0, p))
    return Rows(dims.pop(), tuple(positions)) if len(dims) == 1 else None
