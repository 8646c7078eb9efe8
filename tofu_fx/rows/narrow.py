"""Writing a graph so that of each tensor only the rows that are read are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from tofu_fx.axes.atoms import hint
from tofu_fx.fx.fakes import compute
from tofu_fx.fx.nodes import argument, is_op, module_path, set_argument
from tofu_fx.fx.op_families import GROUPINGS, TURNS
from tofu_fx.rows.carriers import Operand, carriers, shape
from tofu_fx.rows.demand import Rows, sources, taken

aten = torch.ops.aten
_END = 2**63 - 1
_SHAPED = {"view": "size", "reshape": "shape", "_unsafe_view": "size", "expand": "size", "unflatten": "sizes"}


@dataclass(frozen=True)
class LeftOut:
    """A place from which on only some rows are computed: ``kept`` of ``of``, in a module."""

    module: str
    kept: int
    of: int

    def is_around(self, other: LeftOut) -> bool:
        """Whether it says the same of a module that the other's is in, or is itself."""
        inside = f"{other.module}.".startswith(f"{self.module}." if self.module else "")
        return inside and (self.kept, self.of) == (other.kept, other.of)

    def __str__(self) -> str:
        where = f" from {self.module} on" if self.module else ""
        return f"{self.of - self.kept} of {self.of} rows are read by nobody and not computed{where}"


