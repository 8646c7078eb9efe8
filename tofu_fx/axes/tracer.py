"""One walk over an ATen graph that gives every tensor its axes, using the rule table.

The walk serves twice. Without seeds it labels all axes, which is how attention over tokens is told from attention
over channels or windows. With seeds (the nodes after which a stream may shrink) it follows the token axes of each
stream and records what is done to them: where they are pooled, and at which barriers they must be whole again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from tofu_fx.axes.atoms import Atom, Axes, Barrier, Dim, dim_size, hint, token_atoms
from tofu_fx.axes.samples import Samples, SamplesMixed
from tofu_fx.axes.space import Space
from tofu_fx.fx.nodes import is_alias, is_op, source_line, tensor_inputs

Seed = Callable[["AxisTracer", Axes], Axes]

BRANCH_END = "the branch joins the residual stream, which keeps every token"


@dataclass(frozen=True)
class BarrierRecord:
    """Why tokens must be whole at a node.

    ``fatal`` barriers cannot be served by restoring the tokens (a mutation in place, attention weights that leave the
    graph): the streams that reach them are not reduced at all.
    """

    node: Node
    reason: str
    values: tuple[Node, ...]
    fatal: bool = False

    def __str__(self) -> str:
        return (
            f"{self.node.target if self.node.op != 'output' else 'graph output'}: {self.reason}{source_line(self.node)}"
        )


@dataclass
class AxisTracer:
    """The walk and what it found. ``rules`` maps an op to its rule (``tofu_fx.axes.rules.table.find_rule``)."""

    graph: Graph
    rules: Callable[[Any], Callable[[AxisTracer, Node], Any] | None]
    model_state: frozenset[Node] = frozenset()
    seeds: Mapping[Node, Seed] = field(default_factory=dict)
    #: softmax nodes over keys and products with values that belong to a recognised attention
    attention_nodes: frozenset[Node] = frozenset()
    #: the products of queries and keys of recognised attentions
    score_nodes: frozenset[Node] = frozenset()
    space: Space = field(default_factory=Space)
    #: number of a stream that is one branch of a block -> the nodes inside of it, which never end it
    branches: Mapping[int, frozenset[Node]] = field(default_factory=dict)
    #: number of such a stream -> what its tokens were before they were given to it, and how many
    entered: dict[int, tuple[Dim, int]] = field(default_factory=dict)
    #: nodes at which a branch ends
    ends: set[Node] = field(default_factory=set)
    #: node -> Axes, or a tuple of Axes for an op with several outputs
    axes: dict[Node, Any] = field(default_factory=dict)
    depends: set[Node] = field(default_factory=set)
    barriers: list[BarrierRecord] = field(default_factory=list)
    #: node -> "mean" | "sum": reductions over tokens that must be weighted by size
    pools: dict[Node, str] = field(default_factory=dict)
    #: nodes whose token axis is that of an attention's keys: shares of one, that no restore makes whole again
    weights: set[Node] = field(default_factory=set)
    unknown_ops: dict[str, int] = field(default_factory=dict)
    _dropped: bool = False
    #: along which atoms the op at hand computes a position from several; None where no rule says so
    _mixed: list[Atom] | None = None

    def __post_init__(self) -> None:
        self.samples = Samples(self.space)

    def run(self) -> AxisTracer:
        """Walk the graph once, in order."""
        for node in self.graph.nodes:
            if node.op == "output":
                self._visit_output(node)
            elif node.op in ("placeholder", "get_attr"):
                self._visit_source(node)
            elif node.op == "call_function":
                self._visit_call(node)
            seed = self.seeds.get(node)
            if seed is not None and isinstance(node.meta.get("val"), torch.Tensor):
                self.axes[node] = seed(self, self.axes[node])
                if token_atoms(self.axes[node]):
                    self.samples.across.discard(
                        node
                    )  # a new stream, each of whose tokens has its own share of the others
        return self

    def of(self, value: Any) -> Axes:
        """Axes of a tensor-valued node; for a Python number, none."""
        return self.axes[value] if isinstance(value, Node) and value in self.axes else ()

    def tokens(self, node: Node) -> list[Atom]:
        """Token atoms of a node, of all its outputs together."""
        return [atom for part in self.parts(node) for atom in token_atoms(part)]

    def parts(self, node: Node) -> list[Axes]:
        """The axes of each output of a node."""
        axes = self.axes.get(node, ())
        return [axes] if _is_axes(axes) else list(axes)

    def drop(self) -> None:
        """A rule says: this op may legally lose the token axis (pooling, attention keys, protected tokens)."""
        self._dropped = True

    def along(self, way: Sequence[Node], axes: Axes) -> Axes | None:
        """What becomes of a tensor with ``axes`` on its way through ops of the graph, from its first node to its last.

        What joins it from aside counts as broadcast. None where a rule says that the axes cannot pass.
        """
        known = dict(self.axes)
        self.axes[way[0]] = axes
        try:
            for before, node in itertools.pairwise(way):
                for value in tensor_inputs(node):
                    if value is not before:
                        self.axes[value] = ((),) * len(known.get(value, ()))
                self.axes[node] = self._apply_rule(node, carries=False)
            return self.axes[way[-1]]
        except Barrier:
            return None
        finally:
            self.axes = known

    def mix(self, *dims: Dim) -> None:
        """A rule says: along these dims of an operand the op computes each position from several."""
        assert self._mixed is not None, "only rules say so"
        self._mixed += [atom for dim in dims for atom in dim]

    def merge(self, dims: Iterable[tuple[Dim, bool]]) -> Dim:
        """The dimension that results from broadcasting dims (each with: depends on the input)."""
        present = [(dim, depends) for dim, depends in dims if dim_size(dim) != 1]
        carried = [dim for dim, _ in present if any(atom.is_token for atom in dim)]
        if carried:
            if any(dim != carried[0] for dim in carried):
                raise Barrier("tokens of different streams or of shifted positions meet")
            if len(carried[0]) > 1 and len(carried) != len(present):
                raise Barrier("tokens that are merged with another axis meet a tensor that is not")
            return carried[0]
        moving = [dim for dim, depends in present if depends]
        for other in moving[1:]:
            self.space.meet(moving[0], other)
        self.samples.check_meeting(moving)
        return moving[0] if moving else present[0][0] if present else ()

    def broadcast(self, operands: Iterable[Any], rank: int) -> Axes:
        """Axes of an elementwise op over operands (nodes; others are ignored), aligned from the right."""
        nodes = [value for value in operands if isinstance(value, Node) and value in self.axes]
        columns: list[list[tuple[Dim, bool]]] = [[] for _ in range(rank)]
        for value in nodes:
            axes = self.axes[value]
            for i, dim in enumerate(axes):
                columns[rank - len(axes) + i].append((dim, value in self.depends))
        return tuple(self.merge(column) for column in columns)

    def _visit_source(self, node: Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            state = node.op == "get_attr" or node in self.model_state
            self.axes[node] = self._fresh(node)
            if state and value.dim():  # learnt rows (tokens, positions) of learnt features
                self.axes[node] = (
                    *self.axes[node][:-1],
                    self.space.fresh(f"{node.name}.features", value.shape[-1], "feature"),
                )
            if not state:
                self.depends.add(node)

    def _visit_call(self, node: Node) -> None:
        inputs = tensor_inputs(node)
        if isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return  # a size: what it means for tokens is decided where it is used
        if any(value in self.depends for value in inputs):
            self.depends.add(node)
        carried = {atom for value in inputs for atom in self.tokens(value)}
        self._dropped = False
        if not carried and self._changes_tokens(node):
            reason = "it changes a view of a tensor of tokens in place"
            self.barriers.append(BarrierRecord(node, reason, (), fatal=True))
        whole = self._meets_whole(node, inputs) if carried and self.branches else None
        if whole is not None:
            self._end_branch(node, inputs, whole)
            return
        try:
            self.samples.check_inputs((value, self.parts(value)) for value in inputs)
            axes = self._apply_rule(node, bool(carried))
            parts = [axes] if _is_axes(axes) else list(axes)
            kept = {atom for part in parts for atom in token_atoms(part)}
            if {a.base for a in carried} - {a.base for a in kept} and not self._dropped:
                raise Barrier("the op would lose the token axis")
            most = max((len(self.tokens(value)) for value in inputs), default=0)
            if node not in self.score_nodes and len(kept) and _is_axes(axes) and len(token_atoms(axes)) > most:
                raise Barrier("tokens are compared with tokens outside of a recognised attention")
            for part in parts:
                self.samples.check(part, self._mixed or ())
        except Barrier as barrier:
            axes = self._whole_axes(node, inputs)
            self.samples.whole[node] = frozenset(atom.base.stream for atom in carried)
            if isinstance(barrier, SamplesMixed):
                self.samples.across.add(node)
            if carried:
                values = tuple(value for value in inputs if self.tokens(value))
                self.barriers.append(BarrierRecord(node, str(barrier), values, self.is_fatal(node, values)))
        if axes is not None:
            self.axes[node] = axes
        if not self.tokens(node):
            self.samples.follow(node, inputs, self.parts(node), self._mixed)
            if node in self.samples.across:
                self.space.unaligned.add(node.name)
        if self._keeps_weights(node):
            self.weights.add(node)

    def _whole_axes(self, node: Node, inputs: list[Node]) -> Any:
        """The axes of what an op gives on whole tokens: by its rule, from the axes that its inputs then have."""
        reduced = {value: self.axes[value] for value in inputs if value in self.axes}
        whole = {
            value: self.samples.as_whole(axes) if _is_axes(axes) else tuple(map(self.samples.as_whole, axes))
            for value, axes in reduced.items()
        }
        self._mixed = None
        if any(axes is None or None in axes for axes in whole.values()):
            return self._fresh(node)
        self.axes.update(whole)
        try:
            return self._apply_rule(node, carries=False)
        except Barrier:
            self._mixed = None
            return self._fresh(node)
        finally:
            self.axes.update(reduced)

    def _meets_whole(self, node: Node, inputs: list[Node]) -> Node | None:
        """The operand that has all the tokens of a branch where another operand has fewer of them; None elsewhere."""
        for number, inside in self.branches.items():
            carrying = [v for v in inputs if any(atom.base.stream == number for atom in self.tokens(v))]
            if node in inside or not carrying:
                continue
            places, tokens = self.entered.get(number, ((), 0))
            # Text and image that were joined for the branch are apart again, and meet what they were before that.
            apart = any(atom.size != tokens for atom in self.tokens(carrying[0]))
            for value in inputs:
                whole = value in self.depends and not self.tokens(value) and _is_axes(self.axes.get(value, ()))
                known = whole and bool(places) and any(_is_part(places, dim) for dim in self.of(value))
                if whole and (apart or known) and _places(value) == _places(carrying[0]):
                    return value
        return None

    def _end_branch(self, node: Node, inputs: list[Node], whole: Node) -> None:
        values = tuple(value for value in inputs if self.tokens(value))
        self.barriers.append(BarrierRecord(node, BRANCH_END, values))
        self.ends.add(node)
        like = [hint(n) for n in node.meta["val"].shape] == [hint(n) for n in whole.meta["val"].shape]
        self.axes[node] = self.of(whole) if like else self._fresh(node)

    def _changes_tokens(self, node: Node) -> bool:
        """Whether an op writes to memory that a tensor of tokens may share."""
        if not getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            return False
        seen, todo = set(), tensor_inputs(node)
        while todo:
            value = todo.pop()
            if self.tokens(value):
                return True
            if value not in seen and value.op == "call_function" and is_alias(value):
                todo.extend(tensor_inputs(value))
            seen.add(value)
        return False

    def _apply_rule(self, node: Node, carries: bool) -> Any:
        if getattr(node.target, "_schema", None) is not None and node.target._schema.is_mutable and carries:  # type: ignore[union-attr]
            raise Barrier("it changes a tensor of tokens in place")
        rule = self.rules(node.target)
        self._mixed = None if rule is None else []
        if rule is None:
            if carries:
                self.unknown_ops[str(node.target)] = self.unknown_ops.get(str(node.target), 0) + 1
                raise Barrier(f"no rule says how {node.target} carries tokens")
            return self._fresh(node) or ()
        axes = rule(self, node)
        self._check(node, axes)
        return axes

    def _check(self, node: Node, axes: Any) -> None:
        """A rule that contradicts the traced shape is a rule that does not hold here."""
        value = node.meta.get("val")
        pairs = [(value, axes)] if isinstance(value, torch.Tensor) else zip(value or (), axes, strict=True)
        for tensor, part in pairs:
            if isinstance(tensor, torch.Tensor) and [hint(s) for s in tensor.shape] != [dim_size(d) for d in part]:
                raise Barrier(f"its rule gives {part} for the shape {list(tensor.shape)}")

    def _fresh(self, node: Node, kind: Any = "plain") -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return self.space.fresh_axes(node.name, value.shape, kind)
        if isinstance(value, (tuple, list)):
            return tuple(
                self.space.fresh_axes(f"{node.name}.{i}", part.shape, kind) if isinstance(part, torch.Tensor) else ()
                for i, part in enumerate(value)
            )
        return None

    def is_fatal(self, node: Node, values: tuple[Node, ...]) -> bool:
        """Whether restoring the values would not serve a node: it changes them, or they are attention weights."""
        mutates = getattr(node.target, "_schema", None) is not None and node.target._schema.is_mutable  # type: ignore[union-attr]
        return mutates or any(len(self.tokens(value)) != 1 or value in self.weights for value in values)

    def _keeps_weights(self, node: Node) -> bool:
        """Whether a node is the softmax of an attention over tokens, or its weights, still over keys."""
        if not self.tokens(node) and not self._is_softmax(node):
            return False
        return self._is_softmax(node) or (
            node not in self.attention_nodes and any(value in self.weights for value in tensor_inputs(node))
        )

    def _is_softmax(self, node: Node) -> bool:
        return node in self.attention_nodes and is_op(node, "softmax", "_softmax")

    def _visit_output(self, node: Node) -> None:
        for value in tensor_inputs(node):
            if self.tokens(value):
                fatal = len(self.tokens(value)) != 1 or value in self.weights
                reason = "attention weights are returned" if fatal else "the tokens are returned"
                self.barriers.append(BarrierRecord(node, reason, (value,), fatal))


def trace(make: Callable[[Space], AxisTracer]) -> AxisTracer:
    """Walk a graph until no more axes turn out to be one. (Twice where several inputs share a batch, else once.)"""
    space = Space()
    while True:
        tracer = make(space).run()
        aligned = tracer.space.alignment()
        if aligned == space.aligned:
            return tracer
        space = Space(aligned)


def _is_part(atoms: Dim, dim: Dim) -> bool:
    """Whether atoms stand in a dim, side by side."""
    return any(dim[i : i + len(atoms)] == atoms for i in range(len(dim) - len(atoms) + 1))


def _places(node: Node) -> list[int]:
    """The shape of a tensor or of the first of several, without its features."""
    value = node.meta["val"]
    first = value if isinstance(value, torch.Tensor) else value[0]
    return [hint(size) for size in first.shape[:-1]]


def _is_axes(axes: Any) -> bool:
    """Whether this is the Axes of one tensor rather than a tuple of them (a dim holds atoms, an Axes holds dims)."""
    return all(isinstance(atom, Atom) for dim in axes or () for atom in dim)
