"""Rules of views and copies: the same elements in other dims."""

from __future__ import annotations

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier, Dim, Kind, dim_size, has_tokens
from tofu_fx.axes.known import Known
from tofu_fx.axes.rules.arguments import dims_of, shape_of
from tofu_fx.axes.rules.result import Rule
from tofu_fx.fx.op_families import EXPANSIONS, REGROUPINGS


def view(known: Known, node: Node) -> Axes:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: only the grouping of factors changes."""
    return known.space.regroup(known.of(node.args[0]), shape_of(node))


def permute(known: Known, node: Node) -> Axes:
    """The dims in another order."""
    axes = known.of(node.args[0])
    return tuple(axes[d] for d in dims_of(node, len(axes), "dims"))


def transpose(known: Known, node: Node) -> Axes:
    """Two dims exchanged (``t``: the last two)."""
    axes = list(known.of(node.args[0]))
    if len(node.args) == 1:
        return tuple(reversed(axes))
    a, b = (int(d) % len(axes) for d in node.args[1:3])  # type: ignore[arg-type]
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def movedim(known: Known, node: Node) -> Axes:
    """``movedim`` as a permutation."""
    axes = known.of(node.args[0])
    order = torch.movedim(torch.empty(list(range(1, len(axes) + 1)), device="meta"), *node.args[1:3]).shape  # type: ignore[arg-type]
    return tuple(axes[d - 1] for d in order)


def expand(known: Known, node: Node) -> Axes:
    """Dims of size 1 become fresh axes, the others are carried. ``repeat`` likewise; repeated tokens are a barrier."""
    axes, shape = known.of(node.args[0]), shape_of(node)
    axes = ((),) * (len(shape) - len(axes)) + axes
    result: list[Dim] = []
    for i, (dim, size) in enumerate(zip(axes, shape, strict=True)):
        if dim_size(dim) == size:
            result.append(dim)
        elif has_tokens(dim):
            raise Barrier("the tokens are repeated")
        else:
            # Copies of what was computed (key heads repeated for their queries) are no positions of the input.
            kind: Kind = "feature" if node in known.depends else "plain"
            result.append(known.space.fresh(f"{node.name}.{i}", node.meta["val"].shape[i], kind))
    return tuple(result)


def as_complex(known: Known, node: Node) -> Axes:
    """view_as_complex: pairs in the last dim become numbers (rotary positions)."""
    axes = known.of(node.args[0])
    if has_tokens(axes[-1]):
        raise Barrier("a pair of tokens becomes a number")
    return axes[:-1]


def as_real(known: Known, node: Node) -> Axes:
    """view_as_real: a new last dim of two."""
    return (*known.of(node.args[0]), known.space.fresh(f"{node.name}.parts", 2))


VIEW_RULES: dict[str, Rule] = {
    **dict.fromkeys([*REGROUPINGS, "reshape_as", "view_as"], view),
    "permute": permute,
    **dict.fromkeys(["transpose", "t"], transpose),
    **dict.fromkeys(["movedim", "moveaxis"], movedim),
    **dict.fromkeys(EXPANSIONS, expand),
    "view_as_complex": as_complex,
    "view_as_real": as_real,
}
