"""An independent interpreter of reduced models: the untouched graph, at full length, by the papers' formulas.

Every token keeps its place from the first node to the last. Where tokens are reduced, each member of a group gets what
the group becomes. So attentions, means and sums see a group as often as it has members, which is what log(size) and
weights by size stand for in the rewritten graph, without either. Three things are left to do:

- what is indexed by token and joins later (a position table, a mask, a bias) shows each member its chief's row;
- features of the same tokens from before a reduction (a long skip) are merged as the tokens were;
- where tokens must be whole, each gets its own features back: from before each reduction, plus what its group gained.

Which dimension of which tensor has the tokens is found out by trying (``tofu_fx.testing.labels``). Nothing of the
compiler is imported here: it says which sites reduce what (``Facts``), and this says what must come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_unflatten

from tofu_fx.testing.labels import Axis, Companion, Trial, Unfit, carry, companions

aten = torch.ops.aten


@dataclass(frozen=True)
class Span:
    """An axis in a dimension: ``size`` positions, each of which has ``inner`` of the dimension's that follow.

    Position ``ahead`` is the stream's first token.
    """

    dim: int
    size: int
    inner: int = 1
    ahead: int = 0


@dataclass(frozen=True)
class Where:
    """Where a tensor has its tokens and its samples."""

    tokens: Span
    samples: tuple[Span, ...]

    def axis(self, shape: Sequence[int], stream: int, tokens: int) -> Axis:
        """The labels of a tensor of this shape, of a stream of so many tokens."""
        token = _positions(self.tokens, shape) - self.tokens.ahead
        sample = torch.zeros_like(token)
        for span in self.samples:
            sample = sample * span.size + _positions(span, shape)
        return Axis(stream, torch.where((token >= 0) & (token < tokens), token, -1), sample)


def _positions(span: Span, shape: Sequence[int]) -> Tensor:
    index = torch.arange(shape[span.dim]) // span.inner % span.size
    return index.view([-1 if dim == span.dim else 1 for dim in range(len(shape))]).expand(shape).contiguous()


@dataclass(frozen=True)
class Vectors:
    """Queries, keys or attention weights: the node, where their tokens are, and the dim of the features (or keys).

    ``fused`` weights have no node of their own: ``node`` is the fused attention.
    """

    node: str
    where: Where
    dim: int
    fused: bool = False


@dataclass(frozen=True)
class Entry:
    """A place where tokens become fewer: behind ``node`` for all its later readers, or for ``readers`` only.

    ``owner`` names the choice of the tokens, which is made at the first entry of that name and used by the others.
    ``where`` is of the node's own value; ``grid`` is (frames, height, width, cell, seed) or empty.
    """

    site: str
    node: str
    readers: frozenset[str] | None
    stream: int
    placement: str
    owner: str
    strategy: str
    match: str
    r: int
    tokens: int
    lead: int
    tail: int
    grid: tuple[int, ...]
    masked: bool
    where: Where
    query: Vectors
    key: Vectors
    weights: Vectors


@dataclass(frozen=True)
class Facts:
    """All that the interpreter is told about a rewritten graph.

    ``barriers`` are the nodes that get whole tokens, ``ends`` those of them at which a branch joins the residual
    stream; ``attentions`` the softmaxes and products of attentions; ``inputs`` what the caller passes in.
    """

    entries: tuple[Entry, ...]
    barriers: frozenset[str]
    ends: frozenset[str]
    attentions: frozenset[str]
    inputs: frozenset[str]
    proportional: bool

    @property
    def frame(self) -> Any:
        """What the labels depend on: not the strategies, nor how many tokens go."""
        entries = tuple((e.node, e.readers, e.stream, e.tokens, e.where) for e in self.entries)
        return entries, self.barriers


@dataclass
class Labels:
    """What was found out about a graph on its first run: the axes of each node's results, and what joins them."""

    axes: dict[str, list[list[Axis]]] = field(default_factory=dict)
    companions: dict[str, list[Companion]] = field(default_factory=dict)
    known: bool = False


class Interpreter:
    """A callable that computes what the rewritten graph must, from the graph as traced and the facts.

    ``labels`` may be those of another interpreter of the same graph, entries and barriers.
    """

    def __init__(self, gm: GraphModule, facts: Facts, labels: Labels | None = None) -> None:
        self.root, self.facts = gm, facts
        self.graph, self.entries, self.weights = prepared(gm.graph, facts)
        self.labels = Labels() if labels is None else labels

    def __call__(self, *inputs: Any) -> Any:
        """Run on the graph's inputs.

        Raises:
            Undecided: a decision is too close to rounding to be compared.
            Unfit: something in the graph that the interpreter cannot follow.
        """
        from tofu_fx.testing.reduced import Reduced

        if not self.labels.known:
            Labelling(self).run(*inputs)
            self.labels.known = True
        return Reduced(self).run(*inputs)


def prepared(graph: Graph, facts: Facts) -> tuple[Graph, dict[Node, Entry], dict[str, Node]]:
    """A copy of the graph with an alias at each entry and fused attentions written out.

    Returns:
        The graph, the entries by their nodes, and the node of each fused attention's weights.
    """
    new, twins = Graph(), dict[Node, Node]()
    new.output(new.graph_copy(graph, twins))
    named = {old.name: twin for old, twin in twins.items()}
    for old, twin in twins.items():
        twin.name = old.name
    entries: dict[Node, Entry] = {}
    for entry in facts.entries:
        node = named[entry.node]
        if entry.readers is not None:
            with new.inserting_after(node):
                alias = new.call_function(aten.alias.default, (node,))
            for user in list(node.users):
                if user.name in entry.readers:
                    user.replace_input_with(node, alias)
            node = alias
        entries[node] = entry
    weights = {}
    for node in list(new.nodes):
        if node.target is aten.scaled_dot_product_attention.default and node.name not in facts.barriers:
            written = _written_out(new, node)
            if written is not None:
                weights[node.name] = written
    return new, entries, weights


