"""Get the graph of a model, and compare graphs by what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_arg

from tofu_fx.backend import run_once
from tofu_fx.compilation import Captured
from tofu_fx.fx.nodes import is_impure
from tofu_fx.passes.lower_to_aten import lower_to_aten
from tofu_fx.plan.options import Options

#: any graph pass: it rewrites what it is given and returns nothing, or it returns another graph module
Pass = Callable[[GraphModule], "GraphModule | None"]


class _Place:
    """Stands for a node in the arguments of another."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __repr__(self) -> str:
        return f"%{self.place}"


def capture(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphModule, tuple[Any, ...]]:
    """The graph that Dynamo makes of one call of a model, and the inputs that this graph takes (parameters too).

    Raises:
        ValueError: the call makes no graph, or more than one (a graph break).
    """
    found: list[tuple[GraphModule, tuple[Any, ...]]] = []

    def backend(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append((gm, tuple(inputs)))
        return gm.forward

    run_once(model, backend, args, kwargs)
    if len(found) != 1:
        raise ValueError(f"the call makes {len(found)} graphs, not one: set TORCH_LOGS=graph_breaks to see why")
    return found[0]


def capture_aten(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphModule, tuple[Any, ...]]:
    """As `capture`, in ATen ops, each node with its fake value in ``meta["val"]``."""
    gm, inputs = capture(model, *args, **kwargs)
    return lowered(gm), inputs


def lowered(gm: GraphModule) -> GraphModule:
    """A graph in ATen ops, each node with its fake value; its placeholders must have fake values."""
    graph = lower_to_aten(Captured(gm, Options())).gm
    graph.recompile()
    return graph


def copied(gm: GraphModule) -> GraphModule:
    """A copy that a pass may do anything to: graph, parameters and buffers."""
    new = copy.deepcopy(gm)
    for old, node in zip(gm.graph.nodes, new.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):  # what tells a parameter from an input
            node._dynamo_source = old._dynamo_source
    # A lazy module would write its code after the pass, and hide that the pass forgot to have it written.
    _LazyGraphModule.force_recompile(new)
    return new


def applied(pass_: Pass, gm: GraphModule) -> GraphModule:
    """What a pass makes of a copy of a graph module, which itself stays as it is."""
    given = copied(gm)
    result = pass_(given)
    return given if result is None else result


def same_graph(before: Graph, after: Graph) -> bool:
    """Whether two graphs have the same nodes in the same order: ops, targets, arguments by position, keywords."""
    return not difference(before, after)


def difference(before: Graph, after: Graph) -> str:
    """Where two graphs first differ, in words; empty where they are the same. Names do not count."""
    left, right = _described(before), _described(after)
    for place, ((old, was), (new, now)) in enumerate(zip(left, right, strict=False)):
        if was != now:
            return f"node {place} was {_shown(old)}, is {_shown(new)}"
    if len(left) != len(right):
        extra, which = (left[len(right)], "gone") if len(left) > len(right) else (right[len(left)], "new")
        return f"{_shown(extra[0])} is {which}: {len(left)} nodes before, {len(right)} after"
    return ""


class Values:
    """Numbers what nodes compute: over all graphs asked, nodes have one number if they are made by the same ops from
    the same placeholders (by their order) and constants (by their name)."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def of(self, graph: Graph) -> dict[Node, int]:
        """The number of each node, the output left out."""
        numbers: dict[Node, int] = {}
        inputs = 0
        for node in graph.nodes:
            if node.op == "output":
                continue
            key: Any = _call(node, numbers)
            if node.op == "placeholder":
                key, inputs = ("placeholder", inputs), inputs + 1
            numbers[node] = self._numbers.setdefault(key, len(self._numbers))
        return numbers


def descendants(nodes: Iterable[Node]) -> set[Node]:
    """The nodes and all that is computed from them."""
    found, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.users)
    return found


def live(graph: Graph) -> set[Node]:
    """The nodes that an output or a side effect depends on."""
    found: set[Node] = set()
    todo = [node for node in graph.nodes if node.op == "output" or (node.op != "placeholder" and is_impure(node))]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _described(graph: Graph) -> list[tuple[Node, Any]]:
    places = {node: i for i, node in enumerate(graph.nodes)}
    return [(node, _call(node, places)) for node in graph.nodes]


def _call(node: Node, numbers: dict[Node, int]) -> tuple[Any, ...]:
    """A node's call with the nodes in it numbered. As text: 1, 1.0 and True are equal, NaN is not equal to itself."""
    target = "" if node.op in ("placeholder", "output") else node.target
    number: Callable[[Node], Any] = lambda value: _Place(numbers[value])  # noqa: E731
    args, kwargs = map_arg(node.args, number), map_arg(dict(sorted(node.kwargs.items())), number)
    return node.op, target, repr(_listed(args)), repr(_listed(kwargs))


def _listed(value: Any) -> Any:
    """Arguments with lists for tuples: an op takes either for a shape, and what lowers a graph again makes lists."""
    if isinstance(value, list | tuple):
        return [_listed(part) for part in value]
    return {key: _listed(part) for key, part in value.items()} if isinstance(value, dict) else value


def _shown(node: Node) -> str:
    text = node.format_node() or f"return {node.args[0]}"
    return text.removeprefix("%")
