"""Find where tokens can be reduced, and follow each stream of tokens to the places where it must be whole.

    x ----------------+            the residual add behind an attention is where a stream may shrink;
    norm-attention-proj-(+) = y    everything computed from y then works on fewer tokens, up to a barrier

Changes nothing in the graph. A stream that reaches a place which restoring cannot serve (a mutation in place, attention
weights that leave the graph) is given up, with that place as the reason.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import networkx as nx
from torch.fx import Node

from tofu_fx.compilation import Compilation
from tofu_fx.graphs import argument, is_op, value_graph
from tofu_fx.planning.site import Decline, Site
from tofu_fx.rules import find_rule
from tofu_fx.tokens import Atom, Axes, Base, token_atoms
from tofu_fx.tracer import AxisTracer, Seed, trace

_NEAR_THE_END = 16  # a token that the graph takes by its position this near an end is a prefix or suffix token
_FAR = 200  # nodes: a block of the deepest model met has 60
_WORK = ("linear", "matmul", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention")


def find_streams(compilation: Compilation) -> None:
    """Set ``reduce_at``, ``lead``, ``tail`` and ``stream`` of each site, and the compilation's axes and barriers."""
    plain = compilation.traced
    order = {node: i for i, node in enumerate(compilation.gm.graph.nodes)}
    for site in compilation.sites:
        if site.matched:
            compilation.at = site.attention.node
            _place(site, plain, order)
    flow = value_graph(compilation.gm.graph)
    while True:
        placed = [site for site in compilation.sites if site.matched]
        tracer = _trace(compilation, plain, placed)
        fatal = [barrier for barrier in tracer.barriers if barrier.fatal]
        lost = {site.id: b for b in reversed(fatal) for site in placed if site.reduce_at in nx.ancestors(flow, b.node)}
        for site in placed:
            if site.id in lost:
                site.decline = Decline(f"tokens must stay whole: {lost[site.id].reason}", lost[site.id].node)
        if not lost:
            break
    compilation.axes, compilation.barriers = tracer, tracer.barriers
    for site in placed:
        _assign_stream(site, tracer)
        if site.matched and not _has_work(site, tracer, flow):
            assert site.reduce_at is not None
            site.decline = Decline("nothing is computed on the tokens before they must be whole again", site.reduce_at)


def _place(site: Site, plain: AxisTracer, order: dict[Node, int]) -> None:
    """Find the residual add of a site, or decline it."""
    attention = site.attention
    keys = plain.space.flat(plain.of(attention.key)[attention.key_tokens])
    if keys is None or keys.size < 2:
        site.decline = Decline("there is one token", attention.node)
        return
    reached = {attention.node}
    for node in sorted(_descendants(attention.node, order), key=order.__getitem__):
        if not any(value in reached for value in node.all_input_nodes):
            continue
        if is_op(node, "add") and _joins_residual(node, reached, attention.query, plain):
            if len(_places(plain, node, keys)) == 1:
                site.reduce_at = node
                site.lead, site.tail = _protected(keys, plain)
                if site.tokens - site.lead - site.tail < 2:
                    site.decline = Decline(
                        f"too few tokens: {site.tokens}, of which {site.lead + site.tail} are protected", node
                    )
                return
            site.decline = Decline(
                "the attention's tokens are not the residual stream's (windows, or a reshape before the add)",
                node,
            )
            return
        reached.add(node)
    site.decline = Decline("no residual add follows the attention", attention.node)


def _places(plain: AxisTracer, node: Node, tokens: Atom) -> list[tuple[int, int]]:
    """Where a tensor carries the tokens: (dim, place among that dim's atoms), for ``[B, N, C]`` and ``[B*N, C]``."""
    axes = plain.of(node)
    places = [(i, j) for i, dim in enumerate(axes) for j, atom in enumerate(dim) if atom == tokens]
    return places or [(i, -1) for i, dim in enumerate(axes) if plain.space.flat(dim) == tokens]


def _descendants(start: Node, order: dict[Node, int]) -> Iterator[Node]:
    """What is computed from a node, in graph order, as far as a block can reach (a bounded walk: linear in layers)."""
    seen, todo = {start}, [(order[start], start)]
    while todo and len(seen) < _FAR:
        _, node = heapq.heappop(todo)
        if node is not start:
            yield node
        for user in node.users:
            if user not in seen:
                seen.add(user)
                heapq.heappush(todo, (order[user], user))


