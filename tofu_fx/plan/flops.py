"""Floating-point operations and bytes of an ATen graph, counted from the shapes of its fake values.

One multiply-add counts as two operations, the convention of ``torch.utils.flop_counter``. (The ViT literature's
"GFLOPs" are multiply-adds: half of these.) Only matrix products, convolutions and attention are counted; elementwise
work, norms and softmax are not. Of a reduction its matching is: the products of candidates with partners. Sizes may be
symbols: then the counts are expressions of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from tofu_fx import ops  # noqa: F401 - registers torch.ops.tofu
from tofu_fx.axes.atoms import hint
from tofu_fx.fx.nodes import argument, is_alias, is_op, tensor_inputs
from tofu_fx.ops import Grid

#: turns a size of a fake tensor into a number, or into an expression
Size = Callable[[Any], Any]


def _linear(node: Node, size: Size) -> Any:
    return 2 * math.prod(_shape(node, size)) * _shape(node.args[0], size)[-1]


def _addmm(node: Node, size: Size) -> Any:
    return 2 * math.prod(_shape(node, size)) * _shape(node.args[1], size)[-1]


def _convolution(node: Node, size: Size) -> Any:
    # Each output of a convolution takes a product with the weight of its channel; transposed, each input gives one.
    weight = argument(node, "weight")
    transposed = "transpose" in node.target._schema.name or argument(node, "transposed")  # type: ignore[union-attr]
    return 2 * math.prod(_shape(node.args[0] if transposed else node, size)) * math.prod(_shape(weight, size)[1:])


def _attention(node: Node, size: Size) -> Any:
    q, k, v = (_shape(argument(node, name), size) for name in ("query", "key", "value"))
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _einsum(node: Node, size: Size) -> Any:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    sizes: dict[str, Any] = {}
    for term, operand in zip(equation.split("->")[0].split(","), operands, strict=True):  # type: ignore[arg-type]
        sizes.update(zip(term, _shape(operand, size), strict=False))
    return 2 * math.prod(sizes.values())


def matching_flops(
    batch: Any, free: Any, features: Any, cells: Sequence[int] | None = None, grouping: str = "bipartite"
) -> Any:
    """Operations of comparing the candidates with the partners among ``free`` tokens, of a grid of cells or not.

    By "ward" all pairs are compared, each by differences, squares and sums.
    """
    if cells:
        partners = Grid(*cells).cells
        return (3 if grouping == "ward" else 2) * batch * (free - partners) * partners * features
    if grouping == "ward":
        return 3 * batch * free * free * features // 2
    return batch * free * free * features // 2  # 2 x free / 2 x free / 2


def _matching(node: Node, size: Size) -> Any:
    (batch, tokens, _), (*_, features) = _shape(node.args[0], size), _shape(node.args[1], size)
    more = node.args[7:]
    cells, grouping = more[0] if more else None, more[1] if len(more) > 1 else "bipartite"
    return matching_flops(batch, tokens - node.args[5] - node.args[6], features, cells, grouping)  # type: ignore[arg-type]


_COUNTS: dict[str, Callable[[Node, Size], Any]] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm"), _linear),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **{f"conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution for n in (1, 2, 3)},
    "convolution": _convolution,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
}


def count_flops(graph: Graph) -> int:
    """Operations of one run of the graph, at the batch size it was traced with."""
    return sum(node_flops(node) for node in graph.nodes)


def node_flops(node: Node, size: Size = hint) -> Any:
    """Operations of one node."""
    if node.target is torch.ops.tofu.fuse_tokens.default:
        return _matching(node, size)
    for name, count in _COUNTS.items():
        if is_op(node, name) and isinstance(node.meta.get("val"), torch.Tensor):
            return count(node, size)
    return 0


def node_bytes(node: Node, size: Size = hint) -> Any:
    """Bytes that one node reads and writes. Views move nothing."""
    value = node.meta.get("val")
    if node.op != "call_function" or is_alias(node) or value is None:
        return 0
    return sum(_bytes(tensor, size) for other in (node, *tensor_inputs(node)) for tensor in _tensors(other))


def _bytes(tensor: torch.Tensor, size: Size) -> Any:
    return math.prod(size(n) for n in tensor.shape) * tensor.element_size()


def _tensors(node: Node) -> Sequence[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [tensor for tensor in values if isinstance(tensor, torch.Tensor)]


def _shape(value: Any, size: Size) -> list[Any]:
    return [size(n) for n in value.meta["val"].shape]
