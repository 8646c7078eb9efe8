"""Rules of ops that work on each element alone, and of those that give a tensor of the same shape or of their own."""

from __future__ import annotations

from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier, has_tokens
from tofu_fx.axes.known import Known
from tofu_fx.axes.rules.arguments import shape_of
from tofu_fx.axes.rules.result import Dropped, Rule
from tofu_fx.fx.nodes import tensor_inputs
from tofu_fx.fx.op_families import COPIES, LIKE, NEW


def pointwise(known: Known, node: Node) -> Axes:
    """Elementwise: the axes of the broadcast operands."""
    operands = [v for arg in node.args for v in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return known.broadcast([*operands, *node.kwargs.values()], len(shape_of(node)))


def prelu(known: Known, node: Node) -> Axes:
    """Elementwise; several weights belong to dim 1, which must not hold tokens."""
    axes, weights = known.of(node.args[0]), node.args[1].meta["val"].numel()  # type: ignore[union-attr]
    if weights != 1 and len(axes) > 1 and has_tokens(axes[1]):
        raise Barrier("each token has a slope of its own")
    return axes


def like_first(known: Known, node: Node) -> Axes:
    """Same shape and axes as the first operand (dropout, to, contiguous, zeros_like, ...)."""
    return known.of(tensor_inputs(node)[0])


def like_first_alone(known: Known, node: Node) -> Dropped:
    """As ``like_first``; the second operand, which may have tokens of its own, gives its dtype only."""
    return Dropped(known.of(node.args[0]))


def factory(known: Known, node: Node) -> Dropped:
    """new_zeros and the like: a tensor of its own, whatever it was called on."""
    return Dropped(known.space.fresh_axes(node.name, node.meta["val"].shape))


def no_output(known: Known, node: Node) -> Dropped:  # noqa: ARG001 - a rule is asked with both
    """Checks of dtype and device: nothing comes out."""
    return Dropped(())


#: those that PyTorch tags as pointwise are not listed
POINTWISE_RULES: dict[str, Rule] = {
    **dict.fromkeys([*COPIES - {"type_as"}, *LIKE], like_first),
    **dict.fromkeys(["alpha_dropout", "feature_dropout", "detach_", "lift_fresh", "lift_fresh_copy"], like_first),
    **dict.fromkeys(["rand_like", "randn_like", "bernoulli", "resolve_conj", "resolve_neg"], like_first),
    **dict.fromkeys(["log_sigmoid", "hardswish"], like_first),
    "type_as": like_first_alone,
    "prelu": prelu,
    **dict.fromkeys(["where", "divide", "multiply", "copy", "float_power"], pointwise),
    **dict.fromkeys(NEW, factory),
    "_assert_tensor_metadata": no_output,
}
