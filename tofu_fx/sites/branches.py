"""Where the branches of a block start and end: what may run on fewer tokens while the residual keeps every one.

    x ------------------------------(+) y --------------------(+)     x, y: the residual stream
    norm - enter - attention - proj --/  \\- norm - enter - mlp --/     enter: a branch's normalised input

A branch is entered at the last node that all of it is computed from and that stands ahead of its first product, so that
the projections, too, work on fewer tokens. It ends where it meets whole tokens again: at its residual add.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch.fx import Node

from tofu_fx.axes.atoms import Atom
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.fx.nodes import is_op, tensor_inputs
from tofu_fx.fx.op_families import CONVOLUTIONS, COPIES, TOKEN_NORMS, WORK
from tofu_fx.fx.stages import advanced
from tofu_fx.sites.residual import LOOKED_AT, descendants, image_of, token_places, too_few
from tofu_fx.sites.runs import carries, is_enterable, outside, run_of
from tofu_fx.sites.site import Branch, Decline, Declined, Found, Placed

logger = logging.getLogger("tofu_fx")

_STREAM = TOKEN_NORMS | COPIES
#: nodes of the residual stream that the branches of one block may start at
MOST_PARALLEL = 8
_WORK = WORK | CONVOLUTIONS - {"conv3d"}


def place_branches(
    site: Found,
    plain: AxisTracer,
    order: Mapping[Node, int],
    kinds: Collection[str],
    others: Collection[Node],
    grid: tuple[int, int] | None = None,
) -> Placed | Declined:
    """The site with the branches of its block, or why it has none.

    Args:
        site: an attention over tokens.
        plain: the axes of the untouched graph.
        order: the place of each node in the graph.
        kinds: which branches are wanted: "attention", "mlp", "cross".
        others: the nodes of all attentions over tokens, which are sites of their own.
        grid: height and width of the image, where the user knows what the graph does not show.
    """
    attention = site.attention
    queries = plain.space.flat(plain.of(attention.query)[attention.query_tokens])
    if queries is None or queries.size < 2:
        return Declined(site, Decline("there is one token", attention.node))
    following = descendants(attention.node, order)
    for tokens in _by_preference(queries, plain, grid):
        found = _attention_branch(site, following.nodes, tokens, plain, order)
        if found is None:
            continue
        add, branch = found
        run = run_of(branch.enter, tokens, plain)
        prefix, suffix = outside(run, tokens, plain)
        free = run.size - prefix - suffix
        image = image_of(tokens, free, plain)
        place = advanced(
            Placed,
            site,
            placement="branch",
            reduce_at=branch.enter,
            tokens=run.size,
            kinds=tuple(kinds),
            prefix=prefix,
            suffix=suffix,
            image=image,
            grid=(1, *grid) if grid and grid[0] * grid[1] == free else image,
            branches=(branch, *_next_branches(add, tokens, run, plain, order, kinds, others)),
        )
        return place if free >= 2 else too_few(place)
    searched = LOOKED_AT if following.cut else ""
    joins = f"no add joins the attention with the tokens that its queries come from{searched}"
    reason = f"{joins}: the branch has no end"
    return Declined(site, Decline(reason, attention.node))


def _by_preference(queries: Atom, plain: AxisTracer, grid: tuple[int, int] | None) -> list[Atom]:
    """The tokens that may be reduced: of several streams that are attended to as one the images', then the longest."""
    pieces = [atom for atom, _ in plain.space.pieces(queries) if atom is not None and atom.size > 1]
    known = grid[0] * grid[1] if grid else 0
    return sorted(pieces, key=lambda atom: (atom.size != known, len(plain.space.factors(atom)) < 2, -atom.size))


def _attention_branch(
    site: Found, following: Sequence[Node], tokens: Atom, plain: AxisTracer, order: Mapping[Node, int]
) -> tuple[Node, Branch] | None:
    """The residual add of an attention among the nodes after it, and its branch; None where these tokens have none."""
    node = site.attention.node
    reached = {node}
    for user in following:
        inputs = tensor_inputs(user)
        if not any(value in reached for value in inputs):
            continue
        skips = [v for v in inputs if v not in reached and carries(v, tokens, plain)]
        if is_op(user, "add") and len(skips) == 1 and _same_rank(user, skips[0]):
            enter = _entry(_attended(site), skips[0], tokens, plain, order)
            if enter is not None:
                return user, _branch("attention", enter, node, tokens, plain, order)
        reached.add(user)
    return None


def _attended(site: Found) -> list[Node]:
    """The queries, keys and values of an attention."""
    attention = site.attention
    if attention.scores is None:
        return tensor_inputs(attention.node)[:3]
    return [attention.query, attention.key, *(v for v in tensor_inputs(attention.node) if v not in attention.after)]


