"""Small questions about FX nodes that every part of the compiler asks: inputs, arguments, where a node comes from."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Collection, Iterator, Mapping
from operator import attrgetter
from typing import Any

import networkx as nx
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from tofu_fx.fx.op_families import MAY_ALIAS

#: meta key of a size computed by make_polymorphic; it belongs to the one node that uses it
LITERAL = "tofu_literal"
#: meta key of a placeholder that is "PARAMETER", "BUFFER" or "CONSTANT_TENSOR", in a graph that is not from Dynamo
MODEL_STATE = "tofu_model_state"
_PRODUCT = re.compile("matmul|mm|mv|dot|inner|einsum|linear|conv|attention|lstm|gru|rnn")
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")


def is_parameter(node: Node) -> bool:
    """Whether a placeholder is a parameter of the model."""
    return node.meta.get(MODEL_STATE) == "PARAMETER" or isinstance(node.meta.get("example_value"), torch.nn.Parameter)


def tensor_inputs(node: Node) -> list[Node]:
    """The input nodes whose value is a tensor or a tuple of tensors, without repeats, in order."""
    return [value for value in node.all_input_nodes if isinstance(value.meta.get("val"), (torch.Tensor, tuple, list))]


def argument(node: Node, name: str, default: Any = None) -> Any:
    """The value of an op's argument by its name in the schema, wherever it was passed; else the schema's default."""
    schema = node.target._schema  # type: ignore[union-attr]
    for i, argument in enumerate(schema.arguments):
        if argument.name == name:
            if i < len(node.args) and not argument.kwarg_only:
                return node.args[i]
            return node.kwargs.get(name, argument.default_value if argument.has_default_value() else default)
    return default


def set_argument(node: Node, name: str, value: Any) -> None:
    """Replace an op's argument by its name in the schema."""
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            if i < len(node.args) and not argument.kwarg_only:
                node.update_arg(i, value)
            else:
                node.update_kwarg(name, value)
            return
    raise KeyError(f"{node.target} has no argument {name!r}")


def is_op(node: Any, *names: str) -> bool:
    """Whether a node calls one of these ATen ops, any overload: ``is_op(node, "add", "sub")``."""
    packet = getattr(getattr(node, "target", None), "_schema", None)
    return packet is not None and packet.name.removeprefix("aten::") in names


def is_mutable(node: Any) -> bool:
    """Whether a node calls an op that writes to one of its operands."""
    return bool(getattr(getattr(getattr(node, "target", None), "_schema", None), "is_mutable", False))


def is_alias(node: Node) -> bool:
    """Whether the result may share memory with an input: views, and ops such as contiguous that only sometimes copy."""
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True  # a placeholder or something unknown: the caller's memory
    name = schema.name.removeprefix("aten::")
    return name in MAY_ALIAS or (not schema.is_mutable and any(r.alias_info is not None for r in schema.returns))


def may_multiply(node: Node) -> bool:
    """Whether a node of Dynamo's graph may multiply matrices, as every attention does: judged by its name alone."""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims"):
        return True
    return _PRODUCT.search(str(getattr(node.target, "__name__", node.target))) is not None


def is_impure(node: Node) -> bool:
    """What must stay although nothing uses it: mutation, random state, grad-mode and autocast switches."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.is_impure()
    return schema.is_mutable or not schema.returns or node.is_impure()


def value_graph(graph: Graph) -> nx.DiGraph[Node]:
    """The dataflow of a graph as a networkx graph: an edge from each node to each of its users."""
    flow: nx.DiGraph[Node] = nx.DiGraph()
    for node in graph.nodes:
        flow.add_node(node)
        flow.add_edges_from((value, node) for value in node.all_input_nodes)
    return flow


def module_path(node: Node) -> str:
    """The innermost module that made a node, as the user knows it: ``blocks.3.attn``. Empty where not known."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"(?:\._modules|\.__dict__\['_modules'\])\['([^']+)'\]", r".\1", path)
    path = re.sub(r"^L\['self'\]\.?", "", path)
    path = re.sub(r"^L\['(\w+)'\]", r"\1", path)
    return re.sub(r"\['?([^'\]]+)'?\]", r".\1", path).replace("getattr", "").strip(".")


def source_line(node: Node) -> str:
    """`` (file:line)`` of the code that made a node (PyTorch's own where there is no other), or the empty string."""
    trace = node.meta.get("stack_trace") or ""
    places = re.findall(r'File "([^"]+)", line (\d+)', trace)
    file, line = next((p for p in reversed(places) if not p[0].startswith(_TORCH)), places[-1] if places else ("", ""))
    return f" ({file}:{line})" if file else ""


def copy_graph(graph: Graph) -> Graph:
    """A copy of a graph, node by node, with its metadata."""
    new = Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def graph_module(
    root: torch.nn.Module, graph: Graph, constants: Mapping[str, torch.Tensor] | None = None
) -> GraphModule:
    """A graph module that writes its code when it is asked for it: most graphs between two passes never run.

    It holds what the root holds that the graph asks for, and the ``constants``, as buffers.
    """
    attributes: Any = root
    if constants:
        names = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        attributes = {name: constants[name] if name in constants else attrgetter(name)(root) for name in names}
    module: GraphModule = _LazyGraphModule(attributes, graph)
    return module


def walk_back(node: Node, through: Collection[str]) -> Iterator[Node]:
    """The node, then its first tensor input, and so on for as long as the ops are among ``through``."""
    while True:
        yield node
        inputs = tensor_inputs(node)
        if not is_op(node, *through) or not inputs:
            return
        node = inputs[0]
