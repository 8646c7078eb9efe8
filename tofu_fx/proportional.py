"""What a token weighs that stands for several: in attentions log(size) of the keys, in poolings its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tofu_fx.companions import scores_dims
from tofu_fx.graphs import argument, is_op
from tofu_fx.layout import align, aten
from tofu_fx.tokens import token_atoms

if TYPE_CHECKING:
    from tofu_fx.rewriter import Rewriter


def weighted(rewriter: Rewriter, node: Node, value: Any, newest: dict[int, int]) -> Any:
    """The input of a pooling over tokens, weighted by size: sum(x) -> sum(size x), mean(x) -> sum(size x) / N.

    ``mean`` divides by the tokens there are, so its weights are size / mean size.
    """
    source = node.args[0]
    assert isinstance(source, Node)
    stream, layout = rewriter.stream_of(source), rewriter.layout(source)
    assert stream is not None
    version = newest[rewriter.number(source)]
    sizes = stream.sizes_of(rewriter.emit, version, layout.atom)
    weights = align(rewriter.emit, sizes, layout.axes, layout.tokens, stream.batch)
    if rewriter.tracer.pools[node] == "mean":
        # Sizes add up to the tokens there were, so their mean is what there were for each that there is.
        weights = rewriter.emit.call(
            aten.div.Tensor, weights, rewriter.emit.call(aten.mean.dim, weights, [layout.tokens], True)
        )
    weights = rewriter.emit.call(aten.to.dtype, weights, value.meta["val"].dtype)
    return rewriter.emit.call(aten.mul.Tensor, value, weights)


def attention_bias(rewriter: Rewriter, node: Node, mapping: dict[Any, Any], newest: dict[int, int]) -> Node | None:
    """Proportional attention: log(size) of the keys, shaped for the scores. None where it has no place."""
    if rewriter.compilation.options.proportional_attention is False:
        return None
    if is_op(node, "scaled_dot_product_attention"):
        dims = scores_dims(rewriter.tracer, node)
        place = len(dims) - 1
    elif node in rewriter.tracer.attention_nodes and is_op(node, "softmax", "_softmax"):
        dims = rewriter.tracer.of(node)
        place = int(argument(node, "dim")) % len(dims)
    else:
        return None
    if not token_atoms((dims[place],)):
        return None
    run = dims[place][0]
    stream, version = rewriter.streams.get(run.base.stream), newest.get(run.base.stream, 0)
    if stream is None or version == 0:
        return None
    first: Any = argument(node, "query") if is_op(node, "scaled_dot_product_attention") else node.args[0]
    dtype = rewriter.mapped(first, mapping).meta["val"].dtype
    return align(rewriter.emit, stream.log_size(rewriter.emit, version, run, dtype), dims, place, stream.batch)


def biased_attention(rewriter: Rewriter, node: Node, mapping: dict[Node, Any], bias: Node) -> Any:
    """The fused op with the bias in its mask."""
    mask = argument(node, "attn_mask")
    if mask is not None:
        mask = rewriter.mapped(mask, mapping)
        if mask.meta["val"].dtype == torch.bool:
            bias = rewriter.emit.call(aten.where.ScalarOther, mask, bias, float("-inf"))
        else:
            bias = rewriter.emit.call(aten.add.Tensor, mask, bias)
    args = [rewriter.mapped(argument(node, name), mapping) for name in ("query", "key", "value")]
    options = {name: argument(node, name) for name in ("dropout_p", "scale", "enable_gqa")}
    return rewriter.emit.call(node.target, *args, bias, options.pop("dropout_p"), False, **options)
