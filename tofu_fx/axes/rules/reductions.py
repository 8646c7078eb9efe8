"""Rules of ops that make one number of many: reductions, and what is normalised by statistics."""

from __future__ import annotations

from typing import Literal

from torch.fx import Node

from tofu_fx.axes.atoms import Barrier, atoms_of, has_tokens, token_atoms
from tofu_fx.axes.known import Known
from tofu_fx.axes.rules.arguments import dims_of
from tofu_fx.axes.rules.result import Carried, Dropped, Pooled, Rule
from tofu_fx.fx.nodes import argument
from tofu_fx.fx.op_families import SOFTMAX, TOKEN_NORMS


def softmax(known: Known, node: Node) -> Carried:
    """Normalising over tokens is attention; anywhere else it needs all of them."""
    axes = known.of(node.args[0])
    along = [axes[d] for d in dims_of(node, len(axes))]
    if has_tokens(*along) and node not in known.attention_nodes:
        raise Barrier("softmax over tokens outside of a recognised attention")
    return Carried(axes, mixed=atoms_of(*along))


def norm(known: Known, node: Node) -> Carried:
    """layer_norm and rms_norm: over the trailing dims, which must not hold tokens."""
    axes = known.of(node.args[0])
    along = axes[len(axes) - len(argument(node, "normalized_shape")) :]
    if has_tokens(*along):
        raise Barrier("the norm's statistics run over tokens")
    return Carried(axes, mixed=atoms_of(*along))


def batch_norm(known: Known, node: Node) -> Carried:
    """Per-channel scale in eval mode; in training its statistics run over all tokens."""
    axes = known.of(node.args[0])
    if token_atoms(axes) and (argument(node, "training") or has_tokens(axes[1])):
        raise Barrier("batch norm's statistics run over tokens")
    return Carried(axes, mixed=atoms_of(axes[0], *axes[2:]) if argument(node, "training") else ())


def reduction(kind: Literal["mean", "sum", "max", "other"]) -> Rule:
    """A reduction over dims. Over tokens "mean" and "sum" are weighted by size, a maximum is not."""

    def rule(known: Known, node: Node) -> Carried:
        axes = known.of(node.args[0])
        dims = dims_of(node, len(axes))
        keep = argument(node, "keepdim", False)
        left = tuple(() if d in dims else dim for d, dim in enumerate(axes) if keep or d not in dims)
        along = [axes[d] for d in dims]
        if not has_tokens(*along):
            return Carried(left, mixed=atoms_of(*along))
        if kind == "other":
            raise Barrier("a statistic over tokens")
        if any(has_tokens(dim) and len(dim) > 1 for dim in along):
            raise Barrier("a reduction over tokens that are merged with another axis")
        if kind == "max":
            return Dropped(left, mixed=atoms_of(*along))
        if len(token_atoms(axes)) != 1:
            raise Barrier("a sum over tokens, for each of other tokens")
        return Pooled(left, mixed=atoms_of(*along), kind=kind)

    return rule


REDUCTION_RULES: dict[str, Rule] = {
    **dict.fromkeys([*SOFTMAX, "log_softmax", "_log_softmax"], softmax),
    **dict.fromkeys(TOKEN_NORMS, norm),
    "batch_norm": batch_norm,
    "mean": reduction("mean"),
    "sum": reduction("sum"),
    **dict.fromkeys(["amax", "amin"], reduction("max")),
    **dict.fromkeys(
        ["var", "std", "linalg_vector_norm", "norm", "prod", "any", "all", "logsumexp"], reduction("other")
    ),
}
