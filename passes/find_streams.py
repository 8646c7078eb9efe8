"""Find where tokens can be reduced, and follow each stream of tokens to the places where it must be whole.

    x ----------------+            the residual add behind an attention is where a stream may shrink;
    norm-attention-proj-(+) = y    everything computed from y then works on fewer tokens, up to a barrier

Or, in each block, the branches, while the residual keeps every token (``tofu_fx.sites.branches``). Changes nothing in the
graph but for an ``aten.alias`` where a branch shares its input with others. A stream that reaches a place which
restoring cannot serve (a mutation in place, attention weights that leave the graph) is given up, with that place as
the reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import networkx as nx
import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Atom, Axes, Base, token_atoms
from tofu_fx.axes.rules.table import find_rule
from tofu_fx.axes.tracer import AxisTracer, BarrierRecord, Seed, trace
from tofu_fx.choice import prefers_branch
from tofu_fx.compilation import Compilation
from tofu_fx.fx.nodes import is_op, value_graph
from tofu_fx.fx.op_families import WORK
from tofu_fx.plan.images import check_grids, note_idle_options
from tofu_fx.plan.options import BranchKind, Options
from tofu_fx.plan.plan import Plan
from tofu_fx.sites.branches import place_branches
from tofu_fx.sites.entries import detach_entries
from tofu_fx.sites.residual import place_site, sample_places, token_places
from tofu_fx.sites.site import Decline, Site

_VARYING = (
    "its number of tokens is symbolic; how many go is decided for each number, so every number is compiled on its own: "
    "pad the inputs to a few lengths"
)


def find_streams(compilation: Compilation) -> None:
    """Set ``placement``, ``reduce_at``, ``lead``, ``tail``, ``stream`` and ``branches`` of each site, and the
    compilation's axes and barriers.

    Raises:
        OptionError, PlanError: a grid that contradicts what is known of the tokens.
    """
    _find(compilation)
    matched = [site for site in compilation.sites if site.matched]
    check_grids(matched, compilation.options)
    note_idle_options(matched, compilation.options)


def _find(compilation: Compilation) -> None:
    sites = [site for site in compilation.sites if site.matched]
    plain, options = compilation.traced, compilation.options
    planned = _planned(options)
    branch = _Placement("branch", options.branches, options.grid)
    if options.placement == "branch" and options.plan is None:
        _place(compilation, plain, sites, {site.id: branch for site in sites})
        _follow(compilation, plain)
        return
    _place(compilation, plain, sites, {})
    _follow(compilation, plain)
    if any(placement.kind == "branch" for placement in planned.values()):
        # A site that the plan does not know was declined when it was made, on its stream or else in its branch.
        chosen = {site.id: planned.get(site.id, branch) for site in sites if site.matched or site.id in planned}
    elif options.placement == "auto" and options.plan is None:
        chosen = {site.id: branch for site in sites if prefers_branch(site, compilation)}
    else:
        return
    kept = {site.id: site.decline for site in sites}
    lost = list(chosen)
    while lost:  # all once more: where a stream is not reduced any more, others may be followed further
        _reset(sites)
        for site in sites:
            site.decline = None if site.id in chosen else kept[site.id]
        _place(compilation, plain, [site for site in sites if site.matched], chosen)
        for site in sites:
            if not site.matched:
                site.decline = kept[site.id] or site.decline
        spared = _follow(compilation, plain)
        # What can be served on its stream and not in its branch is served there, unless it is left alone on purpose.
        lost = [site.id for site in sites if site.id in chosen and not site.matched and kept[site.id] is None]
        lost = [name for name in lost if name not in spared]
        if options.plan is not None:
            return
        for name in lost:
            del chosen[name]


class _Placement(NamedTuple):
    """Where one site's tokens are to be reduced and, if in branches, in which of them, and what image they are of."""

    kind: str
    branches: Sequence[BranchKind] = ()
    grid: tuple[int, int] | None = None


def _planned(options: Options) -> dict[str, _Placement]:
    """The placements of a plan's rows."""
    rows = [] if options.plan is None else Plan.load(options.plan).sites
    grids = {row.id: options.grid or (tuple(row.grid) if row.grid else None) for row in rows}
    return {row.id: _Placement(row.placement, row.branches, grids[row.id]) for row in rows}  # type: ignore[arg-type]


