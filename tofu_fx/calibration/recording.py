"""Writing a graph so that any plan can be tried on it: with every way to compare tokens at each site."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

from torch.fx import Node

from tofu_fx.axes.atoms import Barrier
from tofu_fx.axes.tracer import AxisTracer, BarrierRecord
from tofu_fx.plan.sketch import folds
from tofu_fx.plan.words import PlanMatch
from tofu_fx.rewriting.context import RewriteContext
from tofu_fx.rewriting.layout import Emitter
from tofu_fx.rewriting.reducer import Reducer, Step
from tofu_fx.sites.residual import next_branch
from tofu_fx.sites.site import Planned


@dataclass(frozen=True)
class Rehearsed:
    """One site in a graph that is rewritten for calibration.

    ``fuse`` is its operator, ``metrics`` the nodes that it could compare tokens by. ``branch`` is what the block's next
    branch adds to the stream, as ``[B, N, C]``, a function of the operator's first output ``[B, N, C]``; None where
    there is none.
    """

    site: Planned
    fuse: Node
    metrics: dict[str, Node]
    branch: Node | None = None
    #: the name of the constant that stands for the matrix of "fisher"
    projection: str | None = None

    @property
    def merged(self) -> Node:
        """The operator's first output: the reduced stream."""
        return self.part(0)

    def part(self, place: int) -> Node:
        """One of the operator's outputs."""
        return next(user for user in self.fuse.users if user.args[1] == place)


class Recorder(Reducer):
    """Notes each site that it writes, in ``rehearsed``."""

    any_plan: ClassVar[bool] = True

    def __init__(self) -> None:
        self.rehearsed: list[Rehearsed] = []

    def begin(self) -> None:
        """Forget what was written: the graph is written anew."""
        self.rehearsed = []

    def fuse(self, emit: Emitter, step: Step) -> Node:
        """Append the operator, and ahead of it whatever else it could compare tokens by."""
        site, metrics = step.site, {step.site.match: step.match}
        known, projection = set(emit.constants), None
        for kind in get_args(PlanMatch):
            # On a stream, which has few tokens, matching is a small part of the time: nothing to sketch for.
            if kind != site.match and (kind != "sketch" or (site.placement == "branch" and folds(site.width) > 1)):
                with suppress(Barrier):
                    metrics[kind] = step.other(kind)
        for name in emit.constants.keys() - known:
            projection = name
        fuse = super().fuse(emit, step)
        self.rehearsed.append(Rehearsed(site, fuse, metrics, projection=projection))
        return fuse

    def finish(self, context: RewriteContext, barriers: Sequence[BarrierRecord]) -> None:
        """Append the branch after each site, as a function of the operator's output."""
        order = {node: i for i, node in enumerate(context.tracer.graph.nodes)}
        for i, entry in enumerate(self.rehearsed):
            start = entry.site.reduce_at
            if entry.site.placement == "branch":
                branch = _end_of(entry.site, context.tracer, barriers)
            else:
                branch = next_branch(start, order)
            if branch is not None and context.native.get(branch) == context.native[start]:
                with suppress(Barrier):
                    self.rehearsed[i] = replace(entry, branch=context.canonical(branch))


def _end_of(site: Planned, tracer: AxisTracer, barriers: Sequence[BarrierRecord]) -> Any:
    """What the attention's branch of a site adds to its residual stream."""
    for barrier in barriers:
        for value in barrier.values if barrier.node in tracer.ends else ():
            if any(atom.base.stream == site.stream for atom in tracer.tokens(value)):
                return value
    return None
