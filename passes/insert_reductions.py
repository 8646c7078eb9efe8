"""Write the graph again with the planned reductions in it.

Before: ``%y = add(%x, %branch)``, ... 197 tokens in all that follows
After:  ``%y = add(%x, %branch)``; ``%z = tofu.fuse_tokens(%y, mean of keys over heads, sizes, r, strategy, 1, 0)``, and
        all that follows on fewer tokens: log(size) in later attentions, pooling weighted by size, tables and masks
        gathered, whole tokens restored at barriers and outputs.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import networkx as nx
from torch.fx import Graph, Node

from tofu_fx.axes.atoms import Barrier
from tofu_fx.axes.tracer import AxisTracer, BarrierRecord
from tofu_fx.compilation import Compilation
from tofu_fx.errors import TofuError
from tofu_fx.fx.autocast import Autocasts, is_region
from tofu_fx.fx.nodes import LITERAL, graph_module, tensor_inputs, value_graph
from tofu_fx.plan.sharing import share_matches
from tofu_fx.rewrite.layout import Emitter
from tofu_fx.rewrite.rewriter import Rewriter
from tofu_fx.rewrite.token_count_inputs import InputFakes, faking
from tofu_fx.sites.residual import next_branch
from tofu_fx.sites.site import Decline, Site


class _SiteLost(Exception):
    """One site cannot be served; the stream can."""

    def __init__(self, site: Site, reason: str) -> None:
        super().__init__(reason)
        self.site = site


def insert_reductions(compilation: Compilation) -> None:
    """Replace ``compilation.gm``; every node of the new graph has its fake value.

    A site or stream that turns out to meet something that whole tokens cannot serve is given up, and the rest is
    written again. So is a stream at which writing fails, unless ``on_error`` is "raise".
    """
    while compilation.reducing:
        if compilation.rehearsed is not None:
            compilation.rehearsed = []
        try:
            share_matches(compilation.reducing, compilation.options.reuse if compilation.rehearsed is None else "block")
            compilation.gm = graph_module(compilation.gm, _write(compilation))
            own = [site for site in compilation.reducing if site.shares is None]
            compilation.token_counts = [site.tokens_out for site in own if compilation.shared_kernels]
            return
        except _SiteLost as lost:
            _give_up_site(compilation, lost.site, str(lost))
        except Barrier as barrier:
            give_up_streams(compilation, str(barrier))
        except Exception as error:  # a fault of ours, which is said and costs no other stream anything
            if compilation.options.on_error == "raise" or isinstance(error, TofuError) or compilation.at is None:
                raise
            reason = (
                f"its tokens could not be reduced, because insert_reductions failed: {type(error).__name__}: {error}"
            )
            for site in give_up_streams(compilation, reason):
                site.notes.append(f"left alone: {site.decline}")


def _write(compilation: Compilation) -> Graph:
    inputs, new = InputFakes(compilation), Graph()
    with faking(inputs.fake_mode), Autocasts() as regions:
        _write_nodes(compilation, inputs, new, regions)
    if compilation.rehearsed is None:
        new.eliminate_dead_code()
    return new


def _write_nodes(compilation: Compilation, inputs: InputFakes, new: Graph, regions: Autocasts) -> None:
    old, rewriter = compilation.gm.graph, Rewriter(compilation, Emitter(new))
    for node in old.find_nodes(op="placeholder"):
        rewriter.env[node, 0] = inputs.copy(new, node)
    counts = {site.id: inputs.token_count(new, site) for site in compilation.reducing if site.shares is None}
    # Constants at once: what a branch compares tokens by is computed from them ahead of their place in the graph.
    for node in old.find_nodes(op="get_attr"):
        rewriter.env[node, 0] = inputs.copy(new, node)
    reductions = {
        branch.enter if branch else site.reduce_at: (number, site, branch)
        for number, site in enumerate(compilation.reducing)
        for branch in site.branches or (None,)
    }
    barriers = {barrier.node for barrier in compilation.barriers}
    for node in old.nodes:
        compilation.at = node
        if is_region(node):
            rewriter.settle(node)
        regions.visit(node)
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "output":
            _add_branches(compilation, rewriter)
            new.output(rewriter.write_whole(node))
        elif node in barriers:
            _check_gain(compilation, node, "its attention needs all tokens")
            rewriter.write_whole(node)
        elif not node.meta.get(LITERAL):
            _serve(compilation, rewriter, node)
        if node in reductions:
            number, site, branch = reductions[node]
            count = counts[(site.shares or site).id]
            try:
                if branch is None:
                    rewriter.reduce(site, count, seed=number)
                else:
                    rewriter.enter(site, branch, count, seed=number)
            except Barrier as barrier:
                raise _SiteLost(site, str(barrier)) from None


def _add_branches(compilation: Compilation, rewriter: Rewriter) -> None:
    """For calibration: the branch behind each site, as a function of the operator's output."""
    order = {node: i for i, node in enumerate(compilation.gm.graph.nodes)}
    for i, entry in enumerate(compilation.rehearsed or ()):
        assert entry.site.reduce_at is not None
        if entry.site.placement == "branch":
            branch = _end_of(compilation, entry.site)
        else:
            branch = next_branch(entry.site.reduce_at, order)
        if branch is not None and rewriter.native.get(branch) == rewriter.native[entry.site.reduce_at]:
            with suppress(Barrier):
                compilation.rehearsed[i] = replace(entry, branch=rewriter.canonical(branch))  # type: ignore[index]


