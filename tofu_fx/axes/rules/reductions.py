"""Rules of ops that make one number of many: reductions, and what is normalised by statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier, has_tokens, token_atoms
from tofu_fx.axes.rules.arguments import dims_of
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.fx.nodes import argument


def softmax(tracer: AxisTracer, node: Node) -> Axes:
    """Normalising over tokens is attention; anywhere else it needs all of them."""
    axes = tracer.of(node.args[0])
    for d in dims_of(node, len(axes)):
        if has_tokens(axes[d]) and node not in tracer.attention_nodes:
            raise Barrier("softmax over tokens outside of a recognised attention")
        tracer.mix(axes[d])
    return axes


def norm(tracer: AxisTracer, node: Node) -> Axes:
    """layer_norm and rms_norm: over the trailing dims, which must not hold tokens."""
    axes = tracer.of(node.args[0])
    rank = len(argument(node, "normalized_shape"))
    if any(has_tokens(dim) for dim in axes[len(axes) - rank :]):
        raise Barrier("the norm's statistics run over tokens")
    tracer.mix(*axes[len(axes) - rank :])
    return axes


def batch_norm(tracer: AxisTracer, node: Node) -> Axes:
    """Per-channel scale in eval mode; in training its statistics run over all tokens."""
    axes = tracer.of(node.args[0])
    if token_atoms(axes) and (argument(node, "training") or has_tokens(axes[1])):
        raise Barrier("batch norm's statistics run over tokens")
    if argument(node, "training"):
        tracer.mix(axes[0], *axes[2:])
    return axes


def reduction(kind: str) -> Callable[[AxisTracer, Node], Axes]:
    """A reduction over dims. Over tokens "mean" and "sum" are weighted by size, a maximum is not."""

    def rule(tracer: AxisTracer, node: Node) -> Axes:
        axes = tracer.of(node.args[0])
        dims = dims_of(node, len(axes))
        tracer.mix(*(axes[d] for d in dims))
        if any(has_tokens(axes[d]) for d in dims):
            if kind == "other":
                raise Barrier("a statistic over tokens")
            if any(has_tokens(axes[d]) and len(axes[d]) > 1 for d in dims):
                raise Barrier("a reduction over tokens that are merged with another axis")
            if kind != "max" and len(token_atoms(axes)) != 1:
                raise Barrier("a sum over tokens, for each of other tokens")
            tracer.drop()
            if kind != "max":
                tracer.pools[node] = kind
        keep = argument(node, "keepdim", False)
        return tuple(() if d in dims else dim for d, dim in enumerate(axes) if keep or d not in dims)

    return rule


REDUCTION_RULES: dict[str, Callable[[AxisTracer, Node], Any]] = {
    **dict.fromkeys(["softmax", "_softmax", "log_softmax", "_log_softmax"], softmax),
    **dict.fromkeys(["layer_norm", "rms_norm"], norm),
    "batch_norm": batch_norm,
    "mean": reduction("mean"),
    "sum": reduction("sum"),
    **dict.fromkeys(["amax", "amin"], reduction("max")),
    **dict.fromkeys(
        ["var", "std", "linalg_vector_norm", "norm", "prod", "any", "all", "logsumexp"], reduction("other")
    ),
}
