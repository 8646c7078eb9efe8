"""Tensors that a graph holds itself instead of taking them as inputs: an optimizer's parameters and state.

The recorder knows inputs only. So they are made inputs of a copy of the graph, and are put back when it is recorded.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from tofu_fx.errors import TofuError
from tofu_fx.fx.nodes import source_line


def fake_of(node: Node) -> Any:
    """The value that Dynamo noted for an input or a held tensor."""
    return node.meta.get("example_value", node.meta.get("val"))


def lift_tensors(traced: GraphModule) -> tuple[GraphModule, dict[str, torch.Tensor]]:
    """The graph with its tensors as inputs after its own, and the tensors by the names of these inputs, in order."""
    nodes = [node for node in traced.graph.find_nodes(op="get_attr") if isinstance(fake_of(node), FakeTensor)]
    if not nodes:
        return traced, {}
    graph = Graph()
    copies = {node: graph.node_copy(node) for node in traced.graph.find_nodes(op="placeholder")}
    inputs: dict[str, Node] = {}
    held: dict[str, torch.Tensor] = {}
    for node in nodes:
        target = str(node.target)
        if target not in inputs:
            inputs[target] = graph.placeholder(target.replace(".", "_"))
            inputs[target].meta = dict(node.meta)
            held[inputs[target].name] = attrgetter(target)(traced)
        copies[node] = inputs[target]
    for node in traced.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return GraphModule(traced, graph), held


def put_back(lowered: GraphModule, held: dict[str, torch.Tensor]) -> None:
    """Make the inputs after the graph's own what they were.

    Raises:
        TofuError: the recorder lost sight of a value, and took its fake for a constant.
    """
    graph = lowered.graph
    for node in graph.find_nodes(op="get_attr"):
        if isinstance(attrgetter(str(node.target))(lowered), FakeTensor):
            user = next(iter(node.users), node)
            raise TofuError(f"an input of {user.name}{source_line(user)} could not be recorded as ATen calls")
    inputs = graph.find_nodes(op="placeholder")
    for node, (name, value) in zip(inputs[len(inputs) - len(held) :], held.items(), strict=True):
        register = lowered.register_parameter if isinstance(value, torch.nn.Parameter) else lowered.register_buffer
        register(name, value)  # type: ignore[arg-type]
        with graph.inserting_before(node):
            attribute = graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
