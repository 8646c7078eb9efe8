"""What the passes share: one object for one graph, each field written by the pass that its comment names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from tofu_fx.axes.tracer import AxisTracer, BarrierRecord
from tofu_fx.plan.options import Options
from tofu_fx.sites.guards import Guard
from tofu_fx.sites.site import Attention, Rehearsed, Site


@dataclass
class Compilation:
    """One graph on its way through the pipeline. ``gm`` is rewritten in place by the passes."""

    gm: GraphModule
    options: Options
    #: what the graph is called with first, in the order of its placeholders, where known
    example_inputs: Sequence[Any] | None = None
    #: placeholders that are parameters or buffers, not inputs (lower_to_aten)
    model_state: frozenset[Node] = frozenset()
    #: the ATen graph as traced, for reports and tests (functionalize_inplace)
    before: GraphModule | None = None
    #: the fake values of the graph's outputs as traced (lower_to_aten)
    traced_outputs: list[Any] = field(default_factory=list)
    #: site id -> what must hold in each call, because it was decided from the values of the first (find_attention)
    guards: dict[str, Guard] = field(default_factory=dict)
    #: every attention in the graph (find_attention)
    attentions: list[Attention] = field(default_factory=list)
    #: one for each attention over tokens, matched or declined (find_attention, find_streams, plan_reductions)
    sites: list[Site] = field(default_factory=list)
    #: axes of the untouched graph, with the streams' token axes (find_streams)
    axes: AxisTracer | None = None
    #: places where tokens must be whole (find_streams)
    barriers: list[BarrierRecord] = field(default_factory=list)
    #: whether token counts are inputs of the rewritten graph, so that layers share their kernels (the backend)
    shared_kernels: bool = False
    #: what is passed for those inputs, behind the traced ones (insert_reductions)
    token_counts: list[int] = field(default_factory=list)
    #: what calibration needs to know of each site; None where the graph is rewritten to be compiled (insert_reductions)
    rehearsed: list[Rehearsed] | None = None
    #: whether tokens are shuffled at every site instead of being reduced, which must change nothing: for proofs
    shuffle: bool = False
    #: the node being worked on, for the message if a pass fails
    at: Node | None = None
    #: pass name -> seconds (the runner)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def reducing(self) -> list[Site]:
        """The sites at which tokens go, in graph order."""
        return [site for site in self.sites if site.matched and (site.r > 0 or self.shuffle)]

    @property
    def traced(self) -> AxisTracer:
        """The axes, for passes that run after find_streams."""
        assert self.axes is not None, "find_streams has not run"
        return self.axes
