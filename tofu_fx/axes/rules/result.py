"""What a rule returns: the axes of the outputs, and what the op did on the way to them.

    Axes       carried: each position is computed from the same position of the operands
    Carried    as Axes, with the atoms along which a position is computed from several
    Dropped    as Carried, and tokens of the operands may be missing in the outputs
    Pooled     as Dropped: they are missing because they were added up, where each must count by its size
    Barrier    is raised: the tokens cannot pass

An op with several outputs has a tuple of Axes. A rule is a function of the node and of what is known of its operands.
It changes nothing: only the tracer acts on what it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Dim
from tofu_fx.axes.known import Known

Outputs = Axes | tuple[Axes, ...]


@dataclass(frozen=True)
class Carried:
    """The axes of what comes out, for an op with several outputs a tuple of them.

    ``mixed`` are the atoms of the operands along which the op computes a position from several; None where nobody knows
    what it does.
    """

    axes: Outputs
    mixed: Dim | None = ()


@dataclass(frozen=True)
class Dropped(Carried):
    """The op may lose the token axis: protected tokens are taken, keys are attended to, the largest is found."""


@dataclass(frozen=True)
class Pooled(Dropped):
    """The tokens are reduced to their mean or sum, in which each counts as often as it stands for others."""

    kind: Literal["mean", "sum"] = field(kw_only=True)


Rule = Callable[[Known, Node], Outputs | Carried]


def carried(axes: Outputs, mixed: Dim = (), *, drops: bool = False) -> Carried:
    """``Dropped`` if the op drops tokens, else ``Carried``."""
    return Dropped(axes, mixed) if drops else Carried(axes, mixed)