def _reset(sites: Sequence[Site]) -> None:
    for site in sites:
        site.decline, site.reduce_at, site.placement, site.branches = None, None, "stream", ()


def _place(
    compilation: Compilation,
    plain: AxisTracer,
    sites: Sequence[Site],
    placements: Mapping[str, _Placement],
) -> None:
    """Find where the tokens of each site are reduced; decline those of which a place is taken, or has none."""
    graph = compilation.gm.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    attentions = [site.attention.node for site in sites]
    for site in sites:
        compilation.at = site.attention.node
        placement = placements.get(site.id, _Placement("stream"))
        if placement.kind == "branch":
            place_branches(site, plain, order, placement.branches, attentions, placement.grid)
        else:
            place_site(site, plain, order)
    taken: dict[Node | None, Site] = {}
    entered: set[Node] = set()  # the MLP behind two attentions side by side is a branch of the first one
    for site in sites:
        first = taken.setdefault(site.reduce_at, site) if site.matched else site
        if first is not site:
            reason = f"it ends at the same residual add as {first.id}, where tokens are reduced once"
            if site.placement == "branch":
                reason = f"it reads the same tokens as {first.id}, where they are reduced once for both"
            site.decline = Decline(reason, site.attention.node)
        elif site.matched and site.placement == "branch":
            attention, *behind = site.branches
            site.branches = (attention, *(branch for branch in behind if branch.enter not in entered))
            entered.update(branch.enter for branch in behind)
            detach_entries(site, plain, attentions)
    compilation.gm.recompile()


def _follow(compilation: Compilation, plain: AxisTracer) -> set[str]:
    """Follow the tokens of the placed sites through the graph; name those that the options leave alone."""
    flow = value_graph(compilation.gm.graph)
    unknown: dict[str, int] = {}
    while True:
        placed = [site for site in compilation.sites if site.matched]
        tracer = _trace(compilation, plain, placed)
        unknown.update(tracer.unknown_ops)  # those that cost a site are not met again once it is given up
        fatal = [barrier for barrier in tracer.barriers if barrier.fatal]
        lost = {site.id: b for b in reversed(fatal) for site in placed if _reaches(site, b, tracer, flow)}
        for site in placed:
            if site.id in lost:
                site.decline = Decline(f"tokens must stay whole: {lost[site.id].reason}", lost[site.id].node)
        if not lost:
            break
    tracer.unknown_ops = unknown
    compilation.axes, compilation.barriers = tracer, tracer.barriers
    for site in placed:
        _assign_stream(site, tracer)
    spared = _limit_resolutions(placed, compilation.options)
    for site in placed:
        if site.matched and not _has_work(site, tracer, flow):
            assert site.reduce_at is not None
            reason = "nothing is computed on the tokens behind it, or they must be whole before"
            site.decline = Decline(reason, site.reduce_at)
    return spared


def _reaches(site: Site, barrier: BarrierRecord, tracer: AxisTracer, flow: nx.DiGraph[Node]) -> bool:
    """Whether tokens that a site removes are missing at a barrier."""
    assert site.reduce_at is not None
    if site.placement == "branch" and barrier.values:
        entered = {atom.base for branch in site.branches for atom in tracer.tokens(branch.enter)}
        return any(atom.base in entered for value in barrier.values for atom in tracer.tokens(value))
    return site.reduce_at in nx.ancestors(flow, barrier.node)


def _trace(compilation: Compilation, plain: AxisTracer, placed: list[Site]) -> AxisTracer:
    seeds: dict[Node, Seed] = {}
    branches: dict[int, frozenset[Node]] = {}
    for number, site in enumerate(placed):
        assert site.reduce_at is not None
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
    known = [a for a in compilation.attentions if not a.causal and a.unrecognised is None]
    nodes = frozenset(node for a in known for node in (a.node, a.softmax) if node is not None)
    scores = frozenset(a.scores for a in known if a.scores is not None)
    graph, state = compilation.gm.graph, compilation.model_state
    return trace(lambda space: AxisTracer(graph, find_rule, state, seeds, nodes, scores, space, branches))


