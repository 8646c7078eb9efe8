"""Write a few nodes with an `Emitter` and run them: what the emitted graph computes is held against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node

from tofu_fx.rewriting.layout import Emitter
from tofu_fx.rewriting.token_count_inputs import faking


class _Honest(Interpreter):
    """Runs a graph, and holds each tensor against the fake value that its node was given."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            fake = n.meta["val"]
            assert (tuple(fake.shape), fake.dtype) == (tuple(value.shape), value.dtype), n.format_node()
        return value


def written(write: Callable[..., Any], *values: Tensor) -> GraphModule:
    """The graph of ``write(emitter, *nodes)``, which gets a node for each value and returns nodes."""
    graph, mode = Graph(), FakeTensorMode()
    emit = Emitter(graph)
    with faking(mode):
        nodes = [graph.placeholder(f"given_{i}") for i in range(len(values))]
        for node, value in zip(nodes, values, strict=True):
            node.meta["val"] = mode.from_tensor(value)
        graph.output(write(emit, *nodes))
    graph.lint()
    return GraphModule(nn.Module(), graph)


def emitted(write: Callable[..., Any], *values: Tensor) -> Any:
    """What the graph of ``write`` gives for these values; each node's fake value must be true."""
    return _Honest(written(write, *values)).run(*values)


def targets(gm: GraphModule) -> list[Any]:
    """The ops of a graph."""
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal values in the same shape and dtype."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