def _end_of(compilation: Compilation, site: Site) -> Node | None:
    """What the attention's branch of a site adds to its residual stream."""
    tracer = compilation.traced
    for barrier in compilation.barriers:
        for value in barrier.values if barrier.node in tracer.ends else ():
            if any(atom.base.stream == site.stream for atom in tracer.tokens(value)):
                return value
    return None


def _serve(compilation: Compilation, rewriter: Rewriter, node: Node) -> None:
    """Write a node on its reduced inputs; where that cannot be, it is a barrier that the axes did not foresee."""
    try:
        rewriter.write(node)
    except (Barrier, RuntimeError) as barrier:  # shapes that do not fit are a RuntimeError of the fake values
        values = tuple(value for value in tensor_inputs(node) if compilation.traced.tokens(value))
        if not values or compilation.traced.is_fatal(node, values):
            raise
        _check_gain(compilation, node, str(barrier))
        compilation.barriers.append(BarrierRecord(node, str(barrier), values))
        rewriter.write_whole(node)


def _check_gain(compilation: Compilation, node: Node, reason: str) -> None:
    """Give up a branch whose attention cannot be served: it would be entered for nothing."""
    for site in compilation.reducing:
        if site.placement == "branch" and site.attention.node is node:
            raise _SiteLost(site, reason)


def _give_up_site(compilation: Compilation, site: Site, reason: str) -> None:
    """Decline one site; those behind it take as many tokens as planned, from more."""
    assert site.reduce_at is not None
    site.decline = Decline(reason, site.reduce_at)
    for later in compilation.sites[compilation.sites.index(site) + 1 :]:
        if later.matched and later.stream == site.stream:
            gone = site.tokens_in - site.tokens_out
            later.tokens_in, later.tokens_out = later.tokens_in + gone, later.tokens_out + gone


def give_up_streams(compilation: Compilation, reason: str) -> list[Site]:
    """Decline the sites of the streams that meet at ``compilation.at``, or lead to it; where none does, all."""
    at = compilation.at
    assert isinstance(at, Node)
    tracer = compilation.traced
    streams = {atom.base.stream for value in (at, *tensor_inputs(at)) for atom in tracer.tokens(value)}
    lost = [site for site in compilation.reducing if _streams(site, tracer) & streams]
    if not lost:
        ahead = nx.ancestors(value_graph(compilation.gm.graph), at)
        lost = [site for site in compilation.reducing if site.reduce_at in ahead] or compilation.reducing
    for site in lost:
        site.decline = Decline(reason, at)
    return lost


def _streams(site: Site, tracer: AxisTracer) -> set[int]:
    """The numbers of the streams that a site reduces: one, or that of each of its branches."""
    enters = [branch.enter for branch in site.branches]
    return {site.stream, *(atom.base.stream for enter in enters for atom in tracer.tokens(enter))}
