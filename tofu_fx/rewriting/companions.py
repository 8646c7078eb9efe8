"""Companions: what meets tokens without being part of their stream, and must follow it to its newest version.

Rotary and position tables, masks and relative biases are indexed by token: the rows (and columns) of the tokens that
survive are gathered, for each sample its own. Features of the same tokens from before the stream (a long skip) are
merged as the stream was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Dim, dim_size
from tofu_fx.axes.rules.pointwise import pointwise
from tofu_fx.axes.rules.table import find_rule
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.fx.nodes import argument, is_op, tensor_inputs
from tofu_fx.fx.op_families import ADDED_PRODUCTS, EXPANSIONS, MATRIX_PRODUCTS
from tofu_fx.rewriting.layout import Emitter, Layout, align, aten
from tofu_fx.rewriting.versions import Stream


@dataclass
class Companions:
    """Rebases the companions of a node; each is made once per version and shared by those who meet it."""

    tracer: AxisTracer
    emit: Emitter
    streams: dict[int, Stream]
    #: (old node, version) -> new node, the rewriter's
    env: dict[tuple[Node, Any], Any]
    _rebased: dict[Any, Node] = field(default_factory=dict)

    def rebased(self, node: Node, newest: dict[int, int], carried: Mapping[Node, Any]) -> dict[Node, Any]:
        """Operands indexed by token that are not part of the stream: tables, masks, biases, features from before it.

        ``carried`` are the operands that are, as they are there. Such a one may be indexed by token in another of its
        dims: what each query finds at each distance, by its product with a table.
        """
        mapping: dict[Node, Any] = {}
        for value in tensor_inputs(node):
            if not isinstance(value.meta["val"], torch.Tensor):
                continue
            dims = consumer_dims(self.tracer, node, value)
            places = self._places(value, dims, newest)
            if places:
                table = value in carried or _has_rows_of_pairs(node, value, places)
                old = carried.get(value, self.env.get((value, 0)))
                mapping[value] = self._gathered(value, old, dims, places, newest, table)
        return mapping

    def _places(self, value: Node, dims: tuple[Dim, ...], newest: dict[int, int]) -> list[int]:
        """The dims of an operand that are indexed by the tokens of what it meets."""
        own = self.tracer.of(value)
        ahead = len(dims) - len(own)
        return [
            i
            for i, dim in enumerate(dims)
            if i >= ahead
            and len(dim) == 1
            and dim[0].is_token
            and dim_size(own[i - ahead]) != 1
            and not any(atom.is_token and atom.base.stream in self.streams for atom in own[i - ahead])
            and dim[0].base.stream in self.streams
            and newest.get(dim[0].base.stream, 0) > 0
        ]

    def _gathered(
        self,
        value: Node,
        old: Any,
        dims: tuple[Dim, ...],
        places: list[int],
        newest: dict[int, int],
        is_table: bool,
    ) -> Any:
        # Queries and keys may be of two streams, each at a version of its own.
        streams = [self.streams[dims[place][0].base.stream] for place in places]
        versions = [newest[dims[place][0].base.stream] for place in places]
        key = (old, is_table, dims, *versions)
        if key not in self._rebased:
            table = old
            if not is_table and self._is_older_feature(value, dims, streams[0]):
                layout = Layout(dims, places[0], streams[0].batch)
                for step in range(1, versions[0] + 1):
                    table = streams[0].rebase(self.emit, table, layout, step)
            else:
                while table.meta["val"].dim() < len(dims):
                    table = self.emit.call(aten.unsqueeze.default, table, 0)
                for place, stream, version in zip(places, streams, versions, strict=True):
                    index = stream.kept(self.emit, version, dims[place][0])
                    index = align(self.emit, index, dims, place, stream.batch)
                    table = self._expanded(table, index, place)
                    table = self.emit.call(aten.gather.default, table, place, self._expanded(index, table, place))
            self._rebased[key] = table
        return self._rebased[key]

    def _expanded(self, node: Node, other: Node, place: int) -> Node:
        """A tensor broadcast to another in all dims but one. (take_along_dim would make a symbolic batch a number.)"""
        sizes: list[Any] = [-1] * node.meta["val"].dim()
        for d, (size, wanted) in enumerate(zip(node.meta["val"].shape, other.meta["val"].shape, strict=True)):
            if d != place and is_one(size) and not is_one(wanted):
                sizes[d] = self.emit.call(aten.sym_size.int, other, d)
        grows = any(isinstance(size, Node) or size != -1 for size in sizes)
        return self.emit.call(aten.expand.default, node, sizes) if grows else node

    def _is_older_feature(self, value: Node, dims: tuple[Dim, ...], stream: Stream) -> bool:
        """Features of the same tokens from before the stream (a long skip) are merged; tables and masks are gathered.

        A feature tensor depends on the input, is floating point and has the shape of what it meets, batch included. One
        vector expanded over all tokens (a class token beside each patch) has nothing to merge.
        """
        if is_op(value, *EXPANSIONS, "broadcast_to"):
            return False
        tensor = value.meta["val"]
        full = [dim_size(dim) for dim in self.tracer.of(value)] == [dim_size(dim) for dim in dims]
        single = sum(any(atom.is_token for atom in dim) for dim in dims) == 1
        batched = not stream.batch or any(atom in stream.batch for dim in self.tracer.of(value) for atom in dim)
        return value in self.tracer.depends and tensor.is_floating_point() and full and single and batched


def _has_rows_of_pairs(node: Node, value: Node, places: list[int]) -> bool:
    """Whether an operand of an einsum has a row for each token, along an axis of the result that only it has.

    That is a table of pairs (``bnid,bijd->bnij``), however it was made: not one vector of features for each token.
    """
    if not is_op(node, "einsum"):
        return False
    terms, out = str(node.args[0]).replace(" ", "").split("->")
    operands: Any = node.args[1]
    by_operand = dict(zip(operands, terms.split(","), strict=True))
    own = by_operand.pop(value)
    others = set("".join(by_operand.values()))
    tokens = {own[place] for place in places}
    return tokens <= others & set(out) and bool((set(own) & set(out)) - others - tokens)


def is_one(size: Any) -> bool:
    """Whether a size is 1 for sure; a symbolic one is not asked."""
    return isinstance(size, int) and size == 1


def consumer_dims(tracer: AxisTracer, node: Node, value: Node) -> tuple[Dim, ...]:
    """The dims, in a node's own terms, that an operand's dims are lined up with."""
    own: Axes = tracer.of(value)
    if is_op(node, "cat", "slice_scatter"):
        dim = int(argument(node, "dim")) % len(own)
        return tuple(own[i] if i == dim else d for i, d in enumerate(tracer.of(node)))
    if is_op(node, "stack"):
        out = list(tracer.of(node))
        del out[int(argument(node, "dim")) % len(out)]
        return tuple(out)
    if is_op(node, "scaled_dot_product_attention"):
        if value is not argument(node, "attn_mask"):
            return own
        return scores_dims(tracer, node)
    if is_op(node, *MATRIX_PRODUCTS) and len(own) > 2:
        return (*tracer.of(node)[:-2], *own[-2:])
    if is_op(node, "einsum"):
        return _einsum_dims(tracer, node, value)
    if is_op(node, *ADDED_PRODUCTS):
        return tracer.of(node) if value is node.args[0] else own
    return tracer.of(node) if find_rule(node.target) is pointwise else own


def scores_dims(tracer: AxisTracer, node: Node) -> tuple[Dim, ...]:
    """The dims of a fused attention's scores: batch and heads, queries, keys."""
    q, k = (tracer.of(argument(node, name)) for name in ("query", "key"))
    return (*tracer.of(node)[:-2], q[-2], k[-2])


def _einsum_dims(tracer: AxisTracer, node: Node, value: Node) -> tuple[Dim, ...]:
    """An operand's dims, where another operand's equal label carries tokens: that one's."""
    operands: Any = node.args[1]
    terms = str(node.args[0]).replace(" ", "").split("->")[0].split(",")
    tokens = {
        label: dim
        for term, operand in zip(terms, operands, strict=True)
        for label, dim in zip(term, tracer.of(operand), strict=True)
        if any(atom.is_token for atom in dim)
    }
    own = terms[operands.index(value)]
    return tuple(tokens.get(label, dim) for label, dim in zip(own, tracer.of(value), strict=True))
