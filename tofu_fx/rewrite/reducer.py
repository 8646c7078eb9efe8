"""How reductions are written into a graph: by `tofu::fuse_tokens`. Calibration and proofs have ways of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Atom
from tofu_fx.axes.tracer import BarrierRecord
from tofu_fx.rewrite.context import RewriteContext
from tofu_fx.rewrite.layout import Count, Emitter
from tofu_fx.sites.site import Planned


class Reducer:
    """Writes the operator of each site. Of the rest of the rewriting a subclass may ask two things."""

    #: write also at sites where no token goes
    everywhere: ClassVar[bool] = False
    #: the graph must serve any plan: token counts are inputs on any device, every site stays and has a match of its
    #: own, and what nothing reads is kept
    any_plan: ClassVar[bool] = False

    def begin(self) -> None:
        """Forget what was written: the graph is written anew."""

    def fuse(
        self,
        emit: Emitter,
        site: Planned,
        run: Atom,
        x: Node,
        match: Node,
        size: Node,
        gone: Count,
        seed: int,
        other: Callable[[str], Node],
    ) -> Node:
        """Append the operator that takes ``gone`` of the tokens of ``x`` ``[B, N, C]`` away.

        Args:
            emit: the graph that is written.
            site: what was decided.
            run: the stream's tokens, of which some are protected.
            x: the tokens.
            match: what they are compared by, ``[B, N, M]``.
            size: how many original tokens each stands for, ``[B, N]``.
            gone: how many go.
            seed: another number for each reduction of the graph.
            other: appends what tokens could be compared by instead, from its name; raises Barrier where it cannot.
        """
        grid = [list(site.cells)] if site.cells else []
        target, ends = torch.ops.tofu.fuse_tokens.default, (run.lead, run.tail)
        new: Node = emit.call(target, x, match, size, gone, site.strategy, *ends, *grid)
        return new

    def strategy(self, site: Planned) -> str:
        """How features of the same tokens from before the site become fewer."""
        return site.strategy

    def finish(self, context: RewriteContext, barriers: Sequence[BarrierRecord]) -> None:
        """Append what is wanted besides, ahead of the outputs."""
