"""Running a graph node by node, and the first run: it finds where in every tensor the tokens are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_unflatten

from tofu_fx.testing.axis import Axis, Unfit
from tofu_fx.testing.labels import Companion, Trial, carry, companions
from tofu_fx.testing.told import Entry, Facts


@dataclass
class Labels:
    """What was found out about a graph on its first run: the axes of each node's results, and what joins them."""

    axes: dict[str, list[list[Axis]]] = field(default_factory=dict)
    companions: dict[str, list[Companion]] = field(default_factory=dict)
    known: bool = False


@dataclass
class Prepared:
    """A graph that is ready to be run, and what is known of it."""

    root: GraphModule
    facts: Facts
    graph: Graph
    #: the entries by their nodes
    entries: dict[Node, Entry]
    #: the node of each fused attention's weights
    weights: dict[str, Node]
    labels: Labels


class Running:
    """Runs a graph node by node on real tensors; what a node with tokens does is the subclasses'."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.facts, self.labels = prepared, prepared.facts, prepared.labels
        self.env: dict[Node, Any] = {}

    def run(self, *inputs: Any) -> Any:
        """The graph's output on its inputs, which stay as they are."""
        # All at once: keys are computed ahead of their place, of weights that may be passed after the tokens.
        given = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        self.env.update(zip(self.prepared.graph.find_nodes(op="placeholder"), given, strict=True))
        for node in self.prepared.graph.nodes:
            if node.op == "placeholder":
                pass
            elif node.op == "get_attr":
                self.env[node] = self.attribute(str(node.target))
            elif node.op == "output":
                return map_arg(node.args[0], self.output)
            else:
                self.env[node] = self.visit(node)
            entry = self.prepared.entries.get(node)
            if entry is not None:
                self.enter(node, entry)
        raise AssertionError("the graph has no output")

    def visit(self, node: Node) -> Any:
        """The value of a node."""
        raise NotImplementedError

    def enter(self, node: Node, entry: Entry) -> None:
        """What happens after a node at which tokens become fewer."""
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

    def attribute(self, name: str) -> Any:
        """What the graph module holds under a name with dots."""
        value: Any = self.prepared.root
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
                for place in range(len(operands))
                # Of other ops each element would be tried, and memory that nobody wrote yet says anything.
                if trial.pointwise or not axes[place]
                for companion in companions(trial, place, results, axes[place])
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
