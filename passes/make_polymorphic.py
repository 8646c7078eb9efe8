"""Recompute every literal that stands for a token count, so that the graph works for any count.

Before: ``%v = aten.view(%x[B, 197, C], [B, 197, H, D])``
After:  ``%n = aten.sym_size.int(%x, 1)``; ``%v = aten.view(%x, [B, %n, H, D])``

Which entry is a token count is known from the axes, never from its value. Inserts no reduction: the result has the same
bits. The sizes are asked of the node's own input, so whatever version of the stream that input has later, the literal
follows. They carry ``meta[LITERAL]`` and belong to the one node that uses them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tofu_fx.passes.giving_up import given_up
from torch.fx import Graph, Node

from tofu_fx.axes.atoms import Axes, Barrier, Dim, dim_size, hint, token_atoms
from tofu_fx.axes.tracer import AxisTracer, BarrierRecord
from tofu_fx.compilation import Scheduled
from tofu_fx.fx.nodes import LITERAL, argument, is_op, set_argument, tensor_inputs

_END = 2**63 - 1
_SHAPED = {"view": "size", "reshape": "shape", "_unsafe_view": "size", "unflatten": "sizes"}


def make_polymorphic(graph: Scheduled) -> Scheduled:
    """Rewrite the literals of every node that carries tokens; placeholders, outputs and barriers are untouched.

    What cannot be rewritten is a barrier that the axes did not foresee: it is added to those of the graph, and where
    whole tokens cannot serve it the sites of its streams are declined.
    """
    tracer, barriers = graph.axes, list(graph.barriers)
    known, sites = {barrier.node for barrier in barriers}, graph.sites
    for node in list(graph.gm.graph.nodes):
        # Where a stream starts the node itself still has all of its tokens.
        carried = any(tracer.tokens(value) for value in tensor_inputs(node))
        if node.op != "call_function" or node in known or not carried:
            continue
        graph.at.node = node
        try:
            _follow_tokens(tracer, node)
        except Barrier as barrier:
            values = tuple(value for value in tensor_inputs(node) if tracer.tokens(value))
            barriers.append(BarrierRecord(node, str(barrier), values))
            if tracer.is_fatal(node, values):
                sites = given_up(replace(graph, sites=sites), str(barrier))
    graph.gm.recompile()
    return replace(graph, sites=sites, barriers=tuple(barriers))


def _follow_tokens(tracer: AxisTracer, node: Node) -> None:
    """Recompute the literals of one node."""
    if is_op(node, *_SHAPED):
        _shape_literals(tracer, node)
    elif is_op(node, "expand"):
        sizes: Any = argument(node, "size")
        pairs = zip(tracer.of(node), sizes, strict=True)
        set_argument(node, "size", [-1 if _has(dim) else size for dim, size in pairs])
    elif is_op(node, "slice", "slice_scatter"):
        _slice_literals(tracer, node)
    elif is_op(node, "select"):
        _select_literal(tracer, node)
    elif is_op(node, "split_with_sizes"):
        _split_literals(tracer, node)


def _has(dim: Dim) -> bool:
    return any(atom.is_token for atom in dim)


def _maker(graph: Graph, node: Node) -> Callable[..., Any]:
    """A function that appends a size computation just ahead of ``node``."""

    def make(target: Any, *args: Any) -> Any:
        if not any(isinstance(arg, Node) for arg in args):
            return target(*args)
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
        new.meta = {"val": target(*values), LITERAL: True, "stack_trace": node.meta.get("stack_trace")}
        return new

    return make


def _shape_literals(tracer: AxisTracer, node: Node) -> None:
    name = _SHAPED[node.target._schema.name.split("::")[-1]]  # type: ignore[union-attr]
    entries = list(argument(node, name))
    out: Axes = tracer.of(node)
    if is_op(node, "unflatten"):
        first = int(argument(node, "dim")) % len(tracer.of(node.args[0]))
        out = out[first : first + len(entries)]
    for i, dim in enumerate(out):
        if _has(dim) and not (isinstance(entries[i], int) and entries[i] == -1):
            entries[i] = _token_count(tracer, node, dim)
            if isinstance(entries[i], int) and entries[i] == -1:
                _spell_out(entries, out, i)
    set_argument(node, name, entries)


def _spell_out(entries: list[Any], out: Axes, inferred: int) -> None:
    """One size can be inferred: that of tokens merged with a symbolic axis, so any other is written as a number."""
    for i, entry in enumerate(entries):
        if i != inferred and isinstance(entry, int) and entry == -1:
            if any(atom.is_token or atom.base.symbolic for atom in out[i]):
                raise Barrier("a view merges tokens with a symbolic axis and infers another")
            entries[i] = dim_size(out[i])


def _token_count(tracer: AxisTracer, node: Node, dim: Dim) -> Any:
    """The size of an output dim that holds tokens, from the sizes of the node's input; or -1: inferred."""
    source = tensor_inputs(node)[0]
    make = _maker(tracer.graph, node)
    axes = tracer.of(source)
    if dim in axes:
        return make(torch.ops.aten.sym_size.int, source, axes.index(dim))
    token = next(atom for atom in dim if atom.is_token)
    others = [atom for atom in dim if not atom.is_token]
    where = next(i for i, d in enumerate(axes) if token in d)
    beside = [atom for atom in axes[where] if not atom.is_token]
    if any(atom.base.symbolic for atom in (*others, *beside)):
        return -1
    count = make(torch.ops.aten.sym_size.int, source, where)
    divisor, factor = dim_size(tuple(beside)), math.prod(atom.size for atom in others)
    count = make(operator.floordiv, count, divisor) if divisor != 1 else count
    return make(operator.mul, count, factor) if factor != 1 else count