@dataclass
class Narrowing:
    """Changes a graph in place; ``read`` are the rows of each node that are read."""

    graph: Graph
    read: Mapping[Node, Rows]
    fake_mode: FakeTensorMode
    #: where all rows are there, and some are taken
    left_out: list[LeftOut] = field(default_factory=list)
    #: the nodes that take them
    cuts: set[Node] = field(default_factory=set)
    _made: dict[Any, Node] = field(default_factory=dict)
    #: readers and those of their operands that have samples, in dim 0
    _sampled: set[tuple[Node, Node]] = field(default_factory=set)

    def run(self) -> None:
        """Have every node compute the rows that are read, and every reader take them from there."""
        # All that is asked of the graph, by shapes, before any of them changes.
        operands = {node: carriers(node, rows.dim) or [] for node, rows in self.read.items()}
        self._sampled = {
            (node, operand.node)
            for node, rows in self.read.items()
            if rows.of_sample is not None
            for operand in (carriers(node, 0) if shape(node)[0] > 1 else operands[node]) or []
            if (operand.dim == 0 if shape(node)[0] > 1 else shape(operand.node)[0] == 1)
        }
        readers = {
            node: taken(node) for source in self.read for node in source.users if node.args and node.args[0] is source
        }
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        first = next(node for node in self.graph.nodes if node in self.read)
        for places in dict.fromkeys(rows.of_sample for rows in self.read.values()):
            for node in sources(places) if places is not None else ():
                if order[node] > order[first]:  # those ahead have other readers there
                    first.prepend(node)
        for node in list(self.graph.nodes):
            reads = readers.get(node)
            if reads is not None:
                self._take(node, self.read[node.args[0]], reads)
            elif node in self.read:
                self._narrow(node, self.read[node], operands[node])

    def _narrow(self, node: Node, rows: Rows, operands: list[Operand]) -> None:
        if is_op(node, "scaled_dot_product_attention") and argument(node, "is_causal"):
            self._show_causal_mask(node, rows)
        for operand in operands:
            self._replace(node, operand, self._rows_of(operand, rows, node))
        for name, key in _SHAPED.items():
            if is_op(node, name):
                sizes: list[Any] = list(argument(node, key))
                # unflatten has the sizes of what its dim becomes, the others those of all dims
                first = int(argument(node, "dim")) % len(shape(node.args[0])) if name == "unflatten" else 0
                place = rows.dim - first
                if 0 <= place < len(sizes) and not (isinstance(sizes[place], int) and sizes[place] == -1):
                    sizes[place] = rows.count
                set_argument(node, key, sizes)
        self._value(node)

    def _rows_of(self, operand: Operand, rows: Rows, before: Node) -> Node:
        """The rows of an operand: of the narrowed one, or cut out of the whole."""
        own, wanted = self.read.get(operand.node), replace(rows, dim=operand.dim)
        if own == wanted:
            return operand.node
        if own is not None and own.dim == operand.dim:
            wanted = replace(wanted, positions=tuple(own.positions.index(p) for p in rows.positions))
        else:
            self._note(operand, rows.count, before)
        key = (operand.node, wanted)
        if key in self._made:
            return self._made[key]
        with self.graph.inserting_before(before):
            if wanted.of_sample is not None:
                cut = self._cut_of_samples(operand.node, wanted, before)
            else:
                cut = self._cut(operand.node, operand.dim, wanted.positions)
        self.cuts |= {cut, *cut.all_input_nodes} - {operand.node}
        if is_op(cut, "slice"):  # a view: unlike a copy it may be read again after an op in place
            self._made[key] = cut
        return cut

    def _note(self, operand: Operand, kept: int, reader: Node) -> None:
        if is_op(reader, "slice", "select", *GROUPINGS, *TURNS) or operand.node.op != "call_function":
            return  # nothing is computed by it
        noted = LeftOut(module_path(reader), kept, hint(operand.node.meta["val"].shape[operand.dim]))
        if not any(noted.is_around(other) for other in self.left_out):  # the skip around a branch says nothing new
            self.left_out.append(noted)

    def _cut(self, node: Node, dim: int, positions: tuple[int, ...]) -> Node:
        """Append the slices of a tensor that have these rows."""
        runs: list[list[int]] = []
        for position in positions:
            if runs and position == runs[-1][1] and position != 0:
                runs[-1][1] += 1
            else:
                runs.append([position, position + 1])
        parts = [self._call(aten.slice.Tensor, node, dim, start, end if end != 0 else _END) for start, end in runs]
        return parts[0] if len(parts) == 1 else self._call(aten.cat.default, parts, dim)

    def _cut_of_samples(self, node: Node, rows: Rows, reader: Node) -> Node:
        """Append what takes one row of each sample: ``[B, ..., 1, ...]``, of a tensor without samples, too."""
        places, rank = rows.of_sample, reader.meta["val"].dim()
        assert places is not None
        dim, sizes, samples = rows.dim, node.meta["val"].shape, places.meta["val"].shape[0]
        count = self._call(aten.sym_size.int, places, 0) if isinstance(samples, torch.SymInt) else samples
        if (reader, node) not in self._sampled:  # a table: lined up with what it is added to, and the same for each
            ahead = rank - len(sizes)
            for _ in range(ahead):
                node = self._call(aten.unsqueeze.default, node, 0)
            dim = dim + ahead
            node = self._call(aten.expand.default, node, [count, *[-1] * (rank - 1)])
        each = self._call(aten.arange.default, count, device=places.meta["val"].device)
        taken = self._call(aten.index.Tensor, node, [each, *[None] * (dim - 1), places])
        return self._call(aten.unsqueeze.default, taken, dim)

    def _take(self, node: Node, own: Rows, rows: Rows) -> None:
        """Have a reader take its rows from those that are there."""
        assert rows.dim == own.dim, "what takes rows of another dim has these asked of its source"
        if rows.of_sample is not None:
            with self.graph.inserting_before(node):
                only = self._call(aten.select.int, node.args[0], rows.dim, 0)
            only.meta = {**node.meta, **only.meta}
            node.replace_all_uses_with(only)
            self.graph.erase_node(node)
            return
        places = [own.positions.index(p) for p in rows.positions]
        if is_op(node, "select"):
            set_argument(node, "index", places[0])
        else:
            set_argument(node, "start", places[0])
            set_argument(node, "end", places[-1] + 1)
        self._value(node)

    def _show_causal_mask(self, node: Node, rows: Rows) -> None:
        """The rows of the causal mask that a fused attention keeps to itself: key j is seen by query i if j <= i."""
        query, key = (argument(node, name).meta["val"] for name in ("query", "key"))
        if rows.of_sample is not None:
            with self.graph.inserting_before(node):
                places = self._call(aten.remainder.Scalar, rows.of_sample, int(key.shape[-2]))
                keys = self._call(aten.arange.default, int(key.shape[-2]), device=query.device)
                seen = self._call(aten.le.Tensor, keys, self._call(aten.reshape.default, places, [-1, 1, 1, 1]))
            set_argument(node, "is_causal", False)
            set_argument(node, "attn_mask", seen)
            return
        start, stop = rows.positions[0], rows.positions[-1] + 1
        with self.graph.inserting_before(node):
            size = [stop - start, int(key.shape[-2])]
            ones = self._call(aten.ones.default, size, dtype=torch.bool, device=query.device)
            mask = self._call(aten.tril.default, ones, start)
            if len(rows.positions) < stop - start:
                mask = self._cut(mask, 0, tuple(p - start for p in rows.positions))
        set_argument(node, "is_causal", False)
        set_argument(node, "attn_mask", mask)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        new = self.graph.call_function(target, args, kwargs)
        self._value(new)
        return new

    def _value(self, node: Node) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), self._fake)
        node.meta["val"] = compute(node.target, args, kwargs)  # type: ignore[arg-type]

    def _fake(self, node: Node) -> Any:
        value = node.meta["val"]
        real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)  # a constant of the graph
        return self.fake_mode.from_tensor(value) if real else value

    def _replace(self, node: Node, operand: Operand, new: Node) -> None:
        place, *inner = operand.place
        if place >= len(node.args):  # passed by its name
            node.update_kwarg("attn_mask", new)
        elif inner:
            parts: Any = list(node.args[place])  # type: ignore[arg-type]
            parts[inner[0]] = new
            node.update_arg(place, parts)
        else:
            node.update_arg(place, new)
