"""Floating-point operations of an ATen graph, counted from the shapes of its fake values.

One multiply-add counts as two operations, the convention of ``torch.utils.flop_counter``. (The ViT literature's
"GFLOPs" are multiply-adds: half of these.) Only matrix products, convolutions and attention are counted; elementwise
work, norms and softmax are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from tofu_fx.graphs import argument, is_op
from tofu_fx.tokens import hint


def _shape(value: Any) -> list[int]:
    return [hint(size) for size in value.meta["val"].shape]


def _linear(node: Node) -> int:
    return 2 * math.prod(_shape(node)) * _shape(node.args[0])[-1]


def _matmul(node: Node) -> int:
    return 2 * math.prod(_shape(node)) * _shape(node.args[0])[-1]


def _addmm(node: Node) -> int:
    return 2 * math.prod(_shape(node)) * _shape(node.args[1])[-1]


def _convolution(node: Node) -> int:
    return 2 * math.prod(_shape(node)) * math.prod(_shape(node.args[1])[1:])


def _attention(node: Node) -> int:
    q, k, v = (_shape(argument(node, name)) for name in ("query", "key", "value"))
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _einsum(node: Node) -> int:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    sizes: dict[str, int] = {}
    for term, operand in zip(equation.split("->")[0].split(","), operands, strict=True):  # type: ignore[arg-type]
        sizes.update(zip(term, _shape(operand), strict=False))
    return 2 * math.prod(sizes.values())


_COUNTS: dict[str, Callable[[Node], int]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
}


def count_flops(graph: Graph) -> int:
    """Operations of one run of the graph, at the batch size it was traced with."""
    total = 0
    for node in graph.nodes:
        for name, count in _COUNTS.items():
            if is_op(node, name) and isinstance(node.meta.get("val"), torch.Tensor):
                total += count(node)
    return total
