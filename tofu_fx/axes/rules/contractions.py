"""Rules of the contracting ops: linear, matmul and its kin, einsum, convolution, attention, embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier, Dim, atoms_of, dim_size, has_tokens
from tofu_fx.axes.known import Known
from tofu_fx.axes.rules.arguments import shape_of
from tofu_fx.axes.rules.result import Carried, Dropped, Rule, carried
from tofu_fx.fx.nodes import argument, walk_back
from tofu_fx.fx.op_families import ADDED_PRODUCTS, CONVOLUTIONS, MATRIX_PRODUCTS, TURNS


def _sums_tokens(known: Known, node: Node, left: Dim, right: Dim) -> bool:
    """Whether tokens are summed over. They may be only where attention does it: both sides the same tokens.

    Raises:
        Barrier: they are, anywhere else.
    """
    tokens = [has_tokens(left), has_tokens(right)]
    if not any(tokens):
        return False
    if not all(tokens):
        raise Barrier("the token axis is contracted with a fixed matrix")
    if node not in known.attention_nodes:
        raise Barrier("tokens are summed over outside of a recognised attention")
    if left != right:
        raise Barrier("attention over the tokens of another stream or of shifted positions")
    return True


def _features(known: Known, value: Node) -> Axes:
    """The axes of an operand of a product; those of a weight, as stored or turned, are features on both sides."""
    axes = known.of(value)
    *_, source = walk_back(value, TURNS | {"t", "to", "detach"})
    if source not in known.model_state and source.op != "get_attr":
        return axes
    return tuple(known.space.as_features(dim) for dim in axes)


def linear(known: Known, node: Node) -> Carried:
    """``x @ W.T``: the last dim becomes a feature axis."""
    axes = known.of(node.args[0])
    drops = _sums_tokens(known, node, axes[-1], ())
    out = known.space.fresh(node.name, shape_of(node)[-1], "feature")
    return carried((*axes[:-1], out), mixed=axes[-1], drops=drops)


def matmul(known: Known, node: Node) -> Carried:
    """matmul, mm, bmm: batch dims broadcast, the inner dims are contracted."""
    return _product(known, node, node.args[0], node.args[1])


def addmm(known: Known, node: Node) -> Carried:
    """addmm, baddbmm: a product plus a broadcast operand."""
    product = _product(known, node, node.args[1], node.args[2])
    axes: Any = product.axes
    added = known.of(node.args[0])
    added = ((),) * (len(axes) - len(added)) + added
    merged = tuple(known.merge([(p, True), (a, False)]) for p, a in zip(axes, added, strict=True))
    return replace(product, axes=merged)


def _product(known: Known, node: Node, left: Any, right: Any) -> Carried:
    a, b = (_features(known, value) for value in (left, right))
    if len(a) == 1 or len(b) == 1:
        inner = b[-2] if len(b) > 1 else b[0]
        drops = _sums_tokens(known, node, a[-1], inner)
        return carried(a[:-1] + (b[:-2] + b[-1:] if len(b) > 1 else ()), mixed=a[-1] + inner, drops=drops)
    drops = _sums_tokens(known, node, a[-1], b[-2])
    rank = max(len(a), len(b)) - 2
    batch = []
    for i in range(-rank, 0):
        pair = [(axes[i - 2], v in known.depends) for axes, v in ((a, left), (b, right)) if len(axes) - 2 >= -i]
        batch.append(known.merge(pair))
    return carried((*batch, a[-2], b[-1]), mixed=a[-1] + b[-2], drops=drops)


def einsum(known: Known, node: Node) -> Carried:
    """Any einsum with an explicit output and no ellipsis; equal labels merge, missing labels are contracted."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    if "..." in equation or "->" not in equation:
        raise Barrier("an einsum with an ellipsis or an implicit output")
    inputs, output = equation.replace(" ", "").split("->")
    labels: dict[str, list[tuple[Dim, bool]]] = {}
    for term, operand in zip(inputs.split(","), operands, strict=True):  # type: ignore[arg-type]
        if len(set(term)) != len(term):
            raise Barrier("an einsum that takes a diagonal")
        for label, dim in zip(term, _features(known, operand), strict=True):
            labels.setdefault(label, []).append((dim, operand in known.depends))
    mixed: Dim = ()
    drops = False
    for label, dims in labels.items():
        if label not in output:
            left, right = dims[0][0], dims[1][0] if len(dims) == 2 else ()
            drops |= _sums_tokens(known, node, left, right)
            mixed += left + right
    return carried(tuple(known.merge(labels[label]) for label in output), mixed, drops=drops)


def attention(known: Known, node: Node) -> Dropped:
    """scaled_dot_product_attention: q ``[..., L, E]``, k ``[..., S, E]``, v ``[..., S, D]`` -> ``[..., L, D]``."""
    q, k, v = (known.of(argument(node, name)) for name in ("query", "key", "value"))
    if has_tokens(q[-1], k[-1], v[-1]):
        raise Barrier("attention between channels: the token axis is contracted")
    if node not in known.attention_nodes and has_tokens(q[-2], k[-2]):
        raise Barrier("causal attention")
    if k[-2] != v[-2] and has_tokens(k[-2], v[-2]):
        raise Barrier("keys and values are different tokens")
    # Query and key decide together what the batch is: latent queries are expanded to it, keys come with it. Fewer key
    # heads than query heads (grouped-query attention) are not broadcast dims.
    depends = [argument(node, name) in known.depends for name in ("query", "key")]
    pairs = zip(q[:-2], k[:-2], strict=True) if len(q) == len(k) else ((dim, ()) for dim in q[:-2])
    batch = [known.merge([(a, depends[0]), (b, depends[1])]) if dim_size(a) == dim_size(b) else a for a, b in pairs]
    return Dropped((*batch, q[-2], v[-1]), mixed=q[-1] + k[-2] + k[-1] + v[-2])


def convolution(known: Known, node: Node) -> Carried:
    """Only the batch dim passes a convolution; channels are features, places are new axes."""
    axes, shape = known.of(node.args[0]), shape_of(node)
    if has_tokens(*axes[1:]):
        raise Barrier("a convolution over tokens")
    fresh = [known.space.fresh(f"{node.name}.{i}", size) for i, size in enumerate(shape[2:], start=2)]
    channels = known.space.fresh(f"{node.name}.1", shape[1], "feature")
    return Carried((axes[0], channels, *fresh), mixed=atoms_of(*axes[1:]))


def embedding(known: Known, node: Node) -> Axes:
    """Rows of a table: the axes of the indices, then a feature axis."""
    return (*known.of(node.args[1]), known.space.fresh(node.name, shape_of(node)[-1], "feature"))


CONTRACTION_RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys([*MATRIX_PRODUCTS, "mm"], matmul),
    **dict.fromkeys(ADDED_PRODUCTS, addmm),
    "einsum": einsum,
    "embedding": embedding,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(CONVOLUTIONS, convolution),
}
