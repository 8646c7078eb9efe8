"""``x.add_(y)`` on a tensor that nothing else sees -> ``add(x, y)``; ``x[..., ::2] = y`` -> ``slice_scatter(x, y)``.

Before: ``%a = aten.add_.Tensor(%x, %y)``, later readers of ``%x`` or ``%a``
After:  ``%a = aten.add.Tensor(%x, %y)``, later readers of ``%a``
Before: ``%v = aten.slice(%x, ...)``; ``aten.copy_(%v, %y)``, later readers of ``%x``
After:  ``%w = aten.slice_scatter(%x, %y, ...)``, later readers of ``%w``

Hand-written models say ``x += self.attn(x)``, and write rotary positions into every second feature. The residual
stream must be a value, or no node could stand for "the tokens before". Only done where it is provably the same: ``x``
is made by this graph, is not a view, has no views that are still read, and the result has the same dtype, shape and
strides (of an image's dims of size 1, too: by those convolutions and norms tell which of their kernels to take).
Anything else stays in place, and is a barrier to tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._prims_common import make_contiguous_strides_for
from torch.fx import Node

from tofu_fx.compilation import Lowered
from tofu_fx.fx.nodes import argument, is_alias, is_mutable, is_op

#: their twins return flags, where in place they keep the dtype
_FLAGS = {
    *("eq", "ne", "lt", "le", "gt", "ge", "not_equal", "less", "less_equal", "greater", "greater_equal"),
    *("logical_and", "logical_or", "logical_xor", "logical_not"),
}


def functionalize_inplace(lowered: Lowered) -> Lowered:
    """Rewrite the in-place ops of the graph that have a functional twin and a private target."""
    graph = lowered.gm.graph
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        twin = _functional_twin(node)
        if twin is None:
            continue
        lowered.at.node = node
        target = node.args[0]
        assert isinstance(target, Node)
        if is_op(node, "copy_") and is_op(target, "slice"):
            _write_part(node, place)
            continue
        if not _is_private({target}, place, place[node]) or not _same_form(target, node) or _has_odd_strides(target):
            continue
        node.target = twin
        for user in list(target.users):
            if place[user] > place[node]:
                user.replace_input_with(target, node)
    lowered.gm.recompile()
    return lowered


def _functional_twin(node: Node) -> torch._ops.OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``; None where there is none."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return None
    namespace, name = node.target._schema.name.split("::")
    if namespace != "aten" or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    twin = getattr(packet, node.target._overloadname, None)
    if twin is None or twin._schema.is_mutable or name[:-1] in _FLAGS:
        return None
    # The first argument, which is changed, is called "self" here and sometimes "input" there.
    same = [a.name for a in twin._schema.arguments[1:]] == [a.name for a in node.target._schema.arguments[1:]]
    return twin if same else None


def _write_part(node: Node, place: dict[Node, int]) -> None:
    """``copy_`` into a part of a private tensor, that nothing reads as such, becomes a new tensor; else it stays."""
    graph, (view, value, *rest) = node.graph, node.args
    views: list[Node] = []
    base: Any = view
    while is_op(base, "slice"):
        views.append(base)
        base = base.args[0]
    readers = [set(part.users) for part in views]
    if rest or node.users or not isinstance(value, Node) or not _same_form(views[0], node):
        return
    if readers != [{node}, *({part} for part in views[:-1])] or not _is_private({base, *views}, place, place[node]):
        return
    new = [value]
    for part in views:
        with graph.inserting_before(node):
            args = (part.args[0], new[-1], *(argument(part, key) for key in ("dim", "start", "end", "step")))
            new.append(graph.call_function(torch.ops.aten.slice_scatter.default, args))
        fakes = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
        new[-1].meta = {**node.meta, "val": torch.ops.aten.slice_scatter.default(*fakes)}
        place[new[-1]] = place[node]
    made = new[1:]
    if made[-1].meta["val"].stride() != base.meta["val"].stride():  # later views of it could not be made
        for other in reversed(made):
            graph.erase_node(other)
        return
    for user in list(base.users):
        if place[user] > place[node]:
            user.replace_input_with(base, made[-1])
    for old in (node, *views):
        graph.erase_node(old) if not old.users else None


def _is_private(targets: set[Node], place: dict[Node, int], at: int) -> bool:
    """Whether nothing but later readers of ``targets`` themselves could see them change."""
    shared = set(targets)
    todo = list(targets)
    while todo:
        value = todo.pop()
        family = [user for user in value.users if _shares(user) and place[user] < at]
        if _shares(value):
            if value.op != "call_function":
                return False
            family += value.all_input_nodes
        todo += [other for other in family if other not in shared]
        shared.update(family)
    later = (user for value in shared - targets for user in value.users if place[user] > at)
    return next(later, None) is None


def _shares(node: Node) -> bool:
    """Whether the result may be its input's memory: a view, or an op that was left in place."""
    return is_alias(node) or is_mutable(node)


def _has_odd_strides(target: Node) -> bool:
    """Whether a dim of size 1 has a stride that a new tensor would not have: the twin's result would be another.

    Only of images (and volumes) do kernels ask for the order of the dims, which they read from the strides. Fake values
    do not show it, for kernels see to it on their own.
    """
    value = target.meta["val"]
    if value.dim() < 4:
        return False
    strides = zip(value.shape, value.stride(), make_contiguous_strides_for(value.shape), strict=True)
    return any(isinstance(size, int) and size == 1 and str(step) != str(usual) for size, step, usual in strides)


def _same_form(target: Node, node: Node) -> bool:
    before, after = target.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return False
    operands = [value.meta.get("val") for value in node.all_input_nodes]
    dtypes = {value.dtype for value in operands if isinstance(value, torch.Tensor) and value.dim() > 0}
    # A flag beside numbers (what a masked_fill_ fills) does not change what comes out.
    same = dtypes - {torch.bool} <= {before.dtype}
    return argument(node, "self") is target and before.shape == after.shape and same