def _slice_literals(tracer: AxisTracer, node: Node) -> None:
    """``x[:, 1:197]`` -> ``x[:, 1:]``; an end among the suffix tokens counts from the end."""
    axes = tracer.of(node.args[0])
    dim = int(argument(node, "dim")) % len(axes)
    if not _has(axes[dim]):
        return
    atom = axes[dim][0]
    # Places that were counted from the end are counted from the front first: -16 of 17 tokens is after the first one.
    bounds = (argument(node, name) for name in ("start", "end"))
    start, stop, _ = slice(*(None if bound is None else hint(bound) for bound in bounds)).indices(atom.size)
    last = atom.size - atom.suffix
    # An empty slice starts after all that there are.
    set_argument(node, "start", _END if start >= atom.size else start if start <= atom.prefix else start - atom.size)
    set_argument(node, "end", _END if stop >= atom.size else stop if stop < last else stop - atom.size)


def _select_literal(tracer: AxisTracer, node: Node) -> None:
    """A prefix token is counted from the front, a suffix token from the end."""
    axes = tracer.of(node.args[0])
    atoms = token_atoms((axes[int(argument(node, "dim")) % len(axes)],))
    index = argument(node, "index")
    if atoms and isinstance(index, int):
        index %= atoms[0].size
        set_argument(node, "index", index - atoms[0].size if index >= atoms[0].size - atoms[0].suffix else index)


def _split_literals(tracer: AxisTracer, node: Node) -> None:
    """``split(x, [1, 196])`` -> ``split(x, [1, n - 1])``."""
    axes = tracer.of(node.args[0])
    dim = int(argument(node, "dim")) % len(axes)
    if not _has(axes[dim]):
        return
    sizes = list(argument(node, "split_sizes"))
    make = _maker(tracer.graph, node)
    count = make(torch.ops.aten.sym_size.int, node.args[0], dim)
    for i, part in enumerate(tracer.axes[node]):
        if _has(part[dim]):
            rest = sum(size for j, size in enumerate(sizes) if j != i)
            sizes[i] = make(operator.sub, count, rest)
    set_argument(node, "split_sizes", sizes)
