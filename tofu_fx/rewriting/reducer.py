"""How reductions are written into a graph: by `tofu::fuse_tokens`. Calibration and proofs have ways of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Atom
from tofu_fx.axes.tracer import BarrierRecord
from tofu_fx.rewriting.context import RewriteContext
from tofu_fx.rewriting.layout import Count, Emitter
from tofu_fx.sites.site import Planned


@dataclass(frozen=True)
class Step:
    """What is to be written at one site.

    ``gone`` of the tokens of ``x`` ``[B, N, C]`` go, compared by ``match`` ``[B, N, M]``; ``run`` are the stream's
    tokens, of which some are protected, ``size`` ``[B, N]`` is how many original tokens each stands for, and ``seed``
    is another number for each step of the graph; ``grouping`` is that of ``tofu::fuse_tokens``. ``other`` appends what
    tokens could be compared by instead, from its name; it raises Barrier where it cannot.
    """

    site: Planned
    run: Atom
    x: Node
    match: Node
    size: Node
    gone: Count
    seed: int
    other: Callable[[str], Node]
    grouping: str = "bipartite"


class Reducer:
    """Writes the operator of each site. Of the rest of the rewriting a subclass may ask two things."""

    #: write also at sites where no token goes
    everywhere: ClassVar[bool] = False
    #: the graph must serve any plan: token counts are inputs on any device, every site stays and has a match of its
    #: own, and what nothing reads is kept
    any_plan: ClassVar[bool] = False

    def begin(self) -> None:
        """Forget what was written: the graph is written anew."""

    def fuse(self, emit: Emitter, step: Step) -> Node:
        """Append the operator of a step."""
        cells, ends = list(step.site.cells) or None, (step.run.prefix, step.run.suffix)
        target, strategy = torch.ops.tofu.fuse_tokens.default, step.site.strategy
        more: list[Any] = [cells, step.grouping] if step.grouping != "bipartite" else [cells] if cells else []
        new: Node = emit.call(target, step.x, step.match, step.size, step.gone, strategy, *ends, *more)
        return new

    def strategy(self, site: Planned) -> str:
        """How features of the same tokens from before the site become fewer."""
        return site.strategy

    def finish(self, context: RewriteContext, barriers: Sequence[BarrierRecord]) -> None:
        """Append what is wanted besides, ahead of the outputs."""