def _seed(site: Site, plain: AxisTracer, node: Node, dim: int, place: int, number: int) -> Seed:
    """Start a stream at a node, a site's residual add or the entry of a branch, unless one already runs through it.

    The tokens are the atom ``place`` of the dim, or (-1) all its atoms together. Its samples are the other atoms that
    the site's keys have too.
    """
    samples = sample_places(site.attention, plain, node, dim, place)

    def seed(tracer: AxisTracer, axes: Axes) -> Axes:
        if token_atoms(axes) or [len(d) for d in axes] != [len(d) for d in plain.of(node)]:
            return axes
        tracer.samples.axes[number] = tuple(axes[d][i] for d, i in samples)
        base = Base(f"tokens{number}", site.tokens - site.lead - site.tail, "token", number)
        tokens, atoms = Atom(base, -site.lead, site.tokens), axes[dim]
        tracer.entered[number] = atoms if place < 0 else atoms[place : place + 1], site.tokens
        tracer.samples.tokens[number] = (atoms if place < 0 else (atoms[place],)), site.lead
        mixed = (tokens,) if place < 0 else (*atoms[:place], tokens, *atoms[place + 1 :])
        return (*axes[:dim], mixed, *axes[dim + 1 :])

    return seed


def _assign_stream(site: Site, tracer: AxisTracer) -> None:
    assert site.reduce_at is not None
    atoms = token_atoms(tracer.of(site.reduce_at))
    if len(atoms) != 1 or atoms[0].base.size < 2:
        site.decline = Decline("the stream's tokens cannot be followed to this residual add", site.reduce_at)
        return
    site.stream, site.lead, site.tail = atoms[0].base.stream, atoms[0].lead, atoms[0].tail
    if site.placement == "branch" and tracer.branches.get(site.stream) != site.branches[0].inside:
        site.decline = Decline("its tokens are those of a stream that is reduced already", site.reduce_at)
        return
    if site.placement == "branch" and not any(a.base is atoms[0].base for a in tracer.tokens(site.attention.query)):
        reason = "what is done with its tokens ahead of the attention needs all of them"
        site.decline = Decline(reason, site.attention.query)
        return
    # A symbolic token count is guarded on: another number of tokens is another plan, so it compiles anew.
    dims = [i for i, dim in enumerate(tracer.of(site.reduce_at)) if atoms[0] in dim]
    if len(tracer.of(site.reduce_at)[dims[0]]) == 1:
        size = site.reduce_at.meta["val"].shape[dims[0]]
        if isinstance(size, torch.SymInt) and not isinstance(size.node.maybe_as_int(), int):
            site.notes.append(_VARYING)
        int(size)


def _limit_resolutions(sites: Sequence[Site], options: Options) -> set[str]:
    """Decline the branches whose image is smaller than wanted, against the largest that an attention sees; name them.

    In a UNet, whose images get smaller and then larger again, only the largest ones are taken unless more are wanted:
    the others have little work to save, and detail that is lost there is lost for all that follows.
    """
    images = [site for site in sites if site.matched and site.placement == "branch" and site.grid is not None]
    sizes = [site.grid[1] * site.grid[2] for site in images if site.grid]
    limit: float = options.max_downsample or (1 if any(a < b for a, b in itertools.pairwise(sizes)) else math.inf)
    planned = set() if options.plan is None else {row.id for row in Plan.load(options.plan).sites}
    spared = set()
    for site, size in zip(images, sizes, strict=True):
        smaller = math.sqrt(max(sizes) / size)
        if smaller > limit + 0.5 and site.id not in planned:
            assert site.reduce_at is not None
            reason = (
                f"its image is {smaller:.2g} times smaller each side than the largest that an attention sees, and "
                f"option 'max_downsample' is {limit}"
            )
            site.decline = Decline(reason, site.reduce_at)
            spared.add(site.id)
    return spared


def _has_work(site: Site, tracer: AxisTracer, flow: nx.DiGraph[Node]) -> bool:
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
