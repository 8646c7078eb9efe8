"""Outputs in the memory layout in which the caller saw them traced.

A class token that is read from a shorter stream lies closer to the next sample's than one that is read from the whole
stream, and a convolution takes its layout from its input. What a caller does next may depend on it (``view``, a guard
of the next graph), so every output of a rewritten graph gets its traced strides back.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Barrier, hint
from tofu_fx.rewriting.layout import Count, Emitter, aten


def strides_of(value: torch.Tensor) -> tuple[int, ...]:
    """The strides of a tensor, in elements; 0 for dims of size 1 and for empty tensors, whose strides mean nothing."""
    sizes = [hint(size) for size in value.shape]
    meaningful = 0 not in sizes
    return tuple(hint(s) if meaningful and n != 1 else 0 for n, s in zip(sizes, value.stride(), strict=True))


def as_traced(emit: Emitter, was: torch.Tensor, new: Node) -> Node:
    """A node with the strides of ``was``, a tensor of its shape: the node itself, or a copy that is laid out so.

    A dim of stride 0 (of ``expand``) is taken once and expanded.

    Raises:
        Barrier: the layout overlaps itself, or has gaps whose width changes between calls.
    """
    strides = strides_of(was)
    if strides == strides_of(new.meta["val"]):
        return new
    sizes = [hint(size) for size in was.shape]
    repeated = [dim for dim, (n, stride) in enumerate(zip(sizes, strides, strict=True)) if n > 1 and stride == 0]
    for dim in repeated:
        new = emit.call(aten.slice.Tensor, new, dim, 0, 1)
    apart = sorted((dim for dim in range(was.dim()) if strides[dim]), key=lambda dim: -strides[dim])
    extents = [1 + sum((sizes[dim] - 1) * strides[dim] for dim in apart[i:]) for i in range(len(apart) + 1)]
    if any(strides[dim] < inner for dim, inner in zip(apart, extents[1:], strict=True)):
        raise Barrier(f"an output of strides {strides} overlaps itself in memory")
    if extents[0] == math.prod(sizes[dim] for dim in apart):
        new = _in_order(emit, new, [*(dim for dim in range(was.dim()) if not strides[dim]), *apart])
    else:
        new = _with_gaps(emit, new, was.stride(), apart)
    if repeated:
        shape = [_known(size) if dim in repeated else -1 for dim, size in enumerate(was.shape)]
        new = emit.call(aten.expand.default, new, shape)
    return new


def _in_order(emit: Emitter, new: Node, order: list[int]) -> Node:
    """Dense, with the dims lying in memory in an order: the first changes slowest."""
    dense = emit.call(aten.contiguous.default, emit.call(aten.permute.default, new, order))
    return emit.call(aten.permute.default, dense, [order.index(dim) for dim in range(len(order))])


def _with_gaps(emit: Emitter, new: Node, strides: Sequence[Any], apart: Sequence[int]) -> Node:
    """Written into memory of its own that has room for what lay between."""
    shape: Sequence[Any] = new.meta["val"].shape
    size = [n if isinstance(n, int) else emit.once(aten.sym_size.int, new, dim) for dim, n in enumerate(shape)]
    stride = [_known(strides[dim]) if dim in apart else 1 for dim in range(len(shape))]
    extent: Count = 1
    for dim in apart:
        reach = emit.arithmetic(operator.mul, emit.arithmetic(operator.sub, size[dim], 1), stride[dim])
        extent = emit.arithmetic(operator.add, extent, reach)
    memory = emit.call(aten.new_zeros.default, new, [extent])
    memory = emit.call(aten.as_strided_scatter.default, memory, new, size, stride, 0)
    return emit.call(aten.as_strided.default, memory, size, stride, 0)


def _known(size: Any) -> int:
    if not isinstance(size, int):
        raise Barrier(f"the memory layout of an output depends on the size {size}, which changes between calls")
    return size
