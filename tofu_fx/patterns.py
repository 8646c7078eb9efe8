"""What attention looks like: the fused op, and products around a softmax in all their spellings.

    fused     scaled_dot_product_attention(q, k, v)
    written   softmax( between( q . k^T ) ) -> after -> . v      with matmul, bmm, baddbmm or einsum as the products

``between`` and ``after`` stand for any chain of the ops below: scale, masks, biases, dropout, casts, head mixing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch.fx import Graph, Node

from tofu_fx.graphs import argument, is_op, tensor_inputs
from tofu_fx.planning.site import Attention

#: whole layers in one op: what nn.TransformerEncoder and nn.MultiheadAttention become in eval mode without gradients
OPAQUE = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_BETWEEN = tuple(
    "mul div add sub rsub masked_fill where to _to_copy type_as contiguous clone dropout clamp tanh alias detach "  # noqa: SIM905
    "minimum maximum permute transpose linear expand "
    "view reshape flatten unflatten _unsafe_view unsqueeze squeeze copy".split()
)
_PROJECTIONS = ("linear", "layer_norm", "rms_norm", "batch_norm")  # behind them is another part of the block
_FAR = 24  # ops between a product and its softmax; in 77 real models there were at most 9


def find_attentions(graph: Graph) -> Iterator[Attention]:
    """Every attention of a graph in order, whatever its tokens are (windows, channels, cross-attention too)."""
    for node in graph.nodes:
        if is_op(node, "scaled_dot_product_attention"):
            yield _fused(node)
        elif is_op(node, *OPAQUE):
            yield Attention(node, node.args[0], -2, -1, node.args[0], -2, -1)
        elif is_op(node, "softmax", "_softmax"):
            found = _written(node)
            if found is not None:
                yield found


def _fused(node: Node) -> Attention:
    query, key, mask = (argument(node, name) for name in ("query", "key", "attn_mask"))
    return Attention(node, query, -2, -1, key, -2, -1, mask=mask, causal=bool(argument(node, "is_causal")))


def _written(softmax: Node) -> Attention | None:
    scores = _nearest(softmax.args[0], back=True)  # type: ignore[arg-type]
    value_product = _nearest(softmax, back=False)
    if scores is None or value_product is None:
        return _strange(softmax, scores, value_product)
    rank = softmax.meta["val"].dim()
    dim = int(argument(softmax, "dim")) % rank
    if dim not in (rank - 1, rank - 2):
        return None
    if is_op(scores, "einsum"):
        return _from_einsum(scores, softmax, dim, value_product)
    left, right = scores.args[1:3] if is_op(scores, "baddbmm") else scores.args[:2]
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    ways = _way(scores, softmax), _way(softmax, value_product)
    if dim == rank - 1:  # q [.., L, E] @ k^T [.., E, S]
        return Attention(value_product, left, -2, -1, right, -1, -2, scores, softmax, -2, -1, *ways)
    return Attention(value_product, right, -1, -2, left, -2, -1, scores, softmax, -1, -2, *ways)


def _strange(softmax: Node, scores: Node | None, value_product: Node | None) -> Attention | None:
    """An attention with something else around its softmax (head mixing by a convolution, a sliding window)."""
    ahead = scores or _nearest(softmax.args[0], back=True, any_op=True)  # type: ignore[arg-type]
    behind = value_product or _nearest(softmax, back=False, any_op=True)
    if ahead is None or behind is None or not is_op(ahead, "matmul", "bmm", "einsum"):
        return None
    operands = ahead.args[1] if is_op(ahead, "einsum") else ahead.args[:2]
    query, key = operands[0], operands[-1]  # type: ignore[index]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    way = _way(ahead, softmax, any_op=True)[1:] if scores is None else _way(softmax, behind, any_op=True)[1:]
    strange = next(node for node in way if not is_op(node, *_BETWEEN))
    return Attention(behind, query, -2, -1, key, -2, -1, strange=strange)


def _from_einsum(scores: Node, softmax: Node, dim: int, value_product: Node) -> Attention | None:
    equation, operands = scores.args[0], scores.args[1]
    if "..." in str(equation) or "->" not in str(equation):
        return None
    inputs, output = str(equation).replace(" ", "").split("->")
    terms = inputs.split(",")
    if len(terms) != 2 or len(output) != softmax.meta["val"].dim():
        return None
    label = output[dim]
    contracted = [c for c in terms[0] if c in terms[1] and c not in output]
    keys = [i for i, term in enumerate(terms) if label in term]
    if len(keys) != 1 or len(contracted) != 1:
        return None
    key, query = keys[0], 1 - keys[0]
    queries = [c for c in output if c in terms[query] and c not in terms[key]]
    if len(queries) != 1:
        return None
    return Attention(
        value_product,
        operands[query],  # type: ignore[index, arg-type]
        terms[query].index(queries[0]),
        terms[query].index(contracted[0]),
        operands[key],  # type: ignore[index, arg-type]
        terms[key].index(label),
        terms[key].index(contracted[0]),
        scores,
        softmax,
        output.index(queries[0]) - len(output),
        dim - len(output),
        _way(scores, softmax),
        _way(softmax, value_product),
    )


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


def _nearest(start: Node, back: bool, any_op: bool = False) -> Node | None:
    """The nearest product reached through the ops that may stand between it and the softmax."""
    todo, seen = deque([(start, 0)]), {start}
    while todo:
        node, far = todo.popleft()
        if (is_op(node, *PRODUCTS) and node is not start) or (back and is_op(node, *PRODUCTS)):
            return node
        known = is_op(node, *_BETWEEN) or (any_op and not is_op(node, *_PROJECTIONS))
        if far > _FAR or not (known or (node is start and not back)):
            continue
        for other in tensor_inputs(node) if back else node.users:
            if other not in seen:
                seen.add(other)
                todo.append((other, far + 1))
    return None
