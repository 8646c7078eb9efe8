"""Which rows of an op's operands one row of its result is computed from: the table, by family of ops.

A *row* is a position along one dim. An entry says, for each operand that has rows of its own along that dim, in which
of its dims they are, if each row of the result is computed from the same row of these operands and from nothing else
of them. An op without an entry needs all rows of its operands. So a missing entry costs speed only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import hint
from tofu_fx.fx.nodes import argument, is_op
from tofu_fx.fx.op_families import COPIES, GROUPINGS, MATRIX_PRODUCTS, SAME_VALUES, SOFTMAX, TOKEN_NORMS


@dataclass(frozen=True)
class Operand:
    """An operand that has the rows: the node, the dim that they are in, and where it stands among the arguments."""

    node: Node
    dim: int
    #: the number of the argument, and of its element where that is a list of tensors
    place: tuple[int, ...]


def carriers(node: Node, dim: int) -> list[Operand] | None:
    """The operands from whose rows the rows of a node along ``dim`` are computed, one from one; None if not so.

    Args:
        node: with a tensor, or a tuple of them, as its value.
        dim: of the result, or of each of them; not negative.
    """
    rule = _rule(node.target)
    if rule is None or any(isinstance(value, Node) for name, value in node.kwargs.items() if name != "attn_mask"):
        return None
    found = rule(node, dim)
    if found is None:
        return None
    return [operand for operand in found if operand is not None]


def shape(node: Any) -> list[int]:
    """The sizes of a node's value, or of the first of its values, to look at."""
    value = node.meta["val"]
    return [hint(size) for size in (value[0] if isinstance(value, (tuple, list)) else value).shape]


Found = Sequence[Operand | None] | None
Rule = Callable[[Node, int], Found]


def _rule(target: Any) -> Rule | None:
    if target is operator.getitem:
        return _same
    schema = getattr(target, "_schema", None)
    if schema is None or schema.is_mutable or not schema.name.startswith("aten::"):
        return None
    name = schema.name.removeprefix("aten::")
    if torch.Tag.nondeterministic_seeded in target.tags and name not in ("dropout", "scaled_dot_product_attention"):
        return None  # fewer random numbers would be others
    if name in _RULES:
        return _RULES[name]
    return _pointwise if torch.Tag.pointwise in target.tags else None


def _at(node: Node, place: int, dim: int) -> Operand | None:
    value = node.args[place]
    return Operand(value, dim, (place,)) if isinstance(value, Node) else None


def _same(node: Node, dim: int) -> Found:
    """The same dim of the first operand."""
    return [_at(node, 0, dim)]


def _dropout(node: Node, dim: int) -> Found:
    random = argument(node, "train") and argument(node, "p") != 0  # of fewer rows it would drop others
    return None if random else _same(node, dim)


def _pointwise(node: Node, dim: int) -> Found:
    """The dims of all operands lined up from the right; one of size 1 serves every row."""
    return [_aligned(node, place, dim) for place in range(len(node.args))]


def _aligned(node: Node, place: int, dim: int) -> Operand | None:
    value = node.args[place]
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return None
    sizes, wanted = shape(value), shape(node)
    own = dim - (len(wanted) - len(sizes))
    return None if own < 0 or (sizes[own] == 1 != wanted[dim]) else Operand(value, own, (place,))


def _grouping(node: Node, dim: int) -> Found:
    """The dim of the same size with as many elements ahead of it: a whole dim of the one is one of the other."""
    before, after = shape(node.args[0]), shape(node)
    ahead = math.prod(after[:dim])
    for own, size in enumerate(before):
        if size == after[dim] and math.prod(before[:own]) == ahead and size > 1:
            return [_at(node, 0, own)]
    return None


def _permute(node: Node, dim: int) -> Found:
    order: Any = node.args[1]
    return [_at(node, 0, int(order[dim]) % len(order))]


def _transpose(node: Node, dim: int) -> Found:
    rank = len(shape(node))
    first, second = (int(d) % rank for d in node.args[1:3]) if len(node.args) > 2 else (rank - 2, rank - 1)  # type: ignore[arg-type]
    return [_at(node, 0, {first: second, second: first}.get(dim, dim))]


def _expand(node: Node, dim: int) -> Found:
    return [_aligned(node, 0, dim)]


def _taken(node: Node, dim: int) -> Found:
    """select, unbind: a dim is gone from the operand."""
    gone = int(argument(node, "dim")) % len(shape(node.args[0]))
    return [_at(node, 0, dim + (dim >= gone))]