def _joins_residual(node: Node, reached: set[Node], query: Node, plain: AxisTracer) -> bool:
    """Whether an add joins the attention's branch with the stream that the attention read."""
    others = [value for value in node.all_input_nodes if value not in reached]
    if len(others) != 1 or others[0] not in plain.depends or others[0].meta["val"].dim() != node.meta["val"].dim():
        return False
    # The residual operand, or what it is a multiple of (scaled residuals), is what the query was computed from.
    roots = {others[0], *others[0].all_input_nodes}
    seen, todo = {query}, [query]
    while todo and len(seen) < _FAR:
        for value in todo.pop().all_input_nodes:
            if value in roots and value in plain.depends:
                return True
            if value not in seen and value.op == "call_function":
                seen.add(value)
                todo.append(value)
    return False


def _protected(tokens: Atom, plain: AxisTracer) -> tuple[int, int]:
    """Prefix and suffix tokens, from both ends of the graph.

    Ahead: what was concatenated that does not depend on the input (the run's positions outside of its base).
    Behind: what the graph later takes by position near an end (class token, registers, detection tokens).
    """
    lead, tail = max(0, tokens.lead), max(0, tokens.tail)
    for node in plain.graph.nodes:
        if not is_op(node, "select", "slice"):
            continue
        axes = plain.of(node.args[0])
        dim = int(argument(node, "dim")) % len(axes) if axes else 0
        atom = axes[dim][0] if axes and len(axes[dim]) == 1 else None
        if atom is None or atom.base is not tokens.base:
            continue
        if is_op(node, "select"):
            first, last = argument(node, "index"), argument(node, "index")
        else:
            first, last = argument(node, "start") or 0, argument(node, "end")
            last = atom.size - 1 if last is None else last - 1 if isinstance(last, int) else None
        if not isinstance(first, int) or not isinstance(last, int):
            continue
        first, last = (p + atom.size if p < 0 else min(p, atom.size) for p in (first, last))
        shift = atom.offset - tokens.offset
        near = max(1, min(_NEAR_THE_END, tokens.size // 4))
        if last + shift < near:
            lead = max(lead, last + shift + 1)
        elif first + shift >= tokens.size - near:
            tail = max(tail, tokens.size - first - shift)
    return lead, tail


def _trace(compilation: Compilation, plain: AxisTracer, placed: list[Site]) -> AxisTracer:
    seeds: dict[Node, Seed] = {}
    for number, site in enumerate(placed):
        assert site.reduce_at is not None
        keys = plain.space.flat(plain.of(site.attention.key)[site.attention.key_tokens])
        assert keys is not None
        ((dim, place),) = _places(plain, site.reduce_at, keys)
        seeds[site.reduce_at] = _seed(site, dim, place, number)
    known = [a for a in compilation.attentions if not a.causal]
    nodes = frozenset(node for a in known for node in (a.node, a.softmax) if node is not None)
    scores = frozenset(a.scores for a in known if a.scores is not None)
    graph, state = compilation.gm.graph, compilation.model_state
    return trace(lambda space: AxisTracer(graph, find_rule, state, seeds, nodes, scores, space))


def _seed(site: Site, dim: int, place: int, number: int) -> Seed:
    """Start a stream at a site's residual add, unless one already runs through it.

    The tokens are the atom ``place`` of the dim, or (-1) all its atoms together.
    """

    def seed(tracer: AxisTracer, axes: Axes) -> Axes:
        if token_atoms(axes):
            return axes
        base = Base(f"tokens{number}", site.tokens - site.lead - site.tail, "token", number)
        tokens, atoms = Atom(base, -site.lead, site.tokens), axes[dim]
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
    # A symbolic token count is guarded on: another number of tokens is another plan, so it compiles anew.
    dims = [i for i, dim in enumerate(tracer.of(site.reduce_at)) if atoms[0] in dim]
    if len(tracer.of(site.reduce_at)[dims[0]]) == 1:
        int(site.reduce_at.meta["val"].shape[dims[0]])


def _has_work(site: Site, tracer: AxisTracer, flow: nx.DiGraph[Node]) -> bool:
    """Whether any matrix product works on the tokens after the reduction."""
    seen, todo = {site.reduce_at}, [site.reduce_at]
    while todo:
        node = todo.pop()
        assert node is not None
        for user in flow.successors(node):
            if user in seen or not any(a.base.stream == site.stream for a in tracer.tokens(user)):
                continue
            if is_op(user, *_WORK):
                return True
            seen.add(user)
            todo.append(user)
    return False
