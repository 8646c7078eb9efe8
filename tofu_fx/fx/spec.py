"""What every graph between two passes must be. Checked by the runner before and after each pass."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule

from tofu_fx.errors import TofuError

_PYTHON = {
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.truediv,
    operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
    operator.and_, operator.or_, operator.not_,
}  # fmt: skip


def check_spec(gm: GraphModule, placeholders: int) -> None:
    """Raise TofuError naming the first node that breaks an invariant.

    The graph is well-formed; its placeholders are those that were traced; every call is an ATen or tofu operator, size
    arithmetic or a mode switch; every tensor has its fake value; it ends in one output.
    """
    gm.graph.lint()
    found = len(gm.graph.find_nodes(op="placeholder"))
    if found != placeholders:
        raise TofuError(f"the graph has {found} placeholders, {placeholders} were traced")
    for node in gm.graph.nodes:
        if node.op in ("call_method", "call_module"):
            raise TofuError(f"{node.name} is a {node.op}, not an ATen operator")
        if node.op != "call_function":
            continue
        overload = isinstance(node.target, torch._ops.OpOverload)
        module = getattr(node.target, "__module__", "") or ""
        if not overload and node.target not in _PYTHON and not module.startswith(("torch", "math", "_operator")):
            raise TofuError(f"{node.name} calls {node.target}, which is not an ATen operator")
        if overload and node.target._schema.returns and "val" not in node.meta:
            raise TofuError(f"{node.name} ({node.target}) has no fake value")
