"""Rules of the contracting ops: linear, matmul and its kin, einsum, convolution, attention, embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier, Dim, dim_size, hint
from tofu_fx.axes.rules.arguments import shape_of
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.fx.nodes import argument, walk_back


def _contract(tracer: AxisTracer, node: Node, left: Dim, right: Dim) -> None:
    """Tokens may be summed over only where attention does it: both sides the same tokens."""
    tracer.mix(left, right)
    tokens = [any(atom.is_token for atom in dim) for dim in (left, right)]
    if not any(tokens):
        return
    if not all(tokens):
        raise Barrier("the token axis is contracted with a fixed matrix")
    if node not in tracer.attention_nodes:
        raise Barrier("tokens are summed over outside of a recognised attention")
    if left != right:
        raise Barrier("attention over the tokens of another stream or of shifted positions")
    tracer.drop()


def _features(tracer: AxisTracer, value: Node) -> Axes:
    """The axes of an operand of a product; those of a weight, as stored or turned, are features on both sides."""
    axes = tracer.of(value)
    *_, source = walk_back(value, ("t", "transpose", "permute", "to", "detach"))
    if source not in tracer.model_state and source.op != "get_attr":
        return axes
    return tuple(tracer.space.as_features(dim) for dim in axes)


def linear(tracer: AxisTracer, node: Node) -> Axes:
    """``x @ W.T``: the last dim becomes a feature axis."""
    axes = tracer.of(node.args[0])
    _contract(tracer, node, axes[-1], ())
    out = hint(node.meta["val"].shape[-1])
    return (*axes[:-1], tracer.space.fresh(node.name, out, "feature"))


def matmul(tracer: AxisTracer, node: Node) -> Axes:
    """matmul, mm, bmm: batch dims broadcast, the inner dims are contracted."""
    return _product(tracer, node, node.args[0], node.args[1])


def addmm(tracer: AxisTracer, node: Node) -> Axes:
    """addmm, baddbmm: a product plus a broadcast operand."""
    product = _product(tracer, node, node.args[1], node.args[2])
    added = tracer.of(node.args[0])
    added = ((),) * (len(product) - len(added)) + added
    return tuple(tracer.merge([(p, True), (a, False)]) for p, a in zip(product, added, strict=True))


def _product(tracer: AxisTracer, node: Node, left: Any, right: Any) -> Axes:
    a, b = (_features(tracer, value) for value in (left, right))
    if len(a) == 1 or len(b) == 1:
        inner_b = b[-2] if len(b) > 1 else b[0]
        _contract(tracer, node, a[-1], inner_b)
        return a[:-1] + (b[:-2] + b[-1:] if len(b) > 1 else ())
    _contract(tracer, node, a[-1], b[-2])
    rank = max(len(a), len(b)) - 2
    batch = []
    for i in range(-rank, 0):
        pair = [(axes[i - 2], v in tracer.depends) for axes, v in ((a, left), (b, right)) if len(axes) - 2 >= -i]
        batch.append(tracer.merge(pair))
    return (*batch, a[-2], b[-1])


def einsum(tracer: AxisTracer, node: Node) -> Axes:
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
        for label, dim in zip(term, _features(tracer, operand), strict=True):
            labels.setdefault(label, []).append((dim, operand in tracer.depends))
    for label, dims in labels.items():
        if label not in output:
            _contract(tracer, node, dims[0][0], dims[1][0] if len(dims) == 2 else ())
    return tuple(tracer.merge(labels[label]) for label in output)


def attention(tracer: AxisTracer, node: Node) -> Axes:
    """scaled_dot_product_attention: q ``[..., L, E]``, k ``[..., S, E]``, v ``[..., S, D]`` -> ``[..., L, D]``."""
    q, k, v = (tracer.of(argument(node, name)) for name in ("query", "key", "value"))
    if any(atom.is_token for dim in (q[-1], k[-1], v[-1]) for atom in dim):
        raise Barrier("attention between channels: the token axis is contracted")
    if node not in tracer.attention_nodes and any(atom.is_token for atom in q[-2] + k[-2]):
        raise Barrier("causal attention")
    if k[-2] != v[-2] and any(atom.is_token for atom in k[-2] + v[-2]):
        raise Barrier("keys and values are different tokens")
    tracer.drop()
    tracer.mix(q[-1], k[-2], k[-1], v[-2])
    # Query and key decide together what the batch is: latent queries are expanded to it, keys come with it. Fewer key
    # heads than query heads (grouped-query attention) are not broadcast dims.
    depends = [argument(node, name) in tracer.depends for name in ("query", "key")]
    pairs = zip(q[:-2], k[:-2], strict=True) if len(q) == len(k) else ((dim, ()) for dim in q[:-2])
    batch = [tracer.merge([(a, depends[0]), (b, depends[1])]) if dim_size(a) == dim_size(b) else a for a, b in pairs]
    return (*batch, q[-2], v[-1])


def convolution(tracer: AxisTracer, node: Node) -> Axes:
    """Only the batch dim passes a convolution; channels are features, places are new axes."""
    axes, shape = tracer.of(node.args[0]), [hint(size) for size in node.meta["val"].shape]
    if any(atom.is_token for dim in axes[1:] for atom in dim):
        raise Barrier("a convolution over tokens")
    tracer.mix(*axes[1:])
    fresh = [tracer.space.fresh(f"{node.name}.{i}", size) for i, size in enumerate(shape[2:], start=2)]
    return (axes[0], tracer.space.fresh(f"{node.name}.1", shape[1], "feature"), *fresh)


def embedding(tracer: AxisTracer, node: Node) -> Axes:
    """Rows of a table: the axes of the indices, then a feature axis."""
    return (*tracer.of(node.args[1]), tracer.space.fresh(node.name, shape_of(node)[-1], "feature"))


CONTRACTION_RULES: dict[str, Callable[[AxisTracer, Node], Any]] = {
    "linear": linear,
    **dict.fromkeys(["matmul", "mm", "bmm"], matmul),
    **dict.fromkeys(["addmm", "baddbmm"], addmm),
    "einsum": einsum,
    "embedding": embedding,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "convolution"], convolution),
}
