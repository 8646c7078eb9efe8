"""Where a stream may shrink: the residual add after an attention, and the tokens there that are protected."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import NamedTuple

from torch.fx import Node

from tofu_fx.axes.atoms import Atom, hint
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.fx.nodes import argument, is_op
from tofu_fx.fx.stages import advanced
from tofu_fx.sites.site import Attention, Decline, Declined, Found, Placed

_NEAR_THE_END = 16  # a token that the graph takes by its position this near an end is a prefix or suffix token
#: nodes that are looked at, after an attention or back from its queries; a block of the deepest model met has 60
MOST_OF_A_BLOCK = 200
#: what a reason says where the search ended there
LOOKED_AT = f", among the {MOST_OF_A_BLOCK} nodes that are looked at"


def place_site(site: Found, plain: AxisTracer, order: dict[Node, int]) -> Placed | Declined:
    """The site with its residual add, or why it has none."""
    attention = site.attention
    keys = plain.space.flat(plain.of(attention.query)[attention.query_tokens])
    if keys is None or keys.size < 2:
        return Declined(site, Decline("there is one token", attention.node))
    reached = {attention.node}
    following, cut = descendants(attention.node, order)
    for node in following:
        if not any(value in reached for value in node.all_input_nodes):
            continue
        joins = is_op(node, "add") and _joins_residual(node, reached, attention.query, plain)
        cut |= joins is None
        if joins:
            if len(token_places(plain, node, keys)) != 1:
                return Declined(site, Decline(_not_of_the_stream(site, node), node))
            prefix, suffix = protected(keys, plain)
            free = site.tokens - prefix - suffix
            place = advanced(
                Placed, site, reduce_at=node, prefix=prefix, suffix=suffix, image=image_of(keys, free, plain)
            )
            return place if free >= 2 else too_few(place)
        reached.add(node)
    reason = "no add joins the attention with the tokens that its queries come from"
    return Declined(site, Decline(f"{reason}{LOOKED_AT if cut else ''}", attention.node))


def too_few(site: Placed) -> Declined:
    """The site declined, because what is not protected is one token or none."""
    reason = f"too few tokens: {site.tokens}, of which {site.prefix + site.suffix} are protected"
    return Declined(site, Decline(reason, site.reduce_at))


def _not_of_the_stream(site: Found, node: Node) -> str:
    """Why the tokens of an attention are not those of the residual stream that its branch is added to."""
    shape = [hint(size) for size in node.meta["val"].shape]
    for sizes in (shape[1:-1], shape[2:]):  # channels last, channels first
        if len(sizes) > 1 and math.prod(sizes) == site.tokens:
            grid = " x ".join(map(str, sizes))
            return f"the residual stream is a map of {grid} tokens here, from which no single token can be removed"
    return (
        f"attention within groups of {site.tokens} tokens (windows, frames, rows), which the residual stream does not "
        "keep apart: it would not fit together again"
    )


def next_branch(start: Node, order: dict[Node, int]) -> Node | None:
    """What the first residual add after a node of the stream adds to it; None where there is none near."""
    came_from: dict[Node, set[Node]] = {start: set()}  # each node with those between the start and it
    for node in descendants(start, order).nodes:
        inputs = [value for value in node.all_input_nodes if value in came_from]
        if is_op(node, "add") and len(inputs) == 2:
            skip, branch = sorted(inputs, key=order.__getitem__)
            if skip is start or skip in came_from[branch]:
                return branch
        if inputs:
            came_from[node] = set(inputs).union(*(came_from[value] for value in inputs))
    return None


def token_places(plain: AxisTracer, node: Node, tokens: Atom) -> list[tuple[int, int]]:
    """Where a tensor carries the tokens: (dim, place among that dim's atoms), for ``[B, N, C]`` and ``[B*N, C]``."""
    axes = plain.of(node)
    places = [(i, j) for i, dim in enumerate(axes) for j, atom in enumerate(dim) if atom == tokens]
    return places or [(i, -1) for i, dim in enumerate(axes) if plain.space.flat(dim) == tokens]


def sample_places(attention: Attention, plain: AxisTracer, node: Node, dim: int, place: int) -> list[tuple[int, int]]:
    """Where a tensor carries the samples of an attention: the axes that it shares with the keys.

    Beside the tokens' and those that the scores sum over, which are features, whatever they were made of.
    """
    keys = plain.of(attention.key)
    own = keys[attention.key_tokens] + keys[attention.key_features]
    shared = {atom for other in keys for atom in other if atom.base.kind != "feature"}.difference(own)
    tokens = {(dim, i) for i in range(len(plain.of(node)[dim])) if place in (-1, i)}
    return [
        (d, i)
        for d, other in enumerate(plain.of(node))
        for i, atom in enumerate(other)
        if (d, i) not in tokens and atom in shared
    ]


class Descendants(NamedTuple):
    """What is computed from a node, in graph order, and whether there is more of it than was looked at."""

    nodes: list[Node]
    cut: bool


def descendants(start: Node, order: Mapping[Node, int]) -> Descendants:
    """What is computed from a node, as far as a block can reach (a bounded walk: linear in layers)."""
    nodes: list[Node] = []
    seen, todo = {start}, [(order[start], start)]
    while todo and len(seen) < MOST_OF_A_BLOCK:
        _, node = heapq.heappop(todo)
        if node is not start:
            nodes.append(node)
        for user in node.users:
            if user not in seen:
                seen.add(user)
                heapq.heappush(todo, (order[user], user))
    return Descendants(nodes, bool(todo))


def _joins_residual(node: Node, reached: set[Node], query: Node, plain: AxisTracer) -> bool | None:
    """Whether an add joins the attention's branch with the stream that the attention read; None where the query was not
    followed back far enough to tell.
    """
    others = [value for value in node.all_input_nodes if value not in reached]
    if len(others) != 1 or others[0] not in plain.depends or others[0].meta["val"].dim() != node.meta["val"].dim():
        return False
    # The residual operand, or what it is a multiple of (scaled residuals), is what the query was computed from.
    roots = {others[0], *others[0].all_input_nodes}
    seen, todo = {query}, [query]
    while todo and len(seen) < MOST_OF_A_BLOCK:
        for value in todo.pop().all_input_nodes:
            if value in roots and value in plain.depends:
                return True
            if value not in seen and value.op == "call_function":
                seen.add(value)
                todo.append(value)
    return None if todo else False


def image_of(tokens: Atom, free: int, plain: AxisTracer) -> tuple[int, int, int] | None:
    """Frames, height and width of the image (or video) whose places the tokens are."""
    *frames, height, width = (1, *plain.space.factors(tokens))
    if len(frames) == 0 or tokens.base.size != free:
        return None
    return math.prod(frames), height, width


def protected(tokens: Atom, plain: AxisTracer) -> tuple[int, int]:
    """Prefix and suffix tokens, from both ends of the graph.

    Ahead: what was concatenated that does not depend on the input (the run's positions outside of its base).
    After: what the graph later takes by position near an end (class token, registers, detection tokens).
    """
    prefix, suffix = max(0, tokens.prefix), max(0, tokens.suffix)
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
            prefix = max(prefix, last + shift + 1)
        elif first + shift >= tokens.size - near:
            suffix = max(suffix, tokens.size - first - shift)
    return prefix, suffix
