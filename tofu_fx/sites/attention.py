"""What attention looks like: the fused op, and products around a softmax in all their spellings.

    fused     scaled_dot_product_attention(q, k, v)
    written   softmax( between( q . k^T ) ) -> after -> . v      with matmul, bmm, baddbmm or einsum as the products

``between`` and ``after`` stand for any chain of the ops below: scale, masks, biases, dropout, casts, head mixing.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.fx import Node
from torch.fx.node import map_arg

from tofu_fx.axes.atoms import Atom, Axes, Base, Dim, hint
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.fx.nodes import argument, is_op, tensor_inputs
from tofu_fx.fx.op_families import COPIES, PRODUCTS, REGROUPINGS, SOFTMAX, TOKEN_NORMS, TURNS
from tofu_fx.sites.site import Attention, Decline

#: whole layers in one op: what nn.TransformerEncoder and nn.MultiheadAttention become in eval mode without gradients
OPAQUE = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
_BETWEEN = COPIES | REGROUPINGS | TURNS | {
    "mul", "div", "add", "sub", "rsub", "masked_fill", "where", "clamp", "tanh", "minimum", "maximum", "linear",
    "expand", "copy",
}  # fmt: skip
_PROJECTIONS = TOKEN_NORMS | {"linear", "batch_norm"}  # after them is another part of the block
#: ops between a softmax and its product that are followed; in 77 real models there were at most 9
MOST_BETWEEN = 24


def find_attentions(tracer: AxisTracer) -> Iterator[Attention]:
    """Every attention of a graph in order, whatever its tokens are (windows, channels, cross-attention too).

    ``tracer`` has walked the graph without streams.
    """
    for node in tracer.graph.nodes:
        if is_op(node, "scaled_dot_product_attention"):
            yield _fused(node)
        elif is_op(node, *OPAQUE):
            yield Attention(node, node.args[0], -2, -1, node.args[0], -2, -1)
        elif is_op(node, *SOFTMAX):
            found = _written(tracer, node)
            if found is not None:
                yield found


def find_comparisons(tracer: AxisTracer, attentions: Iterable[Attention]) -> Iterator[Attention]:
    """Products that compare tokens with tokens and belong to none of the attentions, as unrecognised ones."""
    known = {node for a in attentions for node in (a.node, a.scores, *a.way[:1])}
    for node in tracer.graph.nodes:
        if node in known or not is_op(node, *PRODUCTS - {"einsum"}):
            continue
        left, right = _operands(node)
        a, b = tracer.of(left), tracer.of(right)
        if min(len(a), len(b)) < 3 or left not in tracer.depends or right not in tracer.depends:
            continue
        rows, columns, summed = (tracer.space.flat(dim) for dim in (a[-2], b[-1], a[-1]))
        if rows is None or rows != columns or rows.base.kind != "plain" or summed is None:
            continue
        if summed.base.kind == "feature":
            follows = _first_unknown(node)
            op = _name(follows) if follows is not None else "what follows"
            reason = f"{op} after the product of queries and keys is none of the known ways to write attention"
            if follows is not None and _is_far(follows):
                reason = f"{op} is further from its products than the {MOST_BETWEEN} ops that are followed"
            yield Attention(node, left, -2, -1, right, -1, -2, unrecognised=Decline(reason, follows or node))


def _first_unknown(scores: Node) -> Node | None:
    """The first op on the way from a product that stands in no attention that is known."""
    todo, seen = deque([scores]), {scores}
    while todo:
        node = todo.popleft()
        if node is not scores and not is_op(node, *_BETWEEN):
            return node if node.op == "call_function" else None
        for user in node.users:
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return None


def _is_far(node: Node) -> bool:
    """Whether a node is a softmax from which a product was looked for as far as is followed."""
    return is_op(node, *SOFTMAX) and (_nearest(node.args[0], back=True).cut or _nearest(node, back=False).cut)  # type: ignore[arg-type]


def _name(node: Node) -> str:
    return str(node.target).removesuffix(".default")


def _fused(node: Node) -> Attention:
    query, key, mask = (argument(node, name) for name in ("query", "key", "attn_mask"))
    return Attention(node, query, -2, -1, key, -2, -1, mask=mask, causal=bool(argument(node, "is_causal")))


def _operands(product: Node) -> tuple[Node, Node]:
    left, right = product.args[1:3] if is_op(product, "baddbmm") else product.args[:2]
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    return left, right


def _written(tracer: AxisTracer, softmax: Node) -> Attention | None:
    scores = _nearest(softmax.args[0], back=True).product  # type: ignore[arg-type]
    value_product = _nearest(softmax, back=False).product
    if scores is None or value_product is None:
        return _unrecognised(softmax, scores, value_product)
    rank = softmax.meta["val"].dim()
    dim, way = int(argument(softmax, "dim")) % rank, _way(scores, softmax)
    sides = _sides(scores)
    if sides is None:  # an einsum that is no product of queries and keys: it mixes heads
        reason = f"{_name(scores)} ahead of the softmax is none of the known ways to write attention"
        return Attention(value_product, scores, -2, -1, scores, -1, -2, unrecognised=Decline(reason, scores))
    marks = _marks(scores)
    dims = tracer.along(way, marks)
    if dims is None:
        return None
    places = [_place_of(dims, marks[side.place]) for side in sides]
    if dim not in places:
        return None  # over neither of them
    query, key = (sides[1], sides[0]) if places[0] == dim else (sides[0], sides[1])
    queries = places[1] if places[0] == dim else places[0]
    after = _way(softmax, value_product)
    return _of(
        query,
        key,
        value_product,
        scores=scores,
        softmax=softmax,
        softmax_query_dim=-2 if queries is None else queries - rank,
        softmax_dim=dim - rank,
        way=way,
        after=after,
        unrecognised=_no_weights(tracer, scores, softmax, dim, after, value_product),
    )


class _Side(NamedTuple):
    """One operand of the product of queries and keys: its tokens are dim ``place`` of the scores."""

    operand: Node
    tokens: int
    features: int
    place: int


def _of(query: _Side, key: _Side, node: Node, **more: Any) -> Attention:
    return Attention(node, query.operand, query.tokens, query.features, key.operand, key.tokens, key.features, **more)


def _sides(scores: Node) -> tuple[_Side, _Side] | None:
    """The operands of the product whose tokens are the rows and the columns of the scores; None of another product."""
    if not is_op(scores, "einsum"):
        left, right = _operands(scores)
        rank = scores.meta["val"].dim()
        return _Side(left, -2, -1, rank - 2), _Side(right, -1, -2, rank - 1)
    equation, operands = str(scores.args[0]).replace(" ", ""), scores.args[1]
    if "..." in equation or "->" not in equation:
        return None
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    contracted = [c for c in terms[0] if c in terms[1] and c not in output]
    own = [[c for c in output if c in terms[i] and c not in terms[1 - i]] for i in (0, 1)]
    if len(contracted) != 1 or any(len(labels) != 1 for labels in own):
        return None
    first, second = (
        _Side(operands[i], terms[i].index(own[i][0]), terms[i].index(contracted[0]), output.index(own[i][0]))  # type: ignore[index, arg-type]
        for i in (0, 1)
    )
    return first, second


def _marks(node: Node) -> Axes:
    """Axes of their own for each dim of a tensor, so that it can be seen where they go."""
    sizes = [hint(size) for size in node.meta["val"].shape]
    return tuple((Atom(Base(f"mark{i}", size), 0, size),) if size != 1 else () for i, size in enumerate(sizes))


def _place_of(dims: Axes, mark: Dim) -> int | None:
    """The dim that a mark is all of; of a mark of size 1, which leaves no trace, none."""
    return dims.index(mark) if mark and mark in dims else None


def _no_weights(
    tracer: AxisTracer, scores: Node, softmax: Node, dim: int, after: Sequence[Node], product: Node
) -> Decline | None:
    """Why a softmax's result is not what values are weighted by; None where it is.

    It is if all that is done to it is to multiply it, and if the product sums over the softmax's axis.
    """
    made = {scores}  # all that is computed from the scores, ahead of the product
    for node in itertools.takewhile(lambda node: node is not product, tracer.graph.nodes):
        if any(value in made for value in node.all_input_nodes):
            made.add(node)
    for before, node in itertools.pairwise((*after, product)):
        reads = [value for value in _flat(node) if value in made]
        if reads != [before]:
            return Decline(f"{_name(node)} makes of the weights after the softmax more than a multiple of them", node)
        if is_op(node, "div") and node.args[0] is not before:
            return Decline(f"{_name(node)} divides by the weights after the softmax", node)
    marks = _marks(softmax)
    dims = tracer.along(after, marks)
    if marks[dim] and (dims is None or _summed(product, after[-1], dims) != marks[dim]):
        reason = "the product after the softmax does not sum over the axis that the softmax runs along"
        return Decline(f"{reason}: this is no attention", product)
    return None


def _flat(node: Node) -> list[Node]:
    """The nodes that an op reads, each as often as it does."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _summed(product: Node, weights: Node, dims: Axes) -> Dim | None:
    """The dim of the weights that a product sums over; None if there is not just one."""
    if not is_op(product, "einsum"):
        return dims[-1] if _operands(product)[0] is weights else dims[max(len(dims) - 2, 0)]
    equation, operands = str(product.args[0]).replace(" ", ""), list(product.args[1])  # type: ignore[arg-type]
    if "..." in equation or "->" not in equation:
        return None
    inputs, output = equation.split("->")
    term = inputs.split(",")[operands.index(weights)]
    summed = [place for place, label in enumerate(term) if label not in output]
    return dims[summed[0]] if len(summed) == 1 else None