def _cut(node: Node, dim: int) -> Found:
    """slice, split, chunk: a dim is shorter, the others as they are."""
    cut = int(argument(node, "dim")) % len(shape(node.args[0]))
    return None if dim == cut else [_at(node, 0, dim)]


def _joined(node: Node, dim: int) -> Found:
    """cat, stack: along another dim."""
    parts: Any = node.args[0]
    joined = int(argument(node, "dim")) % len(shape(node))
    if dim == joined:
        return None
    stacked = is_op(node, "stack")
    return [Operand(part, dim - (stacked and dim > joined), (0, i)) for i, part in enumerate(parts)]


def _linear(node: Node, dim: int) -> Found:
    return None if dim == len(shape(node)) - 1 else [_at(node, 0, dim)]


def _product(node: Node, dim: int, first: int = 0) -> Found:
    """matmul, bmm, mm: rows of the left operand, columns of the right, and what there is a batch of."""
    left, right = node.args[first : first + 2]
    sizes, rank = [shape(left), shape(right)], len(shape(node))
    if min(map(len, sizes)) < 2:
        return None
    if dim == rank - 2:
        return [_at(node, first, len(sizes[0]) - 2)]
    if dim == rank - 1:
        return [_at(node, first + 1, len(sizes[1]) - 1)]
    found: list[Operand | None] = []
    for i, own in enumerate(sizes):
        place = dim - (rank - len(own))
        found.append(None if place < 0 or own[place] == 1 else _at(node, first + i, place))
    return found


def _added_product(node: Node, dim: int) -> Found:
    product = _product(node, dim, first=1)
    return None if product is None else [_aligned(node, 0, dim), *product]


def _token_norm(node: Node, dim: int) -> Found:
    normed: Any = argument(node, "normalized_shape")
    return [_at(node, 0, dim)] if dim < len(shape(node)) - len(normed) else None


def _softmax(node: Node, dim: int) -> Found:
    return None if dim == int(argument(node, "dim")) % len(shape(node)) else [_at(node, 0, dim)]


def _reduction(node: Node, dim: int) -> Found:
    dims: Any = argument(node, "dim")
    rank = len(shape(node.args[0]))
    if dims is None:
        return None
    gone = {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if not gone:
        return None
    if argument(node, "keepdim"):
        return None if dim in gone else [_at(node, 0, dim)]
    return [_at(node, 0, [d for d in range(rank) if d not in gone][dim])]


def _attention(node: Node, dim: int) -> Found:
    """Fused attention: each query has a row of its own in the result and in the mask; samples and heads in all."""
    rank = len(shape(node))
    if dim == rank - 1 or argument(node, "enable_gqa") or argument(node, "dropout_p"):
        return None
    value = node.meta["val"]
    if argument(node, "is_causal") and not all(isinstance(size, int) for size in value.shape):
        return None
    mask = _aligned_mask(node, dim, rank)
    if dim == rank - 2:
        return [_at(node, 0, len(shape(node.args[0])) - 2), mask]
    found = [_aligned(node, place, dim) for place in range(3)]
    return [*found, mask]


def _aligned_mask(node: Node, dim: int, rank: int) -> Operand | None:
    mask = argument(node, "attn_mask")
    if not isinstance(mask, Node):
        return None
    sizes = shape(mask)
    own = dim - (rank - len(sizes))
    return None if own < 0 or sizes[own] == 1 else Operand(mask, own, (3,))


def _embedding(node: Node, dim: int) -> Found:
    return None if dim == len(shape(node)) - 1 else [_at(node, 1, dim)]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(COPIES | SAME_VALUES, _same),
    "dropout": _dropout,
    **dict.fromkeys(["multiply", "divide", "subtract", "relu", "gelu", "silu"], _pointwise),
    **dict.fromkeys([*GROUPINGS, "squeeze", "unsqueeze"], _grouping),
    "permute": _permute,
    **dict.fromkeys(["transpose", "t", "mT"], _transpose),
    "expand": _expand,
    **dict.fromkeys(["select", "unbind"], _taken),
    **dict.fromkeys(["slice", "split", "split_with_sizes", "chunk"], _cut),
    **dict.fromkeys(["cat", "stack"], _joined),
    "linear": _linear,
    **dict.fromkeys([*MATRIX_PRODUCTS, "mm"], _product),
    **dict.fromkeys(["addmm", "baddbmm"], _added_product),
    **dict.fromkeys(TOKEN_NORMS, _token_norm),
    **dict.fromkeys([*SOFTMAX, "log_softmax", "_log_softmax", "_safe_softmax"], _softmax),
    **dict.fromkeys(["mean", "sum", "amax", "amin", "var", "std", "any", "all", "linalg_vector_norm"], _reduction),
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
}
