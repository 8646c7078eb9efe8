"""Rules of ops that take or write a part of a tensor: a position, a range, one of several outputs."""

from __future__ import annotations

from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier, dim_size, has_tokens, hint
from tofu_fx.axes.known import Known
from tofu_fx.axes.rules.arguments import dims_of
from tofu_fx.axes.rules.result import Carried, Dropped, Rule, carried
from tofu_fx.fx.nodes import argument


def select(known: Known, node: Node) -> Carried:
    """One position of a dim. Of the token axis only protected tokens can be taken."""
    axes = known.of(node.args[0])
    d, index = dims_of(node, len(axes))[0], argument(node, "index")
    if has_tokens(axes[d]):
        atom = known.space.flat(axes[d])
        if not isinstance(index, int) or atom is None:
            raise Barrier("a token is taken by a computed position")
        index %= atom.size
        if atom.prefix <= index < atom.size - atom.suffix:
            raise Barrier(f"token {index} is taken by its position")
    return carried(axes[:d] + axes[d + 1 :], drops=has_tokens(axes[d]))


def slice_(known: Known, node: Node) -> Carried:
    """A range of a dim; the token axis can be cut only between protected and reducible tokens."""
    axes = known.of(node.args[0])
    d = dims_of(node, len(axes))[0]
    size = dim_size(axes[d])
    first, last = argument(node, "start"), argument(node, "end")
    if not all(end is None or isinstance(end, int) for end in (first, last)):
        if has_tokens(axes[d]):
            raise Barrier("tokens are cut at a computed position")
        fresh = known.space.fresh(f"{node.name}.{d}", node.meta["val"].shape[d])
        return Carried((*axes[:d], fresh, *axes[d + 1 :]), mixed=axes[d])
    start, stop, step = slice(first, last, argument(node, "step", 1)).indices(size)
    part = known.space.cut(axes[d], start, max(start, stop), step)
    return carried((*axes[:d], part, *axes[d + 1 :]), drops=has_tokens(axes[d]) and not has_tokens(part))


def slice_scatter(known: Known, node: Node) -> Axes:
    """A tensor with a range of a dim written over: of the token axis by the same tokens, or between protected ones."""
    base, part = (known.of(value) for value in node.args[:2])
    d = dims_of(node, len(base))[0]
    start, stop, step = slice(argument(node, "start"), argument(node, "end"), argument(node, "step", 1)).indices(
        dim_size(base[d])
    )
    written = known.space.cut(base[d], start, max(start, stop), step)
    if (has_tokens(written) or has_tokens(part[d])) and written != part[d]:
        raise Barrier("tokens are written over others")
    both = [(value, value in known.depends) for value in node.args[:2]]
    return tuple(
        dim if i == d else known.merge(((dim, both[0][1]), (part[i], both[1][1]))) for i, dim in enumerate(base)
    )


def split(known: Known, node: Node) -> Carried:
    """split, chunk, split_with_sizes, tensor_split: consecutive cuts of one dim."""
    axes = known.of(node.args[0])
    d = dims_of(node, len(axes))[0]
    cuts, start = [], 0
    for piece in node.meta["val"]:
        stop = start + hint(piece.shape[d])
        cuts.append(known.space.cut(axes[d], start, stop))
        start = stop
    drops = has_tokens(axes[d]) and not all(map(has_tokens, cuts))
    return carried(tuple((*axes[:d], cut, *axes[d + 1 :]) for cut in cuts), drops=drops)


def unbind(known: Known, node: Node) -> tuple[Axes, ...]:
    """One output for each position of a dim."""
    axes = known.of(node.args[0])
    d = dims_of(node, len(axes))[0]
    if has_tokens(axes[d]):
        raise Barrier("the token axis is taken apart")
    return tuple(axes[:d] + axes[d + 1 :] for _ in node.meta["val"])


def getitem(known: Known, node: Node) -> Dropped:
    """One output of an op with several. The others may be the ones that have the tokens."""
    return Dropped(known.axes[node.args[0]][node.args[1]])  # type: ignore[index]


SLICING_RULES: dict[str, Rule] = {
    "select": select,
    "slice": slice_,
    "slice_scatter": slice_scatter,
    **dict.fromkeys(["split", "chunk", "split_with_sizes", "tensor_split"], split),
    "unbind": unbind,
}
