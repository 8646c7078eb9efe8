"""Rules of ops that take or write a part of a tensor: a position, a range, one of several outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier, Dim, dim_size, has_tokens, hint
from tofu_fx.axes.rules.arguments import dims_of
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.fx.nodes import argument


def select(tracer: AxisTracer, node: Node) -> Axes:
    """One position of a dim. Of the token axis only protected tokens can be taken."""
    axes = tracer.of(node.args[0])
    d, index = dims_of(node, len(axes))[0], argument(node, "index")
    if has_tokens(axes[d]):
        atom = tracer.space.flat(axes[d])
        if not isinstance(index, int) or atom is None:
            raise Barrier("a token is taken by a computed position")
        index %= atom.size
        if atom.lead <= index < atom.size - atom.tail:
            raise Barrier(f"token {index} is taken by its position")
        tracer.drop()
    return axes[:d] + axes[d + 1 :]


def slice_(tracer: AxisTracer, node: Node) -> Axes:
    """A range of a dim; the token axis can be cut only between protected and reducible tokens."""
    axes = list(tracer.of(node.args[0]))
    d = dims_of(node, len(axes))[0]
    size = dim_size(axes[d])
    first, last = argument(node, "start"), argument(node, "end")
    if not all(end is None or isinstance(end, int) for end in (first, last)):
        if has_tokens(axes[d]):
            raise Barrier("tokens are cut at a computed position")
        tracer.mix(axes[d])
        axes[d] = tracer.space.fresh(f"{node.name}.{d}", node.meta["val"].shape[d])
        return tuple(axes)
    start, stop, step = slice(first, last, argument(node, "step", 1)).indices(size)
    axes[d] = _cut(tracer, axes[d], start, max(start, stop), step)
    return tuple(axes)


def slice_scatter(tracer: AxisTracer, node: Node) -> Axes:
    """A tensor with a range of a dim written over: of the token axis by the same tokens, or between protected ones."""
    base, part = (tracer.of(value) for value in node.args[:2])
    d = dims_of(node, len(base))[0]
    start, stop, step = slice(argument(node, "start"), argument(node, "end"), argument(node, "step", 1)).indices(
        dim_size(base[d])
    )
    written = tracer.space.cut(base[d], start, max(start, stop), step)
    if (has_tokens(written) or has_tokens(part[d])) and written != part[d]:
        raise Barrier("tokens are written over others")
    both = [(value, value in tracer.depends) for value in node.args[:2]]
    return tuple(
        dim if i == d else tracer.merge(((dim, both[0][1]), (part[i], both[1][1]))) for i, dim in enumerate(base)
    )


def _cut(tracer: AxisTracer, dim: Dim, start: int, stop: int, step: int = 1) -> Dim:
    part = tracer.space.cut(dim, start, stop, step)
    if has_tokens(dim) and not has_tokens(part):
        tracer.drop()
    return part


def split(tracer: AxisTracer, node: Node) -> tuple[Axes, ...]:
    """split, chunk, split_with_sizes, tensor_split: consecutive cuts of one dim."""
    axes = tracer.of(node.args[0])
    d = dims_of(node, len(axes))[0]
    parts, start = [], 0
    for piece in node.meta["val"]:
        stop = start + hint(piece.shape[d])
        parts.append((*axes[:d], _cut(tracer, axes[d], start, stop), *axes[d + 1 :]))
        start = stop
    return tuple(parts)


def unbind(tracer: AxisTracer, node: Node) -> tuple[Axes, ...]:
    """One output for each position of a dim."""
    axes = tracer.of(node.args[0])
    d = dims_of(node, len(axes))[0]
    if has_tokens(axes[d]):
        raise Barrier("the token axis is taken apart")
    return tuple(axes[:d] + axes[d + 1 :] for _ in node.meta["val"])


def getitem(tracer: AxisTracer, node: Node) -> Axes:
    """One output of an op with several. The others may be the ones that have the tokens."""
    tracer.drop()
    return tracer.axes[node.args[0]][node.args[1]]  # type: ignore[index]


SLICING_RULES: dict[str, Callable[[AxisTracer, Node], Any]] = {
    "select": select,
    "slice": slice_,
    "slice_scatter": slice_scatter,
    **dict.fromkeys(["split", "chunk", "split_with_sizes", "tensor_split"], split),
    "unbind": unbind,
}
