"""Emitting nodes, and bringing any tensor of tokens to the one layout that the token operators take and back.

The operators work on ``[B, N, F]``: all batch axes in one, the tokens, everything else. A model may keep its stream as
``[B, N, C]``, ``[N, B, C]`` or ``[B*N, C]``, and companions as ``[N, D]`` or ``[1, H, N, N]``: the axes say how.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from tofu_fx.axes.atoms import Atom, Axes, Barrier, Dim
from tofu_fx.fx.fakes import compute

aten = torch.ops.aten
#: how the tensors are called that the compiler gives to a graph
CONSTANT = "tofu_constant_"

#: a number of tokens: known, or the node that has it where one kernel is to serve several numbers
Count = int | Node


@dataclass
class Emitter:
    """Appends nodes to a graph, each with its fake value and the origin (module path, source line) it serves.

    To be used inside of ``tofu_fx.rewriting.token_count_inputs.faking``: values are computed as the nodes are appended.
    """

    graph: Graph
    origin: Node | None = None
    #: tensors that the graph holds itself, by their names
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    _memo: dict[Any, Node] = field(default_factory=dict)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Append a call. A call whose result is a plain int is not emitted: its value is returned."""
        value = self._fake(target, args, kwargs)
        if isinstance(value, (int, float, bool)):
            return value
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        self._stamp(node)
        return node

    def constant(self, value: torch.Tensor) -> Node:
        """Append a tensor that the graph holds itself."""
        name = f"{CONSTANT}{len(self.constants)}"
        self.constants[name] = value
        node = self.graph.get_attr(name)
        node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        self._stamp(node)
        return node

    def once(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Like ``call``, but an equal call (hashable arguments) is made only once. For pure ops only."""
        key = (target, args, tuple(sorted(kwargs.items())))
        if key not in self._memo:
            self._memo[key] = self.call(target, *args, **kwargs)
        return self._memo[key]

    def arithmetic(self, op: Any, left: Count, right: Count) -> Count:
        """``left op right``, as a number where both are known."""
        if isinstance(left, int) and isinstance(right, int):
            return int(op(left, right))
        return self.once(op, left, right)

    def copy(self, node: Node, mapping: Any) -> Any:
        """Append a copy of a node of another graph with mapped inputs; its fake value is computed anew."""
        mapped = {old: mapping(old) for old in node.all_input_nodes}
        args, kwargs = map_arg(node.args, mapped.__getitem__), map_arg(node.kwargs, mapped.__getitem__)
        unchanged = all(isinstance(n, Node) and n.meta.get("val") is old.meta.get("val") for old, n in mapped.items())
        if not mapped and isinstance(node.meta.get("val"), torch.Tensor):
            unchanged = False  # what is made from nothing is of the fake mode that it was made in
        value = node.meta["val"] if unchanged and "val" in node.meta else self._fake(node.target, args, kwargs)
        if isinstance(value, (int, float, bool)):
            return value
        new = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        new.meta = {**node.meta, "val": value}
        new.meta.pop("tensor_meta", None)
        return new

    def _fake(self, target: Any, args: Any, kwargs: Any) -> Any:
        values = map_arg((args, kwargs), lambda n: n.meta["val"])
        return compute(target, *values)

    def _stamp(self, node: Node) -> None:
        if self.origin is not None:
            for key in ("nn_module_stack", "stack_trace"):
                if key in self.origin.meta:
                    node.meta[key] = self.origin.meta[key]


def shape_of(emit: Emitter, dims: Sequence[Sequence[Atom]], count: Count) -> list[Count]:
    """A shape for dims given as atoms: the token axis has ``count`` positions now, the one symbolic dim is -1."""
    sizes: list[Count] = []
    for dim in dims:
        beside = math.prod(atom.size for atom in dim if not atom.is_token)
        if any(atom.base.symbolic and not atom.is_token for atom in dim):
            sizes.append(-1)
        elif all(not atom.is_token for atom in dim):
            sizes.append(beside)
        else:
            sizes.append(count if beside == 1 else emit.arithmetic(operator.mul, count, beside))
    if sum(isinstance(size, int) and size == -1 for size in sizes) > 1:
        raise Barrier("several symbolic axes in one tensor of tokens")
    return sizes


@dataclass(frozen=True)
class Layout:
    """How ``axes`` map to ``[B, N, F]``: the stream's batch atoms, the token atom in dim ``tokens``, the rest."""

    axes: Axes
    tokens: int
    batch: tuple[Atom, ...]

    @property
    def atom(self) -> Atom:
        """The token atom of the chosen dim."""
        return next(atom for atom in self.axes[self.tokens] if atom.is_token)

    def to_canonical(self, emit: Emitter, node: Node, count: Count) -> Node:
        """Append what brings a tensor with these axes and ``count`` tokens to ``[B, N, F]``."""
        flat, order = self._flat(), self._order()
        rest = order[len(self.batch) + 1 :]
        if self._is_canonical():
            return node
        if any(len(dim) != 1 for dim in self.axes):
            node = emit.call(aten.reshape.default, node, shape_of(emit, [(atom,) for atom in flat], count))
        if order != sorted(order):
            node = emit.call(aten.permute.default, node, order)
        dims = [[flat[i] for i in part] for part in (order[: len(self.batch)], [order[len(self.batch)]], rest)]
        return emit.call(aten.reshape.default, node, shape_of(emit, dims, count))

    def from_canonical(self, emit: Emitter, node: Node, count: Count) -> Node:
        """The inverse of ``to_canonical``, for a tensor that now has ``count`` tokens."""
        flat, order = self._flat(), self._order()
        if self._is_canonical():
            return node
        node = emit.call(aten.reshape.default, node, shape_of(emit, [(flat[i],) for i in order], count))
        if order != sorted(order):
            node = emit.call(aten.permute.default, node, [order.index(i) for i in range(len(order))])
        if any(len(dim) != 1 for dim in self.axes):
            node = emit.call(aten.reshape.default, node, shape_of(emit, self.axes, count))
        return node

    def _is_canonical(self) -> bool:
        """Whether the tensor is ``[B, N, F]`` as it is, one axis a dim: ``[B * N, F, 1]`` has them in order, too."""
        one_each = len(self.axes) == 3 and all(len(dim) == 1 for dim in self.axes)
        return one_each and len(self.batch) == 1 and self._order() == [0, 1, 2]

    def _flat(self) -> list[Atom]:
        return [atom for dim in self.axes for atom in dim]

    def _order(self) -> list[int]:
        """Places of the atoms in canonical order: batch, token, rest."""
        flat = self._flat()
        ahead = sum(len(dim) for dim in self.axes[: self.tokens])
        place = ahead + next(i for i, atom in enumerate(self.axes[self.tokens]) if atom.is_token)
        batch = [i for atom in self.batch for i, other in enumerate(flat) if other == atom]
        if len(batch) != len(self.batch):
            raise Barrier("the batch of this tensor cannot be lined up with the stream's")
        return [*batch, place, *(i for i in range(len(flat)) if i != place and i not in batch)]


def align(emit: Emitter, node: Node, dims: Sequence[Dim], place: int, batch: tuple[Atom, ...]) -> Node:
    """A per-token tensor ``[B, M]`` shaped to broadcast over a tensor with axes ``dims``, its tokens in dim ``place``.

    The batch goes where the batch atoms stand; all other dims are 1 (or expanded where they are merged with the batch).
    """
    found = [atom for i, dim in enumerate(dims) for atom in dim if atom in batch and i != place]
    if found != list(batch):
        raise Barrier("the batch of this tensor cannot be lined up with the stream's")
    count = emit.once(aten.sym_size.int, node, 1)
    split: list[Count] = []
    full: list[int] = []
    merged: list[Count] = []
    for i, dim in enumerate(dims):
        if i == place:
            split, full, merged = [*split, count], [*full, -1], [*merged, count]
            continue
        mixed = any(atom in batch for atom in dim)
        for atom in dim if mixed else ():
            split.append((-1 if atom.base.symbolic else atom.size) if atom in batch else 1)
            full.append(-1 if atom in batch else atom.size)
        if not mixed:
            split, full = [*split, 1], [*full, -1]
        merged.append(shape_of(emit, [dim], 0)[0] if mixed else 1)
    ahead = sum(atom in batch for dim in dims[:place] for atom in dim)
    if ahead < len(batch):  # tokens stand ahead of (a part of) the batch: [N, B, C]
        sizes = [-1 if atom.base.symbolic else atom.size for atom in batch]
        node = emit.once(aten.view.default, node, (*sizes, count)) if len(batch) > 1 else node
        order = [*range(ahead), len(batch), *range(ahead, len(batch))]
        node = emit.once(aten.permute.default, node, tuple(order))
    node = emit.once(aten.reshape.default, node, tuple(split))
    if any(size != -1 for size in full):
        node = emit.call(aten.expand.default, node, full)
    return node if len(split) == len(merged) else emit.call(aten.reshape.default, node, merged)
