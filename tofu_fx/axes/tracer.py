"""One walk over an ATen graph that gives every tensor its axes, using the rule table.

The walk serves twice. Without seeds it labels all axes, which is how attention over tokens is told from attention
over channels or windows. With seeds (the nodes after which a stream may shrink) it follows the token axes of each
stream and records what is done to them: where they are pooled, and at which barriers they must be whole again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, Node

from tofu_fx.axes.atoms import Atom, Axes, Barrier, Dim, hint, is_axes, token_atoms
from tofu_fx.axes.branch_ends import BRANCH_END, meets_whole
from tofu_fx.axes.known import Known, outputs
from tofu_fx.axes.rules.apply import apply_rule, fresh_outputs
from tofu_fx.axes.rules.result import Carried, Dropped, Pooled, Rule
from tofu_fx.axes.samples import Samples, SamplesMixed
from tofu_fx.axes.space import Space
from tofu_fx.fx.nodes import is_alias, is_mutable, is_op, source_line, tensor_inputs
from tofu_fx.fx.op_families import SOFTMAX

Seed = Callable[["AxisTracer", Axes], Axes]


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
    rules: Callable[[Any], Rule | None]
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

    def __post_init__(self) -> None:
        self.samples = Samples(self.space)
        #: what rules see of all this
        self.known = Known(
            self.space,
            MappingProxyType(self.axes),
            self.depends,
            self.model_state,
            self.attention_nodes,
            self.samples.check_meeting,
        )

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
                if token_atoms(self.axes[node]):  # a new stream, each of whose tokens has its own share of the others
                    self.samples.across.discard(node)
        return self

    def of(self, value: Any) -> Axes:
        """Axes of a tensor-valued node; for a Python number, none."""
        return self.known.of(value)

    def tokens(self, node: Node) -> list[Atom]:
        """Token atoms of a node, of all its outputs together."""
        return self.known.tokens(node)

    def parts(self, node: Node) -> list[Axes]:
        """The axes of each output of a node."""
        return self.known.outputs(node)

    def along(self, way: Sequence[Node], axes: Axes) -> Axes | None:
        """What becomes of a tensor with ``axes`` on its way through ops of the graph, from its first node to its last.

        What joins it from aside counts as broadcast. None where a rule says that the axes cannot pass.
        """
        supposed: dict[Node, Any] = {way[0]: axes}
        known = self.known.supposing(supposed)
        try:
            for before, node in itertools.pairwise(way):
                aside = [value for value in tensor_inputs(node) if value is not before]
                supposed.update((value, ((),) * len(self.axes.get(value, ()))) for value in aside)
                supposed[node] = apply_rule(self.rules(node.target), known, node).axes
        except Barrier:
            return None
        return known.of(way[-1])

    def _visit_source(self, node: Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            state = node.op == "get_attr" or node in self.model_state
            self.axes[node] = fresh_outputs(self.space, node)
            if state and value.dim():  # learnt rows (tokens, positions) of learnt features
                features = self.space.fresh(f"{node.name}.features", value.shape[-1], "feature")
                self.axes[node] = (*self.axes[node][:-1], features)
            if not state:
                self.depends.add(node)

    def _visit_call(self, node: Node) -> None:
        inputs = tensor_inputs(node)
        if isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return  # a size: what it means for tokens is decided where it is used
        if any(value in self.depends for value in inputs):
            self.depends.add(node)
        carried = {atom for value in inputs for atom in self.tokens(value)}
        if not carried and self._changes_tokens(node):
            reason = "it changes a view of a tensor of tokens in place"
            self.barriers.append(BarrierRecord(node, reason, (), fatal=True))
        whole = meets_whole(self.known, node, self.branches, self.entered) if carried else None
        if whole is not None:
            self._end_branch(node, inputs, whole)
            return
        try:
            self.samples.check_inputs((value, self.parts(value)) for value in inputs)
            result = self._result(node, carries=bool(carried))
            self._check(node, inputs, carried, result)
        except Barrier as barrier:
            result = self._on_whole_tokens(node, inputs)
            self.samples.whole[node] = frozenset(atom.base.stream for atom in carried)
            if isinstance(barrier, SamplesMixed):
                self.samples.across.add(node)
            if carried:
                values = tuple(value for value in inputs if self.tokens(value))
                self.barriers.append(BarrierRecord(node, str(barrier), values, self.is_fatal(node, values)))
        self._take(node, inputs, result)

    def _result(self, node: Node, carries: bool) -> Carried:
        """What the rule of a node says of it; ``carries``: whether its operands have tokens."""
        if carries and is_mutable(node):
            raise Barrier("it changes a tensor of tokens in place")
        rule = self.rules(node.target)
        if rule is None and carries:
            self.unknown_ops[str(node.target)] = self.unknown_ops.get(str(node.target), 0) + 1
            raise Barrier(f"no rule says how {node.target} carries tokens")
        return apply_rule(rule, self.known, node)

    def _check(self, node: Node, inputs: Sequence[Node], carried: set[Atom], result: Carried) -> None:
        """Hold what a rule says against what tokens allow, whatever the op is."""
        parts = outputs(result.axes)
        kept = {atom for part in parts for atom in token_atoms(part)}
        if {a.base for a in carried} - {a.base for a in kept} and not isinstance(result, Dropped):
            raise Barrier("the op would lose the token axis")
        most = max((len(self.tokens(value)) for value in inputs), default=0)
        single = is_axes(result.axes)
        if node not in self.score_nodes and kept and single and len(token_atoms(parts[0])) > most:
            raise Barrier("tokens are compared with tokens outside of a recognised attention")
        for part in parts:
            self.samples.check(part, result.mixed or ())

    def _take(self, node: Node, inputs: Sequence[Node], result: Carried) -> None:
        """Note what is now known of a node. All that a rule says has its effect here."""
        self.axes[node] = result.axes
        if isinstance(result, Pooled):
            self.pools[node] = result.kind
        if not self.tokens(node):
            self.samples.follow(node, inputs, self.parts(node), result.mixed)
            if node in self.samples.across:
                self.space.unaligned.add(node.name)
        if self._keeps_weights(node):
            self.weights.add(node)

    def _on_whole_tokens(self, node: Node, inputs: Sequence[Node]) -> Carried:
        """What an op makes of whole tokens: by its rule, from the axes that its inputs then have."""
        whole: dict[Node, Any] = {
            value: self.samples.as_whole(axes) if is_axes(axes) else tuple(map(self.samples.as_whole, axes))
            for value, axes in ((value, self.axes[value]) for value in inputs if value in self.axes)
        }
        if not any(axes is None or None in axes for axes in whole.values()):
            with contextlib.suppress(Barrier):
                result = apply_rule(self.rules(node.target), self.known.supposing(whole), node)
                return Carried(result.axes, result.mixed)  # what it pools or drops there are whole tokens
        return Carried(fresh_outputs(self.space, node), mixed=None)

    def _end_branch(self, node: Node, inputs: list[Node], whole: Node) -> None:
        values = tuple(value for value in inputs if self.tokens(value))
        self.barriers.append(BarrierRecord(node, BRANCH_END, values))
        self.ends.add(node)
        like = [hint(n) for n in node.meta["val"].shape] == [hint(n) for n in whole.meta["val"].shape]
        self.axes[node] = self.of(whole) if like else fresh_outputs(self.space, node)

    def _changes_tokens(self, node: Node) -> bool:
        """Whether an op writes to memory that a tensor of tokens may share."""
        if not is_mutable(node):
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

    def is_fatal(self, node: Node, values: tuple[Node, ...]) -> bool:
        """Whether restoring the values would not serve a node: it changes them, or they are attention weights."""
        return is_mutable(node) or any(len(self.tokens(value)) != 1 or value in self.weights for value in values)

    def _keeps_weights(self, node: Node) -> bool:
        """Whether a node is the softmax of an attention over tokens, or its weights, still over keys."""
        if not self.tokens(node) and not self._is_softmax(node):
            return False
        return self._is_softmax(node) or (
            node not in self.attention_nodes and any(value in self.weights for value in tensor_inputs(node))
        )

    def _is_softmax(self, node: Node) -> bool:
        return node in self.attention_nodes and is_op(node, *SOFTMAX)

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