def _unrecognised(softmax: Node, scores: Node | None, value_product: Node | None) -> Attention | None:
    """An attention with something else around its softmax (head mixing by a convolution, a sliding window)."""
    ahead = scores or _nearest(softmax.args[0], back=True, any_op=True).product  # type: ignore[arg-type]
    last = value_product or _nearest(softmax, back=False, any_op=True).product
    if ahead is None or last is None or not is_op(ahead, *PRODUCTS - {"baddbmm"}):
        return None
    sides = _sides(ahead)
    if sides is None:
        return None
    query, key = sides
    way = _way(ahead, softmax, any_op=True)[1:] if scores is None else _way(softmax, last, any_op=True)[1:]
    op = next(node for node in way if not is_op(node, *_BETWEEN))
    reason = f"{_name(op)} between the softmax and a product is none of the known ways to write attention"
    return _of(query, key, last, scores=ahead, unrecognised=Decline(reason, op))


def _way(start: Node, end: Node, any_op: bool = False) -> tuple[Node, ...]:
    """The nodes from ``start`` to the input through which ``end`` reads it, by the shortest way back."""
    came: dict[Node, Node] = {}
    todo = deque([end])
    while todo and start not in came:
        node = todo.popleft()
        for value in tensor_inputs(node) if any_op or node is end or is_op(node, *_BETWEEN) else ():
            if value not in came:
                came[value] = node
                todo.append(value)
    way = [start]
    while came[way[-1]] is not end:
        way.append(came[way[-1]])
    return tuple(way)


class _Nearest(NamedTuple):
    """The nearest product, and whether ops that were not followed may lead to one."""

    product: Node | None
    cut: bool = False


def _nearest(start: Node, back: bool, any_op: bool = False) -> _Nearest:
    """The nearest product reached through the ops that may stand between it and the softmax."""
    todo, seen, cut = deque([(start, 0)]), {start}, False
    while todo:
        node, far = todo.popleft()
        if (is_op(node, *PRODUCTS) and node is not start) or (back and is_op(node, *PRODUCTS)):
            return _Nearest(node)
        known = is_op(node, *_BETWEEN) or (any_op and not is_op(node, *_PROJECTIONS))
        cut |= far > MOST_BETWEEN and known
        if far > MOST_BETWEEN or not (known or (node is start and not back)):
            continue
        for other in tensor_inputs(node) if back else node.users:
            if other not in seen:
                seen.add(other)
                todo.append((other, far + 1))
    return _Nearest(None, cut)