def _next_branches(
    add: Node,
    tokens: Atom,
    run: Atom,
    plain: AxisTracer,
    order: Mapping[Node, int],
    kinds: Collection[str],
    others: Collection[Node],
) -> list[Branch]:
    """The branches after an attention's, up to the next attention over tokens, of the kinds that are wanted."""
    found: list[Branch] = []
    while True:
        meeting = _next_add(add, tokens, plain, order)
        if meeting is None:
            return found
        following, skip, end = meeting
        enter = _entry([end], skip, tokens, plain, order)
        if enter is None:
            return found
        branch = _branch("mlp", enter, end, tokens, plain, order)
        if any(node in others for node in branch.inside):
            return found
        if any(is_op(node, "scaled_dot_product_attention", "softmax") for node in branch.inside):
            branch = replace(branch, kind="cross")
        if branch.kind in kinds and run_of(enter, tokens, plain) == run:
            found.append(branch)
        add = following


def _branch(
    kind: Literal["attention", "mlp"],
    enter: Node,
    end: Node,
    tokens: Atom,
    plain: AxisTracer,
    order: Mapping[Node, int],
) -> Branch:
    ((dim, place),) = token_places(plain, enter, run_of(enter, tokens, plain))
    return Branch(kind, enter, _between(enter, end, order), dim, place)


def _next_add(
    start: Node, tokens: Atom, plain: AxisTracer, order: Mapping[Node, int]
) -> tuple[Node, Node, Node] | None:
    """The first residual add after a node of the residual stream: the add, the stream's operand, and the branch's.

    Between the two the stream may be normed (post-norm blocks), cast or copied.
    """
    stream, reached = {start}, {start}
    following, cut = descendants(start, order)
    for node in following:
        inputs = tensor_inputs(node)
        behind = [value for value in inputs if value in reached]
        if not behind:
            continue
        skips = [value for value in behind if value in stream]
        branch = [value for value in behind if value not in stream and carries(value, tokens, plain)]
        if is_op(node, "add") and len(skips) == len(branch) == 1 and _same_rank(node, branch[0]):
            return node, skips[0], branch[0]
        reached.add(node)
        if is_op(node, *_STREAM) and skips:
            stream.add(node)
    if cut:
        logger.debug("%s: no residual add follows%s", start, LOOKED_AT)
    return None


def _entry(
    tails: Sequence[Node], skip: Node, tokens: Atom, plain: AxisTracer, order: Mapping[Node, int]
) -> Node | None:
    """Where a branch is entered that starts at the residual stream ``skip`` and leads to all of ``tails``.

    None where the tails are not computed from the stream.
    """
    roots = _roots(skip, tokens, plain)
    seen, todo = set(tails), [(-order[node], node) for node in set(tails)]
    heapq.heapify(todo)
    narrow: list[Node] = []  # the nodes that all of the branch is computed from, the last one first
    products: list[Node] = []
    while todo:
        _, node = heapq.heappop(todo)
        if not todo:
            narrow.append(node)
        if node in roots:
            narrow.append(node)
            break
        if is_op(node, *_WORK):
            products.append(node)
        for value in tensor_inputs(node):
            if value not in seen and carries(value, tokens, plain):
                seen.add(value)
                heapq.heappush(todo, (-order[value], value))
    else:
        return None
    usable = [node for node in dict.fromkeys(narrow) if is_enterable(node, tokens, plain)]
    first = min((order[node] for node in products), default=len(order))
    ahead = [node for node in usable if order[node] < first]
    if ahead:
        return max(ahead, key=order.__getitem__)
    return min(usable, key=order.__getitem__) if usable else None


def _roots(skip: Node, tokens: Atom, plain: AxisTracer) -> set[Node]:
    """The stream, what it is a copy or a multiple of, and what branches beside were added to."""
    roots, origins = {skip}, [skip]
    while origins:
        node = origins.pop()
        sources = tensor_inputs(node) if is_op(node, "mul", "div", "add") else []
        if is_op(node, *COPIES):
            sources = tensor_inputs(node)[:1]
        if sources and len(roots) >= MOST_PARALLEL:
            logger.debug("%s: branches may start at %d nodes of the stream; this is one more", node, MOST_PARALLEL)
            continue
        for value in sources:
            if value not in roots and carries(value, tokens, plain):
                roots.add(value)
                origins.append(value)
    return roots


def _same_rank(node: Node, other: Node) -> bool:
    return bool(node.meta["val"].dim() == other.meta["val"].dim())


def _between(start: Node, end: Node, order: Mapping[Node, int]) -> frozenset[Node]:
    """The nodes on the ways from one node to another, with both ends."""
    back, todo = {end}, [end]
    while todo:
        for value in todo.pop().all_input_nodes:
            if value not in back and order[value] >= order[start]:
                back.add(value)
                todo.append(value)
    forward = {start}
    for node in sorted(back, key=order.__getitem__):
        if any(value in forward for value in node.all_input_nodes):
            forward.add(node)
    return frozenset(back & forward)
