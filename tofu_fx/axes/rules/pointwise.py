"""Rules of ops that work on each element alone, and of those that give a tensor of the same shape or of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier, has_tokens
from tofu_fx.axes.rules.arguments import shape_of
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.fx.nodes import tensor_inputs


def pointwise(tracer: AxisTracer, node: Node) -> Axes:
    """Elementwise: the axes of the broadcast operands."""
    operands = [v for arg in node.args for v in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return tracer.broadcast([*operands, *node.kwargs.values()], len(shape_of(node)))


def prelu(tracer: AxisTracer, node: Node) -> Axes:
    """Elementwise; several weights belong to dim 1, which must not hold tokens."""
    axes, weights = tracer.of(node.args[0]), node.args[1].meta["val"].numel()  # type: ignore[union-attr]
    if weights != 1 and len(axes) > 1 and has_tokens(axes[1]):
        raise Barrier("each token has a slope of its own")
    return axes


def like_first(tracer: AxisTracer, node: Node) -> Axes:
    """Same shape and axes as the first operand (dropout, to, contiguous, zeros_like, ...)."""
    return tracer.of(tensor_inputs(node)[0])


def like_first_alone(tracer: AxisTracer, node: Node) -> Axes:
    """As ``like_first``; the second operand gives its dtype only."""
    tracer.drop()
    return tracer.of(node.args[0])


def factory(tracer: AxisTracer, node: Node) -> Axes:
    """new_zeros and the like: a tensor of its own, whatever it was called on."""
    tracer.drop()
    return tracer.space.fresh_axes(node.name, node.meta["val"].shape)


def no_output(tracer: AxisTracer, node: Node) -> tuple[()]:
    """Checks of dtype and device: nothing comes out."""
    tracer.drop()
    return ()


#: those that PyTorch tags as pointwise are not listed
POINTWISE_RULES: dict[str, Callable[[AxisTracer, Node], Any]] = {
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
    **dict.fromkeys(["new_zeros", "new_ones", "new_empty", "new_full"], factory),
    "_assert_tensor_metadata": no_output,
}
