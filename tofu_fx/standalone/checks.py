"""A graph that was written for some inputs says so when it is called with others: other sizes, or what masks hide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy

from tofu_fx.errors import TofuError
from tofu_fx.sites.guards import Guard


def check_input(x: torch.Tensor, name: str, shape: Sequence[int | None], dtype: torch.dtype) -> torch.Tensor:
    """``x``, if it has the sizes (None: any) and the dtype that the graph was written for.

    Raises:
        TofuError: it has others.
    """
    if isinstance(x, Proxy):  # the graph that calls this is traced again
        return x.tracer.create_proxy("call_function", check_input, (x, name, list(shape), dtype), {})
    fits = len(x.shape) == len(shape) and all(b is None or a == b for a, b in zip(x.shape, shape, strict=True))
    if not fits or x.dtype != dtype:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise TofuError(
            f"{name}: this graph was written for [{wanted}] in {dtype}, got {list(x.shape)} in {x.dtype}; rewrite the "
            "model again with inputs of these sizes"
        )
    return x


def check_inputs(graph: Graph, inputs: Sequence[Node]) -> None:
    """Have a graph check its inputs, which have fake values, before it uses them."""
    last = graph.find_nodes(op="placeholder")[-1:]
    for node in inputs:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not node.users:
            continue
        shape = [size if isinstance(size, int) else None for size in value.shape]
        with graph.inserting_after(last[0]):
            checked = graph.call_function(check_input, (node, str(node.target), shape, value.dtype))
        checked.meta = dict(node.meta)
        _use_instead(node, checked)


def _use_instead(node: Node, checked: Node) -> None:
    node.replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)


class ValueChecks(nn.Module):
    """Whether what was decided from the values of the first call holds in this one: called with all of its arguments.

    The values are looked at outside of any graph that this is compiled in, and the checks are no data: they are copied,
    but not pickled.
    """

    def __init__(self, guards: Sequence[Guard]) -> None:
        super().__init__()
        self.guards = list(guards)

    @torch.compiler.disable
    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        """The first argument of the graph, which is to be used only afterwards.

        Raises:
            TofuError: it does not hold.
        """
        for guard in self.guards:
            if not guard.holds(args):
                raise TofuError(
                    f"this graph was written for calls in which {guard.what}, and in this one that is not so: rewrite "
                    "the model again with these inputs"
                )
        return x

    def __deepcopy__(self, memo: Any) -> ValueChecks:
        return ValueChecks(self.guards)

    def __reduce__(self) -> NoReturn:
        raise TofuError(
            "a graph that checks in each call what its masks hide cannot be pickled: rewrite the model where it is to "
            "run (what it checks: " + "; ".join(guard.what for guard in self.guards) + ")"
        )


def check_values(module: GraphModule, first: Node, arguments: Sequence[Node], guards: Sequence[Guard]) -> None:
    """Have a graph check its guards before it uses its input ``first``; ``arguments`` as the guards take them."""
    module.add_submodule("value_checks", ValueChecks(guards))
    with module.graph.inserting_after(max(arguments, key=list(module.graph.nodes).index)):
        checked = module.graph.call_module("value_checks", (first, *arguments))
    checked.meta = dict(first.meta)
    _use_instead(first, checked)
