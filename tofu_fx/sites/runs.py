"""Where the tokens of a site stand in the tensors of a block: alone, or as a part of a longer run (text and image)."""

from __future__ import annotations

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Atom, Axes
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.sites.residual import protected, token_places


def is_enterable(node: Node, tokens: Atom, plain: AxisTracer) -> bool:
    """Whether a branch may be entered here: a floating-point tensor that has the tokens once."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    own = run_of(node, tokens, plain, missing_ok=True)
    return own is not None and len(token_places(plain, node, own)) == 1


def carries(node: Node, tokens: Atom, plain: AxisTracer) -> bool:
    """Whether a tensor has the tokens in one of its dims, alone or joined with others."""
    return node in plain.depends and run_of(node, tokens, plain, missing_ok=True) is not None


def run_of(node: Node, tokens: Atom, plain: AxisTracer, missing_ok: bool = False) -> Atom:
    """The atom of a tensor that the tokens are, or are a part of (text and image as one)."""
    for part in plain.parts(node):
        for dim in part:
            whole = plain.space.flat(dim)
            for atom in (whole, *dim):
                if atom is not None and (atom == tokens or (tokens, tokens.size) in plain.space.pieces(atom)):
                    return atom
        if _is_map(part, tokens, plain):
            return tokens
    if missing_ok:
        return None  # type: ignore[return-value]
    raise AssertionError(f"{node.name} has no such tokens")


def _is_map(axes: Axes, tokens: Atom, plain: AxisTracer) -> bool:
    """Whether a tensor has the tokens as a map: height and width in dims of their own, side by side."""
    factors = plain.space.flattened(tokens)
    single = [dim[0] if len(dim) == 1 else None for dim in axes]
    return len(factors) > 1 and any(
        tuple(single[i : i + len(factors)]) == factors for i in range(len(axes) - len(factors) + 1)
    )


def outside(run: Atom, tokens: Atom, plain: AxisTracer) -> tuple[int, int]:
    """The protected tokens of a run before and after those that may be reduced."""
    if run == tokens:
        return protected(tokens, plain)
    ahead, pieces = 0, plain.space.pieces(run)
    for atom, size in pieces:
        if atom == tokens:
            return ahead, run.size - ahead - size
        ahead += size
    raise AssertionError("the tokens are no part of the run")
