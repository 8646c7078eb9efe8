"""How each op carries token axes: a table, one short rule an entry.

A rule takes the tracer and the node and returns the output's axes (a tuple of them for several outputs). It raises
``Barrier`` where tokens cannot pass. To add an op, write the rule next to its family and name it in ``RULES``; ops that
PyTorch itself tags as pointwise need no entry. An op without a rule is a barrier, so a missing entry costs speed only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier, Dim, Kind, dim_size, hint, token_atoms
from tofu_fx.axes.rules.contractions import LINEAR_RULES
from tofu_fx.axes.rules.images import IMAGE_RULES
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.fx.nodes import argument, tensor_inputs

Rule = Callable[[AxisTracer, Node], Any]


def _shape(node: Node) -> list[int]:
    return [hint(size) for size in node.meta["val"].shape]


def _has_tokens(dim: Dim) -> bool:
    return any(atom.is_token for atom in dim)


def _dims(node: Node, rank: int, name: str = "dim") -> list[int]:
    """The ``dim`` argument as non-negative ints; all dims where it is absent or empty."""
    dims = argument(node, name)
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def pointwise(tracer: AxisTracer, node: Node) -> Axes:
    """Elementwise: the axes of the broadcast operands."""
    operands = [v for arg in node.args for v in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return tracer.broadcast([*operands, *node.kwargs.values()], len(_shape(node)))


def prelu(tracer: AxisTracer, node: Node) -> Axes:
    """Elementwise; several weights belong to dim 1, which must not hold tokens."""
    axes, weights = tracer.of(node.args[0]), node.args[1].meta["val"].numel()  # type: ignore[union-attr]
    if weights != 1 and len(axes) > 1 and _has_tokens(axes[1]):
        raise Barrier("each token has a slope of its own")
    return axes


def like_first(tracer: AxisTracer, node: Node) -> Axes:
    """Same shape and axes as the first operand (dropout, to, contiguous, zeros_like, ...)."""
    return tracer.of(tensor_inputs(node)[0])


def like_first_alone(tracer: AxisTracer, node: Node) -> Axes:
    """As ``like_first``; the second operand gives its dtype only."""
    tracer.drop()
    return tracer.of(node.args[0])


def view(tracer: AxisTracer, node: Node) -> Axes:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: only the grouping of factors changes."""
    return tracer.space.regroup(tracer.of(node.args[0]), _shape(node))


def permute(tracer: AxisTracer, node: Node) -> Axes:
    """The dims in another order."""
    axes = tracer.of(node.args[0])
    return tuple(axes[d] for d in _dims(node, len(axes), "dims"))


def transpose(tracer: AxisTracer, node: Node) -> Axes:
    """Two dims exchanged (``t``: the last two)."""
    axes = list(tracer.of(node.args[0]))
    if len(node.args) == 1:
        return tuple(reversed(axes))
    a, b = (int(d) % len(axes) for d in node.args[1:3])  # type: ignore[arg-type]
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def movedim(tracer: AxisTracer, node: Node) -> Axes:
    """``movedim`` as a permutation."""
    axes = tracer.of(node.args[0])
    order = torch.movedim(torch.empty([0] * 0 + list(range(1, len(axes) + 1)), device="meta"), *node.args[1:3]).shape  # type: ignore[arg-type]
    return tuple(axes[d - 1] for d in order)


def expand(tracer: AxisTracer, node: Node) -> Axes:
    """Dims of size 1 become fresh axes, the others are carried. ``repeat`` likewise; repeated tokens are a barrier."""
    axes, shape = tracer.of(node.args[0]), _shape(node)
    axes = ((),) * (len(shape) - len(axes)) + axes
    result: list[Dim] = []
    for i, (dim, size) in enumerate(zip(axes, shape, strict=True)):
        if dim_size(dim) == size:
            result.append(dim)
        elif _has_tokens(dim):
            raise Barrier("the tokens are repeated")
        else:
            # Copies of what was computed (key heads repeated for their queries) are no positions of the input.
            kind: Kind = "feature" if node in tracer.depends else "plain"
            result.append(tracer.space.fresh(f"{node.name}.{i}", node.meta["val"].shape[i], kind))
    return tuple(result)


def softmax(tracer: AxisTracer, node: Node) -> Axes:
    """Normalising over tokens is attention; anywhere else it needs all of them."""
    axes = tracer.of(node.args[0])
    for d in _dims(node, len(axes)):
        if _has_tokens(axes[d]) and node not in tracer.attention_nodes:
            raise Barrier("softmax over tokens outside of a recognised attention")
        tracer.mix(axes[d])
    return axes


def norm(tracer: AxisTracer, node: Node) -> Axes:
    """layer_norm and rms_norm: over the trailing dims, which must not hold tokens."""
    axes = tracer.of(node.args[0])
    rank = len(argument(node, "normalized_shape"))
    if any(_has_tokens(dim) for dim in axes[len(axes) - rank :]):
        raise Barrier("the norm's statistics run over tokens")
    tracer.mix(*axes[len(axes) - rank :])
    return axes


