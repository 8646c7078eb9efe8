"""Where a branch that runs on fewer tokens ends: where it meets a tensor that has all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Dim, hint, is_axes
from tofu_fx.axes.known import Known
from tofu_fx.fx.nodes import tensor_inputs

BRANCH_END = "the branch joins the residual stream, which keeps every token"


def meets_whole(
    known: Known, node: Node, branches: Mapping[int, frozenset[Node]], entered: Mapping[int, tuple[Dim, int]]
) -> Node | None:
    """The operand that has all the tokens of a branch where another operand has fewer of them; None elsewhere.

    Args:
        known: the axes of the operands.
        node: the op at which they meet.
        branches: number of a stream that is one branch of a block -> the nodes inside of it.
        entered: number of such a stream -> what its tokens were before they were given to it, and how many.
    """
    inputs = tensor_inputs(node)
    for number, inside in branches.items():
        carrying = [v for v in inputs if any(atom.base.stream == number for atom in known.tokens(v))]
        if node in inside or not carrying:
            continue
        places, tokens = entered.get(number, ((), 0))
        # Text and image that were joined for the branch are apart again, and meet what they were before that.
        apart = any(atom.size != tokens for atom in known.tokens(carrying[0]))
        for value in inputs:
            whole = value in known.depends and not known.tokens(value) and is_axes(known.axes.get(value, ()))
            same = whole and bool(places) and any(_is_part(places, dim) for dim in known.of(value))
            if whole and (apart or same) and _places(value) == _places(carrying[0]):
                return value
    return None


def _is_part(atoms: Dim, dim: Dim) -> bool:
    """Whether atoms stand in a dim, side by side."""
    return any(dim[i : i + len(atoms)] == atoms for i in range(len(dim) - len(atoms) + 1))


def _places(node: Node) -> list[int]:
    """The shape of a tensor or of the first of several, without its features."""
    value = node.meta["val"]
    first = value if isinstance(value, torch.Tensor) else value[0]
    return [hint(size) for size in first.shape[:-1]]
