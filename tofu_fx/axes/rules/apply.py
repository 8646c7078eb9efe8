"""Applies a rule to a node, and holds what it says against the shape that was traced."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Barrier, dim_size, hint
from tofu_fx.axes.known import Known
from tofu_fx.axes.rules.result import Carried, Outputs, Rule
from tofu_fx.axes.space import Space


def apply_rule(rule: Rule | None, known: Known, node: Node) -> Carried:
    """What becomes of the axes in a node; without a rule its outputs have axes of their own.

    Raises:
        Barrier: the rule says that the tokens cannot pass, or it contradicts the shape that was traced.
    """
    if rule is None:
        return Carried(fresh_outputs(known.space, node), mixed=None)
    found = rule(known, node)
    result = found if isinstance(found, Carried) else Carried(found)
    value = node.meta.get("val")
    pairs = [(value, result.axes)] if isinstance(value, torch.Tensor) else zip(value or (), result.axes, strict=True)
    for tensor, axes in pairs:
        if isinstance(tensor, torch.Tensor) and [hint(s) for s in tensor.shape] != [dim_size(d) for d in axes]:  # type: ignore[arg-type]
            raise Barrier(f"its rule gives {axes} for the shape {list(tensor.shape)}")
    return result


def fresh_outputs(space: Space, node: Node) -> Outputs:
    """Axes of their own for all outputs of a node."""
    value: Any = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return space.fresh_axes(node.name, value.shape)
    if not isinstance(value, (tuple, list)):
        return ()
    return tuple(
        space.fresh_axes(f"{node.name}.{i}", part.shape) if isinstance(part, torch.Tensor) else ()
        for i, part in enumerate(value)
    )
