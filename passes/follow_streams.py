"""Follow each stream of tokens from where it becomes fewer to the places where it must be whole.

Before: sites are placed. After: the axes of the graph have the streams' tokens, and its barriers are known; each site
knows its stream. Changes nothing in the graph. A stream that reaches a place which restoring cannot serve (a mutation
in place, attention weights that leave the graph) is given up, with that place as the reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import networkx as nx
import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Atom, Axes, Base, token_atoms
from tofu_fx.axes.rules.table import find_rule
from tofu_fx.axes.tracer import AxisTracer, BarrierRecord, Seed, trace
from tofu_fx.compilation import Analysed, Followed
from tofu_fx.fx.nodes import is_op, value_graph
from tofu_fx.fx.op_families import WORK
from tofu_fx.fx.stages import advanced
from tofu_fx.plan.options import Options
from tofu_fx.sites.residual import sample_places, token_places
from tofu_fx.sites.site import Decline, Declined, Placed, Site, placed

_VARYING = (
    "its number of tokens is symbolic; how many go is decided for each number, so every number is compiled on its own: "
    "pad the inputs to a few lengths"
)


class Streams(NamedTuple):
    """A graph whose streams are followed, and the sites that the options leave alone on purpose."""

    graph: Followed
    spared: set[str]


def follow_streams(graph: Analysed, sites: Sequence[Site]) -> Streams:
    """Follow the tokens of the sites that are placed."""
    flow = value_graph(graph.gm.graph)
    unknown: dict[str, int] = {}
    lost: dict[str, BarrierRecord] = {}
    declined: dict[str, Declined] = {}
    while True:
        members = [site for site in placed(sites) if site.id not in declined]
        tracer = _trace(graph, members)
        unknown.update(tracer.unknown_ops)  # those that cost a site are not met again once it is given up
        fatal = [barrier for barrier in tracer.barriers if barrier.fatal]
        lost = {site.id: b for b in reversed(fatal) for site in members if _reaches(site, b, tracer, flow)}
        for site in members:
            if site.id in lost:
                barrier = lost[site.id]
                reason = f"tokens must stay whole: {barrier.reason}"
                declined[site.id] = Declined(site, Decline(reason, barrier.node))
        if not lost:
            break
    tracer.unknown_ops = unknown
    known: dict[str, Site] = {**declined, **{site.id: _of_stream(site, tracer) for site in members}}
    spared = _too_small(placed(known.values()), graph.options)
    known.update(spared)
    for site in placed(known.values()):
        if not _has_work(site, tracer, flow):
            reason = "nothing is computed on the tokens after it, or they must be whole before"
            known[site.id] = Declined(site, Decline(reason, site.reduce_at))
    found = tuple(known.get(site.id, site) for site in sites)
    followed = advanced(Followed, graph, sites=found, axes=tracer, barriers=tuple(tracer.barriers))
    return Streams(followed, set(spared))


def _reaches(site: Placed, barrier: BarrierRecord, tracer: AxisTracer, flow: nx.DiGraph[Node]) -> bool:
    """Whether tokens that a site removes are missing at a barrier."""
    if site.placement == "branch" and barrier.values:
        entered = {atom.base for branch in site.branches for atom in tracer.tokens(branch.enter)}
        return any(atom.base in entered for value in barrier.values for atom in tracer.tokens(value))
    return site.reduce_at in nx.ancestors(flow, barrier.node)


def _trace(graph: Analysed, placed: Sequence[Placed]) -> AxisTracer:
    plain = graph.plain
    seeds: dict[Node, Seed] = {}
    branches: dict[int, frozenset[Node]] = {}
    for number, site in enumerate(placed):
        if site.placement == "branch":
            for branch in site.branches:
                own = number + len(placed) * len(branches)
                seeds[branch.enter] = _seed(site, plain, branch.enter, branch.dim, branch.place, own)
                branches[own] = branch.inside
            continue
        keys = plain.space.flat(plain.of(site.attention.query)[site.attention.query_tokens])
        assert keys is not None
        ((dim, place),) = token_places(plain, site.reduce_at, keys)
        seeds[site.reduce_at] = _seed(site, plain, site.reduce_at, dim, place, number)
    known = [a for a in graph.attentions if not a.causal and a.unrecognised is None]
    nodes = frozenset(node for a in known for node in (a.node, a.softmax) if node is not None)
    scores = frozenset(a.scores for a in known if a.scores is not None)
    nodes_of, state = graph.gm.graph, graph.model_state
    return trace(lambda space: AxisTracer(nodes_of, find_rule, state, seeds, nodes, scores, space, branches))


def _seed(site: Placed, plain: AxisTracer, node: Node, dim: int, place: int, number: int) -> Seed:
    """Start a stream at a node, a site's residual add or the entry of a branch, unless one already runs through it.

    The tokens are the atom ``place`` of the dim, or (-1) all its atoms together. Its samples are the other atoms that
    the site's keys have too.
    """
    samples = sample_places(site.attention, plain, node, dim, place)

    def seed(tracer: AxisTracer, axes: Axes) -> Axes:
        if token_atoms(axes) or [len(d) for d in axes] != [len(d) for d in plain.of(node)]:
            return axes
        tracer.samples.axes[number] = tuple(axes[d][i] for d, i in samples)
        base = Base(f"tokens{number}", site.tokens - site.prefix - site.suffix, "token", number)
        tokens, atoms = Atom(base, -site.prefix, site.tokens), axes[dim]
        tracer.entered[number] = atoms if place < 0 else atoms[place : place + 1], site.tokens
        tracer.samples.tokens[number] = (atoms if place < 0 else (atoms[place],)), site.prefix
        mixed = (tokens,) if place < 0 else (*atoms[:place], tokens, *atoms[place + 1 :])
        return (*axes[:dim], mixed, *axes[dim + 1 :])

    return seed


def _of_stream(site: Placed, tracer: AxisTracer) -> Placed | Declined:
    """The site with its stream, and with the protected tokens that the stream has there."""
    atoms = token_atoms(tracer.of(site.reduce_at))
    if len(atoms) != 1 or atoms[0].base.size < 2:
        reason = "the stream's tokens cannot be followed to this residual add"
        return Declined(site, Decline(reason, site.reduce_at))
    site = replace(site, stream=atoms[0].base.stream, prefix=atoms[0].prefix, suffix=atoms[0].suffix)
    if site.placement == "branch" and tracer.branches.get(site.stream) != site.branches[0].inside:
        return Declined(site, Decline("its tokens are those of a stream that is reduced already", site.reduce_at))
    if site.placement == "branch" and not any(a.base is atoms[0].base for a in tracer.tokens(site.attention.query)):
        reason = "what is done with its tokens ahead of the attention needs all of them"
        return Declined(site, Decline(reason, site.attention.query))
    # A symbolic token count is guarded on: another number of tokens is another plan, so it compiles anew.
    dims = [i for i, dim in enumerate(tracer.of(site.reduce_at)) if atoms[0] in dim]
    if len(tracer.of(site.reduce_at)[dims[0]]) == 1:
        size = site.reduce_at.meta["val"].shape[dims[0]]
        if isinstance(size, torch.SymInt) and not isinstance(size.node.maybe_as_int(), int):
            site = replace(site, notes=(*site.notes, _VARYING))
        int(size)
    return site


def _too_small(sites: Sequence[Placed], options: Options) -> dict[str, Declined]:
    """Decline the branches whose image is smaller than wanted, against the largest that an attention sees; name them.

    In a UNet, whose images get smaller and then larger again, only the largest ones are taken unless more are wanted:
    the others have little work to save, and detail that is lost there is lost for all that follows.
    """
    images = [site for site in sites if site.placement == "branch" and site.grid is not None]
    sizes = [site.grid[1] * site.grid[2] for site in images if site.grid]
    limit: float = options.max_downsample or (1 if any(a < b for a, b in itertools.pairwise(sizes)) else math.inf)
    planned = set() if options.plan is None else {row.id for row in options.plan.sites}
    spared = {}
    for site, size in zip(images, sizes, strict=True):
        smaller = math.sqrt(max(sizes) / size)
        if smaller > limit + 0.5 and site.id not in planned:
            reason = (
                f"its image is {smaller:.2g} times smaller each side than the largest that an attention sees, and "
                f"option 'max_downsample' is {limit}"
            )
            spared[site.id] = Declined(site, Decline(reason, site.reduce_at))
    return spared


def _has_work(site: Placed, tracer: AxisTracer, flow: nx.DiGraph[Node]) -> bool:
    """Whether any matrix product works on the tokens after the reduction."""
    seen, todo = {site.reduce_at}, [site.reduce_at]
    while todo:
        node = todo.pop()
        assert node is not None
        for user in flow.successors(node):
            if user in seen or not any(a.base.stream == site.stream for a in tracer.tokens(user)):
                continue
            if is_op(user, *WORK):
                return True
            seen.add(user)
            todo.append(user)
    return False
