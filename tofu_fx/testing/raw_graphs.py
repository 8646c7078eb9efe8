"""Raw FX graphs of ATen ops over tokens, written node by node from small steps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
BATCH, TOKENS, FEATURES = 2, 6, 4


@dataclass(frozen=True)
class RawGraph:
    """A graph module of ATen ops with fake values, and what it is called with. Shown as its code.

    ``tokens``: number of an input -> its dim of tokens; ``outputs``: the same of outputs, those not in it are pooled.
    """

    gm: GraphModule
    inputs: tuple[Tensor, ...]
    tokens: dict[int, int]
    outputs: dict[int, int]

    def __repr__(self) -> str:
        return f"RawGraph({self.gm.code.strip()})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would write out the tensors


class GraphBuilder:
    """Writes a graph over two inputs ``[B, N, C]``. ``values`` are the nodes of that shape."""

    def __init__(self, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.graph, self.root = Graph(), nn.Module()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.inputs = tuple(torch.randn(BATCH, TOKENS, FEATURES, generator=self.random) for _ in range(2))
        self.values = [self._noted(self.graph.placeholder(f"x{i}"), value) for i, value in enumerate(self.inputs)]

    def constant(self, *shape: int) -> Node:
        """A parameter of this shape."""
        name = f"constant{len(dict(self.root.named_parameters()))}"
        value = torch.randn(shape, generator=self.random) * 0.5
        self.root.register_parameter(name, nn.Parameter(value, requires_grad=False))
        return self._noted(self.graph.create_node("get_attr", name), value)

    def call(self, target: Any, *args: Any) -> Node:
        """Call an op."""
        node = self.graph.call_function(target, args)
        fakes = torch.fx.node.map_arg(args, lambda value: value.meta["val"])
        with self.fakes:
            node.meta["val"] = target(*fakes)
        return node

    def part(self, node: Node, place: int) -> Node:
        """One of several results."""
        return self.call(operator.getitem, node, place)

    def finish(self, results: list[Node], pooling: str | None = None) -> RawGraph:
        """Return the results and, with a pooling ("mean", "max"), the last value pooled over its tokens."""
        op = {"mean": aten.mean.dim, "max": aten.amax.default}
        pooled = [] if pooling is None else [self.call(op[pooling], self.values[-1], [1])]
        self.graph.output((*results, *pooled))
        tokens = dict.fromkeys(range(len(self.inputs)), 1)
        return RawGraph(GraphModule(self.root, self.graph), self.inputs, tokens, dict.fromkeys(range(len(results)), 1))

    def _noted(self, node: Node, value: Tensor) -> Node:
        node.meta["val"] = self.fakes.from_tensor(value)
        return node


#: from two values [B, N, C] to a third one
Step = Callable[[GraphBuilder, Node, Node], Node]


def _rolled(g: GraphBuilder, a: Node, b: Node) -> Node:
    ends = [g.call(aten.slice.Tensor, a, 1, 1, TOKENS), g.call(aten.slice.Tensor, b, 1, 0, 1)]
    return g.call(aten.cat.default, ends, 1)


def _turned(g: GraphBuilder, a: Node, b: Node) -> Node:
    parts = g.call(aten.split.Tensor, a, TOKENS // 3, 1)
    return g.call(aten.cat.default, [g.part(parts, 2), g.part(parts, 0), g.part(parts, 1)], 1)


def _window(g: GraphBuilder, a: Node, b: Node) -> Node:
    return g.call(aten.slice.Tensor, g.call(aten.cat.default, [a, b], 1), 1, 2, 2 + TOKENS)


def _exchanged(g: GraphBuilder, a: Node, b: Node) -> Node:
    parts = g.call(aten.split.Tensor, g.call(aten.cat.default, [a, b], 2), FEATURES, 2)
    return g.part(parts, 1)


def _transposed(g: GraphBuilder, a: Node, b: Node) -> Node:
    return g.call(aten.transpose.int, g.call(aten.relu.default, g.call(aten.transpose.int, a, 1, 2)), 1, 2)


def _flattened(g: GraphBuilder, a: Node, b: Node) -> Node:
    return g.call(aten.unflatten.int, g.call(aten.flatten.using_ints, a, 0, 1), 0, [BATCH, TOKENS])


def _through_a_view(target: Any, *view: Any) -> Step:
    """Change a value through a view of it."""

    def step(g: GraphBuilder, a: Node, b: Node) -> Node:
        g.call(target, g.call(view[0], a, *view[1:]), 0.5)
        return a

    return step


#: treat all tokens alike
ALIKE: tuple[Step, ...] = (
    lambda g, a, b: g.call(aten.relu.default, a),
    lambda g, a, b: g.call(aten.gelu.default, a),
    lambda g, a, b: g.call(aten.tanh.default, a),
    lambda g, a, b: g.call(aten.add.Tensor, a, b),
    lambda g, a, b: g.call(aten.sub.Tensor, a, g.call(aten.mul.Tensor, b, 0.5)),
    lambda g, a, b: g.call(aten.mul.Tensor, a, g.call(aten.sigmoid.default, b)),
    lambda g, a, b: g.call(aten.linear.default, a, g.constant(FEATURES, FEATURES), g.constant(FEATURES)),
    lambda g, a, b: g.call(aten.layer_norm.default, a, [FEATURES], g.constant(FEATURES), g.constant(FEATURES)),
    lambda g, a, b: g.call(aten.softmax.int, a, -1),
    lambda g, a, b: g.call(aten.sub.Tensor, a, g.call(aten.mean.dim, b, [1], True)),
    lambda g, a, b: g.call(aten.alias.default, a),
    lambda g, a, b: g.call(aten.detach.default, a),
    lambda g, a, b: g.call(aten.clone.default, a),
    lambda g, a, b: g.call(aten.contiguous.default, a),
    lambda g, a, b: g.call(aten.view_as.default, a, a),
    lambda g, a, b: g.call(aten.dropout.default, a, 0.5, False),
    lambda g, a, b: g.call(aten.squeeze.dim, g.call(aten.unsqueeze.default, a, 1), 1),
    _exchanged,
    _transposed,
    _flattened,
)
#: change a value, or what a view of it shows
IN_PLACE: tuple[Step, ...] = (
    lambda g, a, b: g.call(aten.add_.Tensor, a, 1.0),
    lambda g, a, b: g.call(aten.mul_.Tensor, a, 0.5),
    lambda g, a, b: g.call(aten.add_.Tensor, a, g.call(aten.tanh.default, b)),
    lambda g, a, b: g.call(aten.relu_.default, g.call(aten.clone.default, a)),
    _through_a_view(aten.mul_.Tensor, aten.transpose.int, 1, 2),
    _through_a_view(aten.add_.Tensor, aten.slice.Tensor, 2, 1, 3),
)
#: distinguish tokens by their place
BY_PLACE: tuple[Step, ...] = (
    lambda g, a, b: g.call(aten.add.Tensor, a, g.constant(TOKENS, FEATURES)),
    lambda g, a, b: g.call(aten.add.Tensor, a, g.call(aten.unsqueeze.default, g.call(aten.select.int, b, 1, 0), 1)),
    _window,
    _rolled,
    _turned,
    _through_a_view(aten.add_.Tensor, aten.select.int, 1, 0),
)


def _projected(g: GraphBuilder, a: Node) -> list[Node]:
    return [g.call(aten.linear.default, a, g.constant(FEATURES, FEATURES), g.constant(FEATURES)) for _ in range(3)]


def _joined(g: GraphBuilder, a: Node, branch: Node) -> Node:
    weight = g.constant(FEATURES, FEATURES)
    return g.call(aten.add.Tensor, a, g.call(aten.linear.default, branch, weight))


def _fused_attention(g: GraphBuilder, a: Node, b: Node) -> Node:
    heads = [g.call(aten.unsqueeze.default, part, 1) for part in _projected(g, a)]
    product = g.call(aten.scaled_dot_product_attention.default, *heads)
    return _joined(g, a, g.call(aten.squeeze.dim, product, 1))


def _written_attention(*ways: Any, transpose: Any = aten.mT.default, source: int = 0) -> Step:
    """Attention by products; ``ways`` are (op, arguments after the scores) from the scores to the weights."""

    def step(g: GraphBuilder, a: Node, b: Node) -> Node:
        q, k, v = _projected(g, a)
        k = g.call(transpose, k) if transpose is aten.mT.default else g.call(transpose, k, 1, 2)
        weights = g.call(aten.bmm.default, g.call(aten.mul.Tensor, q, 0.5), k)
        for target, *rest in ways:
            weights = g.call(target, weights, *rest)
        return _joined(g, a, g.call(aten.bmm.default, weights, v))

    return step


def _crossed(g: GraphBuilder, a: Node, b: Node) -> Node:
    """Queries of one value, keys and values of another."""
    q, (_, k, v) = _projected(g, a)[0], _projected(g, b)
    heads = [g.call(aten.unsqueeze.default, part, 1) for part in (q, k, v)]
    return _joined(g, a, g.call(aten.squeeze.dim, g.call(aten.scaled_dot_product_attention.default, *heads), 1))


#: attention with its residual add, and what looks like it
ATTENTIONS: tuple[Step, ...] = (
    _fused_attention,
    _written_attention((aten.softmax.int, -1), transpose=aten.transpose.int),
    _written_attention((aten.softmax.int, -1)),
    _written_attention((aten.softmax.int, -2), transpose=aten.transpose.int),
    _written_attention((aten.softmax.int, -1), (aten.square.default,), transpose=aten.transpose.int),
    _written_attention((aten.relu.default,), (aten.softmax.int, -1), transpose=aten.transpose.int),
    _written_attention((aten.log_softmax.int, -1), (aten.exp.default,)),
    _written_attention((aten.sigmoid.default,)),
    _crossed,
)
#: combine the samples of a batch, or pool tokens in ways that few models do
MIXING: tuple[Step, ...] = (
    lambda g, a, b: g.call(aten.sub.Tensor, a, g.call(aten.mean.dim, b, [0], True)),
    lambda g, a, b: g.call(aten.add.Tensor, a, g.call(aten.select.int, b, 0, 0)),
    lambda g, a, b: g.call(aten.add.Tensor, a, g.call(aten.slice.Tensor, b, 0, 0, 1)),
    lambda g, a, b: g.call(aten.add.Tensor, a, g.call(aten.amax.default, b, [0], True)),
    lambda g, a, b: g.call(aten.add.Tensor, a, g.call(aten.flip.default, b, [0])),
    lambda g, a, b: g.call(aten.add.Tensor, a, g.call(aten.roll.default, b, [1], [0])),
    lambda g, a, b: g.call(aten.add.Tensor, a, g.call(aten.logsumexp.default, b, [1], True)),
    lambda g, a, b: g.call(aten.softmax.int, a, 1),
    lambda g, a, b: g.call(aten.cumsum.default, a, 1),
    lambda g, a, b: g.call(aten.mul.Tensor, a, g.call(aten.sum.dim_IntList, b, [0, 1], True)),
)
