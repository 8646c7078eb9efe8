"""Rules of ops that put tensors beside each other, or something beside a tensor."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier, Dim, has_tokens, hint
from tofu_fx.axes.known import Known
from tofu_fx.axes.rules.arguments import dims_of, shape_of
from tofu_fx.axes.rules.result import Carried, Rule
from tofu_fx.fx.nodes import argument


def cat(known: Known, node: Node) -> Axes:
    """Concatenation: runs join along the dim, the other dims broadcast."""
    parts: Any = [part for part in node.args[0] if len(part.meta["val"].shape) > 1 or part.meta["val"].numel() != 0]  # type: ignore[union-attr]
    rank = len(shape_of(node))
    d = dims_of(node, rank)[0]
    columns = [(known.of(p)[d], hint(p.meta["val"].shape[d]), p in known.depends) for p in parts]
    joined = known.space.concatenate(columns, f"{node.name}.{d}")
    # The dim itself is left out of the merging: axes that follow each other are not one axis.
    return tuple(
        joined if i == d else known.merge((known.of(p)[i], p in known.depends) for p in parts) for i in range(rank)
    )


def stack(known: Known, node: Node) -> Axes:
    """A new dim in front of the broadcast others."""
    parts: Any = node.args[0]
    rank = len(shape_of(node))
    d = dims_of(node, rank)[0]
    axes = list(known.broadcast(parts, rank - 1))
    axes.insert(d, known.space.fresh(f"{node.name}.{d}", len(parts)))
    return tuple(axes)


def constant_pad(known: Known, node: Node) -> Carried:
    """Padding makes the padded dims new axes; tokens must not be padded."""
    axes, widths = list(known.of(node.args[0])), argument(node, "pad")
    mixed: Dim = ()
    for place in range(len(axes)):
        i = len(axes) - 1 - place  # the widths come in pairs, from the last dim on
        if all(isinstance(width, int) and width == 0 for width in widths[2 * place : 2 * place + 2]):
            continue
        if has_tokens(axes[i]):
            raise Barrier("the token axis is padded")
        mixed += axes[i]
        axes[i] = known.space.fresh(f"{node.name}.{i}", node.meta["val"].shape[i])
    return Carried(tuple(axes), mixed)


JOIN_RULES: dict[str, Rule] = {
    **dict.fromkeys(["cat", "concat", "concatenate"], cat),
    "stack": stack,
    **dict.fromkeys(["constant_pad_nd", "pad"], constant_pad),
}
