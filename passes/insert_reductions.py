"""Write the graph again with the planned reductions in it.

Before: ``%y = add(%x, %branch)``, ... 197 tokens in all that follows
After:  ``%y = add(%x, %branch)``; ``%z = tofu.fuse_tokens(%y, mean of keys over heads, sizes, r, strategy, 1, 0)``, and
        all that follows on fewer tokens: log(size) in later attentions, pooling weighted by size, tables and masks
        gathered, whole tokens restored at barriers and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tofu_fx.passes.giving_up import given_up, one_given_up
from torch.fx import Graph, Node

from tofu_fx.axes.atoms import Barrier
from tofu_fx.axes.tracer import BarrierRecord
from tofu_fx.compilation import Compilation, Scheduled
from tofu_fx.errors import TofuError
from tofu_fx.fx.autocast import Autocasts, is_region
from tofu_fx.fx.nodes import LITERAL, graph_module, tensor_inputs
from tofu_fx.fx.stages import advanced
from tofu_fx.plan.sharing import shared_matches
from tofu_fx.rewriting.context import RewriteContext
from tofu_fx.rewriting.layout import Emitter
from tofu_fx.rewriting.reductions import Reductions
from tofu_fx.rewriting.rewriter import Rewriter
from tofu_fx.rewriting.token_count_inputs import InputFakes, faking
from tofu_fx.sites.site import Planned, Site


class _SiteLost(Exception):
    """One site cannot be served; the stream can."""

    def __init__(self, site: Planned, reason: str) -> None:
        super().__init__(reason)
        self.site = site


def insert_reductions(graph: Scheduled) -> Compilation:
    """Write the graph anew; every node of the new one has its fake value.

    A site or stream that turns out to meet something that whole tokens cannot serve is given up, and the rest is
    written again. So is a stream at which writing fails, unless ``on_error`` is "raise".
    """
    while graph.reducing:
        writing = _Writing(_with_shared_matches(graph))
        try:
            return writing.run()
        except _SiteLost as lost:
            sites = one_given_up(graph, lost.site, str(lost))
        except Barrier as barrier:
            sites = given_up(graph, str(barrier))
        except Exception as error:  # a fault of ours, which is reported and costs no other stream anything
            if graph.options.on_error == "raise" or isinstance(error, TofuError) or graph.at.node is None:
                raise
            failure = f"{type(error).__name__}: {error}"
            reason = f"its tokens could not be reduced, because insert_reductions failed: {failure}"
            sites = given_up(graph, reason, "left alone: {}".format)
        graph = replace(graph, sites=sites, barriers=(*graph.barriers, *writing.met))
    graph.reducer.begin()
    return advanced(Compilation, graph, shared_kernels=False)


def _with_shared_matches(graph: Scheduled) -> Scheduled:
    shares = shared_matches(graph.reducing, "block" if graph.reducer.any_plan else graph.options.reuse)
    sites: list[Site] = [
        replace(site, shares=shares.get(site.id)) if isinstance(site, Planned) else site for site in graph.sites
    ]
    return replace(graph, sites=tuple(sites))


@dataclass
class _Writing:
    """One attempt to write a graph."""

    graph: Scheduled

    def __post_init__(self) -> None:
        graph = self.graph
        #: barriers that the axes did not foresee
        self.met: list[BarrierRecord] = []
        self.new = Graph()
        proportional = graph.options.proportional_attention is not False
        context = RewriteContext(graph.axes, Emitter(self.new), graph.sites, proportional)
        self.rewriter = Rewriter(context)
        apart = graph.options.reuse == "none" and not graph.reducer.any_plan
        self.reductions = Reductions(self.rewriter, graph.reducer, apart)

    def run(self) -> Compilation:
        """Write it, and return what is known of it then."""
        graph = self.graph
        inputs = InputFakes(graph.gm, graph.shared_kernels, graph.reducer.any_plan)
        graph.reducer.begin()
        with faking(inputs.fake_mode), Autocasts() as regions:
            self._write(inputs, regions)
        if not graph.reducer.any_plan:
            self.new.eliminate_dead_code()
        own = [site.tokens_out for site in graph.reducing if site.shares is None]
        return advanced(
            Compilation,
            graph,
            gm=graph_module(graph.gm, self.new, self.rewriter.ctx.emit.constants),
            barriers=(*graph.barriers, *self.met),
            shared_kernels=inputs.shared,
            token_counts=tuple(own) if inputs.shared else (),
        )

    def _write(self, inputs: InputFakes, regions: Autocasts) -> None:
        graph, rewriter, new, context = self.graph, self.rewriter, self.new, self.rewriter.ctx
        old = graph.gm.graph
        for node in old.find_nodes(op="placeholder"):
            context.env[node, 0] = inputs.copy(new, node)
        counts = {site.id: inputs.token_count(new, site) for site in graph.reducing if site.shares is None}
        # Constants at once: what a branch compares tokens by is computed from them ahead of their place in the graph.
        for node in old.find_nodes(op="get_attr"):
            context.env[node, 0] = inputs.copy(new, node)
        reductions = {
            branch.enter if branch else site.reduce_at: (number, site, branch)
            for number, site in enumerate(graph.reducing)
            for branch in site.branches or (None,)
        }
        barriers = {barrier.node for barrier in graph.barriers}
        for node in old.nodes:
            graph.at.node = node
            if is_region(node):
                rewriter.settle(node)
            regions.visit(node)
            if node.op in ("placeholder", "get_attr"):
                continue
            if node.op == "output":
                graph.reducer.finish(context, graph.barriers)
                new.output(rewriter.write_whole(node))
            elif node in barriers:
                self._check_gain(node, "its attention needs all tokens")
                rewriter.write_whole(node)
            elif not node.meta.get(LITERAL):
                self._serve(node)
            if node in reductions:
                number, site, branch = reductions[node]
                count = counts[site.shares or site.id]
                try:
                    if branch is None:
                        self.reductions.reduce(site, count, seed=number)
                    else:
                        self.reductions.enter(site, branch, count, seed=number)
                except Barrier as barrier:
                    raise _SiteLost(site, str(barrier)) from None

    def _serve(self, node: Node) -> None:
        """Write a node on its reduced inputs; where that cannot be, it is a barrier that the axes did not foresee."""
        try:
            self.rewriter.write(node)
        except (Barrier, RuntimeError) as barrier:  # shapes that do not fit are a RuntimeError of the fake values
            axes = self.graph.axes
            values = tuple(value for value in tensor_inputs(node) if axes.tokens(value))
            if not values or axes.is_fatal(node, values):
                raise
            self._check_gain(node, str(barrier))
            self.met.append(BarrierRecord(node, str(barrier), values))
            self.rewriter.write_whole(node)

    def _check_gain(self, node: Node, reason: str) -> None:
        """Give up a branch whose attention cannot be served: it would be entered for nothing."""
        for site in self.graph.reducing:
            if site.placement == "branch" and site.attention.node is node:
                raise _SiteLost(site, reason)