def _written_out(graph: Graph, node: Node) -> Node | None:
    """Replace a fused attention by its formula; None where it is none of bidirectional tokens."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given: dict[str, Any] = {
        a.name: node.args[i] if i < len(node.args) else node.kwargs.get(a.name) for i, a in enumerate(schema)
    }
    if given["is_causal"] or given["dropout_p"] or given["enable_gqa"]:
        return None
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    with graph.inserting_before(node):
        scores = graph.call_function(aten.matmul.default, (query, graph.call_function(aten.mT.default, (key,))))
        scale = given["scale"] if given["scale"] is not None else query.meta["val"].shape[-1] ** -0.5
        scores = graph.call_function(aten.mul.Tensor, (scores, scale))
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            hidden = graph.call_function(aten.logical_not.default, (mask,))
            scores = graph.call_function(aten.masked_fill.Scalar, (scores, hidden, float("-inf")))
        elif mask is not None:
            scores = graph.call_function(aten.add.Tensor, (scores, mask))
        weights = graph.call_function(aten._safe_softmax.default, (scores, -1))
        out = graph.call_function(aten.matmul.default, (weights, value))
    node.replace_all_uses_with(out)
    name = node.name
    graph.erase_node(node)
    out.name = name
    return weights


class Running:
    """Runs a graph node by node on real tensors; what a node with tokens does is the subclasses'."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter, self.facts, self.labels = interpreter, interpreter.facts, interpreter.labels
        self.env: dict[Node, Any] = {}

    def run(self, *inputs: Any) -> Any:
        """The graph's output on its inputs, which stay as they are."""
        waiting = iter([value.clone() if isinstance(value, Tensor) else value for value in inputs])
        for node in self.interpreter.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = next(waiting)
            elif node.op == "get_attr":
                self.env[node] = self._attribute(str(node.target))
            elif node.op == "output":
                return map_arg(node.args[0], self.output)
            else:
                self.env[node] = self.visit(node)
            entry = self.interpreter.entries.get(node)
            if entry is not None:
                self.enter(node, entry)
        raise AssertionError("the graph has no output")

    def visit(self, node: Node) -> Any:
        """The value of a node."""
        raise NotImplementedError

    def enter(self, node: Node, entry: Entry) -> None:
        """What happens behind a node at which tokens become fewer."""
        raise NotImplementedError

    def output(self, node: Node) -> Any:
        """A node's value as the graph returns it."""
        return self.env[node]

    def plain(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """A node computed on the given values of its inputs, and on those of the run for the others."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else self.env[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def trial(self, node: Node, values: Mapping[Node, Any]) -> tuple[Trial, list[Node]]:
        """A node's op as a function of its operands that are tensors, and the operands."""
        leaves, spec = tree_flatten((node.args, node.kwargs), is_leaf=lambda value: isinstance(value, Node))
        settled = [(values[v] if v in values else self.env[v]) if isinstance(v, Node) else v for v in leaves]
        places = [i for i, value in enumerate(settled) if isinstance(value, Tensor)]

        def call(operands: Sequence[Any]) -> Any:
            filled = list(settled)
            for place, operand in zip(places, operands, strict=True):
                filled[place] = operand
            args, kwargs = tree_unflatten(filled, spec)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        return Trial(node.target, call, [settled[i] for i in places]), [leaves[i] for i in places]

    def axes(self, node: Node) -> list[Axis]:
        """The axes of a node with one result."""
        found = self.labels.axes.get(node.name, [[]])
        return found[0] if len(found) == 1 else []

    def _attribute(self, name: str) -> Any:
        value: Any = self.interpreter.root
        for part in name.split("."):
            value = getattr(value, part)
        return value


class Labelling(Running):
    """The first run, on whole tokens, which finds the tokens' labels in every tensor."""

    def visit(self, node: Node) -> Any:
        """Compute a node, and find its axes."""
        found = [self.labels.axes.get(value.name, []) for value in node.all_input_nodes]
        if not any(any(part) for part in found) or node.name in self.facts.barriers:
            return self.plain(node, {})
        if getattr(node.target, "__name__", "") == "getitem":
            value = self.plain(node, {})
            self.labels.axes[node.name] = [found[0][node.args[1]]]  # type: ignore[index]
            return value
        trial, operands = self.trial(node, {})
        axes = [self.axes(value) for value in operands]
        results = carry(trial, axes)
        if any(results):
            self.labels.axes[node.name] = results
            self.labels.companions[node.name] = [
                companion
                for place, value in enumerate(operands)
                if not axes[place]
                for companion in companions(trial, place, results)
            ]
        return self.plain(node, {})

    def enter(self, node: Node, entry: Entry) -> None:
        """Label the tokens of a stream where it starts, and those that came back to it from beside (a class token).

        Raises:
            Unfit: tokens do not stand where the compiler says.
        """
        own = entry.where.axis(self.env[node].shape, entry.stream, entry.tokens)
        for axis in self.axes(node):
            if axis.stream == entry.stream and bool(((axis.token >= 0) & (axis.token != own.token)).any()):
                raise Unfit("the tokens of a site do not stand where the compiler says")
        others = [axis for axis in self.axes(node) if axis.stream != entry.stream]
        self.labels.axes[node.name] = [[*others, own]]
