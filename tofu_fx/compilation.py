"""What is known of one graph after each pass: frozen stages, each with all that the one before it had.

    Captured ──lower_to_aten, functionalize_inplace──> Lowered ──find_attention──> Analysed ──find_streams──> Followed
             ──plan_reductions, decline_unprofitable, make_polymorphic──> Scheduled ──insert_reductions──> Compilation

A pass takes one stage and returns the next, or another of the same; it changes no fact that it did not make. Graphs are
the exception, because what is known of them is known by their nodes: ``gm`` is changed in place up to
insert_reductions, which writes a new one. ``before`` is a copy from ahead of all that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from tofu_fx.axes.tracer import AxisTracer, BarrierRecord
from tofu_fx.plan.options import Options
from tofu_fx.rewriting.reducer import Reducer
from tofu_fx.rows.narrow import LeftOut
from tofu_fx.sites.guards import Guard
from tofu_fx.sites.site import Attention, Placed, Planned, Site, placed, planned


@dataclass
class Cursor:
    """The node that a pass is at, for the message if it fails. No fact about the graph."""

    node: Node | None = None


@dataclass(frozen=True)
class Captured:
    """A graph as Dynamo gave it, and what is wanted of it."""

    gm: GraphModule
    options: Options
    #: what the graph is called with first, in the order of its placeholders, where known
    example_inputs: Sequence[Any] | None = None
    #: whether token counts are to be inputs of the rewritten graph, so that layers share their kernels
    shared_kernels: bool = False
    #: how reductions are written
    reducer: Reducer = field(default_factory=Reducer)
    at: Cursor = field(default_factory=Cursor)
    #: pass name -> seconds (the runner)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Lowered(Captured):
    """A graph of ATen ops."""

    #: placeholders that are parameters or buffers, not inputs
    model_state: frozenset[Node]
    #: the fake values of the graph's outputs as traced
    traced_outputs: tuple[Any, ...]
    #: a copy of it, for reports, calibration and proofs: what it was before any token could go
    before: GraphModule | None = None
    #: where rows that nobody reads were left out of the graph, and the nodes that take or compute only some since
    unread: tuple[LeftOut, ...] = ()
    narrowed: frozenset[Node] = frozenset()
    #: the operations that were saved by it
    unread_flops: int = 0


@dataclass(frozen=True, kw_only=True)
class Analysed(Lowered):
    """A graph of which every attention is known."""

    #: axes of the graph before any stream starts
    plain: AxisTracer
    attentions: tuple[Attention, ...]
    #: one for each attention over tokens, in graph order
    sites: tuple[Site, ...]
    #: site id -> what must hold in each call, because it was decided from the values of the first
    guards: Mapping[str, Guard]

    @property
    def placed(self) -> list[Placed]:
        """The sites that have a place, in graph order."""
        return placed(self.sites)


@dataclass(frozen=True, kw_only=True)
class Followed(Analysed):
    """A graph whose tokens are followed from the places where they become fewer."""

    #: axes of the graph, with the streams' token axes
    axes: AxisTracer
    #: places where tokens must be whole
    barriers: tuple[BarrierRecord, ...]


@dataclass(frozen=True, kw_only=True)
class Scheduled(Followed):
    """A graph for each of whose sites it is decided how many tokens go, and how."""

    @property
    def planned(self) -> list[Planned]:
        """The sites of which the schedule has decided, in graph order."""
        return planned(self.sites)

    @property
    def reducing(self) -> list[Planned]:
        """The sites at which something is written, in graph order."""
        return [site for site in self.planned if site.r > 0 or self.reducer.everywhere]


@dataclass(frozen=True, kw_only=True)
class Compilation(Scheduled):
    """A rewritten graph."""

    #: what is passed for the token counts among its inputs, after the traced ones
    token_counts: tuple[int, ...] = ()
