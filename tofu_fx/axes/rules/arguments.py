"""What rules read of a node beside the axes of its inputs."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from tofu_fx.axes.atoms import hint
from tofu_fx.fx.nodes import argument


def shape_of(node: Node) -> list[int]:
    """The shape of what an op gives, symbols as the numbers that they were traced with."""
    return [hint(size) for size in node.meta["val"].shape]


def dims_of(node: Node, rank: int, name: str = "dim") -> list[int]:
    """The ``dim`` argument as non-negative ints; all dims where it is absent or empty."""
    dims: Any = argument(node, name)
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