def batch_norm(tracer: AxisTracer, node: Node) -> Axes:
    """Per-channel scale in eval mode; in training its statistics run over all tokens."""
    axes = tracer.of(node.args[0])
    if token_atoms(axes) and (argument(node, "training") or _has_tokens(axes[1])):
        raise Barrier("batch norm's statistics run over tokens")
    if argument(node, "training"):
        tracer.mix(axes[0], *axes[2:])
    return axes


def reduction(kind: str) -> Rule:
    """A reduction over dims. Over tokens "mean" and "sum" are weighted by size, a maximum is not."""

    def rule(tracer: AxisTracer, node: Node) -> Axes:
        axes = tracer.of(node.args[0])
        dims = _dims(node, len(axes))
        tracer.mix(*(axes[d] for d in dims))
        if any(_has_tokens(axes[d]) for d in dims):
            if kind == "other":
                raise Barrier("a statistic over tokens")
            if any(_has_tokens(axes[d]) and len(axes[d]) > 1 for d in dims):
                raise Barrier("a reduction over tokens that are merged with another axis")
            if kind != "max" and len(token_atoms(axes)) != 1:
                raise Barrier("a sum over tokens, for each of other tokens")
            tracer.drop()
            if kind != "max":
                tracer.pools[node] = kind
        keep = argument(node, "keepdim", False)
        return tuple(() if d in dims else dim for d, dim in enumerate(axes) if keep or d not in dims)

    return rule


def select(tracer: AxisTracer, node: Node) -> Axes:
    """One position of a dim. Of the token axis only protected tokens can be taken."""
    axes = tracer.of(node.args[0])
    d, index = _dims(node, len(axes))[0], argument(node, "index")
    if _has_tokens(axes[d]):
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
    d = _dims(node, len(axes))[0]
    size = dim_size(axes[d])
    first, last = argument(node, "start"), argument(node, "end")
    if not all(end is None or isinstance(end, int) for end in (first, last)):
        if _has_tokens(axes[d]):
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
    d = _dims(node, len(base))[0]
    start, stop, step = slice(argument(node, "start"), argument(node, "end"), argument(node, "step", 1)).indices(
        dim_size(base[d])
    )
    written = tracer.space.cut(base[d], start, max(start, stop), step)
    if (_has_tokens(written) or _has_tokens(part[d])) and written != part[d]:
        raise Barrier("tokens are written over others")
    both = [(value, value in tracer.depends) for value in node.args[:2]]
    return tuple(
        dim if i == d else tracer.merge(((dim, both[0][1]), (part[i], both[1][1]))) for i, dim in enumerate(base)
    )


def _cut(tracer: AxisTracer, dim: Dim, start: int, stop: int, step: int = 1) -> Dim:
    part = tracer.space.cut(dim, start, stop, step)
    if _has_tokens(dim) and not _has_tokens(part):
        tracer.drop()
    return part


def split(tracer: AxisTracer, node: Node) -> tuple[Axes, ...]:
    """split, chunk, split_with_sizes, tensor_split: consecutive cuts of one dim."""
    axes = tracer.of(node.args[0])
    d = _dims(node, len(axes))[0]
    parts, start = [], 0
    for piece in node.meta["val"]:
        stop = start + hint(piece.shape[d])
        parts.append((*axes[:d], _cut(tracer, axes[d], start, stop), *axes[d + 1 :]))
        start = stop
    return tuple(parts)


def unbind(tracer: AxisTracer, node: Node) -> tuple[Axes, ...]:
    """One output for each position of a dim."""
    axes = tracer.of(node.args[0])
    d = _dims(node, len(axes))[0]
    if _has_tokens(axes[d]):
        raise Barrier("the token axis is taken apart")
    return tuple(axes[:d] + axes[d + 1 :] for _ in node.meta["val"])


def getitem(tracer: AxisTracer, node: Node) -> Axes:
    """One output of an op with several. The others may be the ones that have the tokens."""
    tracer.drop()
    return tracer.axes[node.args[0]][node.args[1]]  # type: ignore[index]


def cat(tracer: AxisTracer, node: Node) -> Axes:
    """Concatenation: runs join along the dim, the other dims broadcast."""
    parts: Any = [part for part in node.args[0] if len(part.meta["val"].shape) > 1 or part.meta["val"].numel() != 0]  # type: ignore[union-attr]
    rank = len(_shape(node))
    d = _dims(node, rank)[0]
    columns = [(tracer.of(p)[d], hint(p.meta["val"].shape[d]), p in tracer.depends) for p in parts]
    joined = tracer.space.concatenate(columns, f"{node.name}.{d}")
    # The dim itself is left out of the merging: axes that stand behind each other are not one axis.
    return tuple(
        joined if i == d else tracer.merge((tracer.of(p)[i], p in tracer.depends) for p in parts) for i in range(rank)
    )


