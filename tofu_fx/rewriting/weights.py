"""What a token weighs that stands for several: in attentions log(size) of the keys, in poolings its size."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Barrier, token_atoms
from tofu_fx.fx.nodes import argument, is_op
from tofu_fx.fx.op_families import SOFTMAX
from tofu_fx.rewriting.companions import scores_dims
from tofu_fx.rewriting.context import RewriteContext
from tofu_fx.rewriting.layout import Emitter, align, aten
from tofu_fx.sites.masks import is_masked_by_itself, sides
from tofu_fx.sites.site import Declined


def weighted(context: RewriteContext, node: Node, value: Any, newest: dict[int, int]) -> Any:
    """The input of a pooling over tokens, weighted by size: sum(x) -> sum(size x), mean(x) -> sum(size x) / N.

    ``mean`` divides by the tokens there are, so its weights are size / mean size.
    """
    source = node.args[0]
    assert isinstance(source, Node)
    stream, layout = context.stream_of(source), context.layout(source)
    assert stream is not None
    version = newest[context.number(source)]
    sizes = stream.sizes_of(context.emit, version, layout.atom)
    weights = align(context.emit, sizes, layout.axes, layout.tokens, stream.batch)
    if context.tracer.pools[node] == "mean":
        # Sizes add up to the tokens there were, so their mean is what there were for each that there is.
        weights = context.emit.call(
            aten.div.Tensor, weights, context.emit.call(aten.mean.dim, weights, [layout.tokens], True)
        )
    weights = context.emit.call(aten.to.dtype, weights, value.meta["val"].dtype)
    return context.emit.call(aten.mul.Tensor, value, weights)


def attention_bias(context: RewriteContext, node: Node, mapping: dict[Any, Any], newest: dict[int, int]) -> Node | None:
    """Proportional attention: log(size) of the keys, shaped for the scores. None where it has no place."""
    if not context.proportional:
        return None
    if is_op(node, "scaled_dot_product_attention"):
        dims = scores_dims(context.tracer, node)
        place = len(dims) - 1
    elif node in context.tracer.attention_nodes and is_op(node, *SOFTMAX):
        dims = context.tracer.of(node)
        place = int(argument(node, "dim")) % len(dims)
    else:
        return None
    if not token_atoms((dims[place],)):
        return None
    run = dims[place][0]
    stream, version = context.streams.get(run.base.stream), newest.get(run.base.stream, 0)
    if stream is None or version == 0:
        return None
    if len(dims[place]) > 1:
        raise Barrier("the keys are tokens that are merged with another axis")
    first: Any = argument(node, "query") if is_op(node, "scaled_dot_product_attention") else node.args[0]
    dtype = context.mapped(first, mapping).meta["val"].dtype
    return align(context.emit, stream.log_size(context.emit, version, run, dtype), dims, place, stream.batch)


def biased_scores(context: RewriteContext, node: Node, scores: Node, bias: Node) -> Node:
    """The input of an attention's softmax with the bias added.

    A query that sees no key (padding, where masks are of pairs) has the lowest number there is at every key, so that it
    sees all alike; what is added to that is lost in rounding. The softmax sees differences only, so such scores are
    brought up to zero first.
    """
    if _hides(context, node):
        top = context.emit.call(aten.amax.default, scores, [int(argument(node, "dim"))], True)
        scores = context.emit.call(aten.sub.Tensor, scores, context.emit.call(aten.detach.default, top))
    return cast("Node", context.emit.call(aten.add.Tensor, scores, bias))


def biased_attention(context: RewriteContext, node: Node, mapping: dict[Node, Any], bias: Node) -> Any:
    """The fused op with the bias in its mask."""
    mask, emit = argument(node, "attn_mask"), context.emit
    query, key, value = (context.mapped(argument(node, name), mapping) for name in ("query", "key", "value"))
    if mask is not None:
        hides = _hides(context, node)
        mask = context.mapped(mask, mapping)
        if mask.meta["val"].dtype == torch.bool:
            bias = emit.call(aten.where.ScalarOther, mask, bias, float("-inf"))
        else:
            if hides:
                query, mask = _seeing(emit, query, mask)
            bias = emit.call(aten.add.Tensor, mask, bias)
    options = {name: argument(node, name) for name in ("dropout_p", "scale", "enable_gqa")}
    return emit.call(node.target, query, key, value, bias, options.pop("dropout_p"), False, **options)


def _seeing(emit: Emitter, query: Node, mask: Node) -> tuple[Node, Node]:
    """A query and a mask of numbers, where a query that sees no key sees all alike by other numbers.

    As in `biased_scores`. There the scores themselves are lost in rounding, so the query is made zero; where every key
    is at minus infinity nothing comes out, before as after.
    """
    info = torch.finfo(mask.meta["val"].dtype)
    lost = -16 / torch.finfo(torch.float64 if info.bits == 64 else torch.float32).eps
    top = emit.call(aten.detach.default, emit.call(aten.amax.default, mask, [-1], True))
    blind = emit.call(aten.lt.Scalar, top, lost)
    mask = emit.call(aten.sub.Tensor, mask, emit.call(aten.clamp_min.default, top, info.min))
    return emit.call(aten.where.ScalarSelf, blind, 0.0, query), mask


def _hides(context: RewriteContext, node: Node) -> bool:
    """Whether the masks of an attention may hide all keys from a query: for a site it was judged, else it may be."""
    for site in context.sites:
        if node in (site.attention.node, site.attention.softmax):
            may = isinstance(site, Declined) or site.padding or is_masked_by_itself(site.attention)
            return may and any(side.meta["val"].numel() != 1 for side in sides(site.attention))
    return True