def as_complex(tracer: AxisTracer, node: Node) -> Axes:
    """view_as_complex: pairs in the last dim become numbers (rotary positions)."""
    axes = tracer.of(node.args[0])
    if _has_tokens(axes[-1]):
        raise Barrier("a pair of tokens becomes a number")
    return axes[:-1]


def as_real(tracer: AxisTracer, node: Node) -> Axes:
    """view_as_real: a new last dim of two."""
    return (*tracer.of(node.args[0]), tracer.space.fresh(f"{node.name}.parts", 2))


def stack(tracer: AxisTracer, node: Node) -> Axes:
    """A new dim in front of the broadcast others."""
    parts: Any = node.args[0]
    rank = len(_shape(node))
    d = _dims(node, rank)[0]
    axes = list(tracer.broadcast(parts, rank - 1))
    axes.insert(d, tracer.space.fresh(f"{node.name}.{d}", len(parts)))
    return tuple(axes)


def embedding(tracer: AxisTracer, node: Node) -> Axes:
    """Rows of a table: the axes of the indices, then a feature axis."""
    return (*tracer.of(node.args[1]), tracer.space.fresh(node.name, _shape(node)[-1], "feature"))


def factory(tracer: AxisTracer, node: Node) -> Axes:
    """new_zeros and the like: a tensor of its own, whatever it was called on."""
    tracer.drop()
    return tracer.space.fresh_axes(node.name, node.meta["val"].shape)


def constant_pad(tracer: AxisTracer, node: Node) -> Axes:
    """Padding makes the padded dims new axes; tokens must not be padded."""
    axes, widths = list(tracer.of(node.args[0])), argument(node, "pad")
    for place in range(len(axes)):
        i = len(axes) - 1 - place  # the widths come in pairs, from the last dim on
        if all(isinstance(width, int) and width == 0 for width in widths[2 * place : 2 * place + 2]):
            continue
        if _has_tokens(axes[i]):
            raise Barrier("the token axis is padded")
        tracer.mix(axes[i])
        axes[i] = tracer.space.fresh(f"{node.name}.{i}", node.meta["val"].shape[i])
    return tuple(axes)


def no_output(tracer: AxisTracer, node: Node) -> tuple[()]:
    """Checks of dtype and device: nothing comes out."""
    tracer.drop()
    return ()


#: op name -> rule. Any overload; elementwise ops come from PyTorch's own tag and are not listed.
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        [
            "dropout",
            "alpha_dropout",
            "feature_dropout",
            "to",
            "contiguous",
            "clone",
            "alias",
            "detach",
            "detach_",
            "_to_copy",
            "lift_fresh",
            "lift_fresh_copy",
            "zeros_like",
            "ones_like",
            "empty_like",
            "full_like",
            "rand_like",
            "randn_like",
            "bernoulli",
            "resolve_conj",
            "resolve_neg",
            "log_sigmoid",
            "hardswish",
        ],
        like_first,
    ),
    "type_as": like_first_alone,
    "prelu": prelu,
    **dict.fromkeys(["where", "divide", "multiply", "copy", "float_power"], pointwise),
    **dict.fromkeys(
        ["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape_as", "view_as"],
        view,
    ),
    **dict.fromkeys(["permute"], permute),
    **dict.fromkeys(["transpose", "t"], transpose),
    **dict.fromkeys(["movedim", "moveaxis"], movedim),
    **dict.fromkeys(["expand", "expand_as", "repeat"], expand),
    **dict.fromkeys(["softmax", "_softmax", "log_softmax", "_log_softmax"], softmax),
    **dict.fromkeys(["layer_norm", "rms_norm"], norm),
    "batch_norm": batch_norm,
    "mean": reduction("mean"),
    "sum": reduction("sum"),
    **dict.fromkeys(["amax", "amin"], reduction("max")),
    **dict.fromkeys(
        ["var", "std", "linalg_vector_norm", "norm", "prod", "any", "all", "logsumexp"], reduction("other")
    ),
    "select": select,
    "slice": slice_,
    "slice_scatter": slice_scatter,
    "view_as_complex": as_complex,
    "view_as_real": as_real,
    **dict.fromkeys(["split", "chunk", "split_with_sizes", "tensor_split"], split),
    "unbind": unbind,
    **dict.fromkeys(["cat", "concat", "concatenate"], cat),
    "stack": stack,
    "embedding": embedding,
    **dict.fromkeys(["new_zeros", "new_ones", "new_empty", "new_full"], factory),
    "constant_pad_nd": constant_pad,
    "pad": constant_pad,
    "_assert_tensor_metadata": no_output,
    **LINEAR_RULES,
    **IMAGE_RULES,
}


def find_rule(target: Any) -> Rule | None:
    """The rule of an op: its entry, else elementwise by PyTorch's tag, else none."""
    if target is operator.getitem:
        return getitem
    schema = getattr(target, "_schema", None)
    if schema is None:
        return None
    name = schema.name.split("::")[-1]
    if schema.name.startswith("aten::") and name in RULES:
        return RULES[name]
    return pointwise if torch.Tag.pointwise in target.tags else None
