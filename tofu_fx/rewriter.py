"""Writing the reduced graph: every node of the old graph again, at the version its tokens have by then.

The new graph is written from front to back, so a node that is needed at another version (rebased, restored, recomputed
on whole tokens) is simply appended where it is first needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from tofu_fx.compilation import Compilation
from tofu_fx.graphs import LITERAL, argument, is_op, tensor_inputs
from tofu_fx.layout import Emitter, Layout, align, aten
from tofu_fx.planning.site import Site
from tofu_fx.streams import Stream
from tofu_fx.tokens import Atom, Axes, Barrier, Dim, dim_size, hint, token_atoms, token_dim

_SAME = ("contiguous", "clone", "alias", "detach", "lift_fresh")
_ROW_WISE = [
    "layer_norm",
    "rms_norm",
    "linear",
    "to",
    "_to_copy",
    "type_as",
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "gelu",
    "silu",
    "relu",
    "tanh",
    "sigmoid",
    "mul",
    "div",
    "add",
    "sub",
    "neg",
    "unsqueeze",
    "squeeze",
]


@dataclass
class Rewriter:
    """The old graph's axes, the new graph's nodes, and the streams' versions in between."""

    compilation: Compilation
    emit: Emitter
    streams: dict[int, Stream] = field(default_factory=dict)
    #: (old node, version) -> new node or number; nodes without tokens stand at version 0
    env: dict[tuple[Node, int], Any] = field(default_factory=dict)
    #: the version at which a node of tokens was computed
    native: dict[Node, int] = field(default_factory=dict)
    #: nodes that are the residual stream since its last reduction, with nothing but additions in between
    chain: set[Node] = field(default_factory=set)
    _companions: dict[Any, Node] = field(default_factory=dict)

    @property
    def tracer(self) -> Any:
        """The old graph's axes."""
        return self.compilation.traced

    def stream_of(self, node: Node) -> Stream | None:
        """The stream that a node carries, once that stream has been reduced; else None."""
        atoms = self.tracer.tokens(node)
        return self.streams.get(atoms[0].base.stream) if atoms else None

    def layout(self, node: Node, dim: int | None = None) -> Layout:
        """Where a node's tokens, batch and features are."""
        axes: Axes = self.tracer.of(node)
        stream = self.stream_of(node)
        assert stream is not None
        return Layout(axes, token_dim(axes) if dim is None else dim, stream.batch)

    # ---- a node's value at a version -------------------------------------------------------------------------------

    def at(self, node: Node, version: int) -> Any:
        """The node at a version that is not older than its own: rebased by the same merges, step by step."""
        if (node, version) not in self.env:
            stream = self.stream_of(node)
            assert stream is not None
            previous = self.at(node, version - 1)
            self.env[node, version] = stream.rebase(self.emit, previous, self.layout(node), version)
        return self.env[node, version]

    def whole(self, node: Node) -> Any:
        """The node with all the tokens of the traced graph.

        At the residual stream this is a restore. Row-wise ops after it (the final norm, a head) are done again on the
        whole tokens; anything else is a copy of each token's representative.
        """
        version = self.native.get(node, 0)
        if (node, 0) not in self.env:
            stream = self.stream_of(node)
            assert stream is not None
            if node in self.chain:
                value = self.env[node, version]
                self.env[node, 0] = stream.restore(self.emit, value, self.layout(node), version, additive=True)
            elif self._leads_to_chain(node):
                mapping = {value: self.whole(value) for value in tensor_inputs(node) if self.native.get(value, 0)}
                self.env[node, 0] = self._copy(node, mapping)
            else:
                value = self.env[node, version]
                self.env[node, 0] = stream.restore(self.emit, value, self.layout(node), version, additive=False)
        return self.env[node, 0]

    def _leads_to_chain(self, node: Node) -> bool:
        """Whether only row-wise ops lie between a node and the residual stream."""
        while node not in self.chain:
            sources = [value for value in tensor_inputs(node) if self.native.get(value, 0)]
            if not is_op(node, *_ROW_WISE) or len(sources) != 1:
                return False
            node = sources[0]
        return True

    # ---- writing a node --------------------------------------------------------------------------------------------

    def write(self, node: Node) -> None:
        """Append the node at the newest version of its inputs."""
        self.emit.origin = node
        carried = [value for value in tensor_inputs(node) if self.stream_of(value) is not None]
        if not any(self.native.get(value, 0) for value in carried):
            self.env[node, 0] = self._copy(node, {})
            return
        if is_op(node, "sym_size"):
            self.env[node, 0] = self._traced_size(node)
            return
        newest: dict[int, int] = {}
        for value in carried:
            number = self._number(value)
            newest[number] = max(newest.get(number, 0), self.native.get(value, 0))
        mapping: dict[Any, Any] = {value: self.at(value, newest[self._number(value)]) for value in carried}
        mapping.update(self._rebased_companions(node, newest))
        if node in self.tracer.pools:
            mapping[node.args[0]] = self._weighted(node, mapping[node.args[0]], newest)
        self._propose_bias(node, mapping, newest)
        new = self._copy(node, mapping)
        version = newest[self._number(node)] if self.tracer.tokens(node) else 0
        self.env[node, version] = new
        if version:
            self.native[node] = version
            if self._continues_chain(node, version):
                self.chain.add(node)

    def _number(self, node: Node) -> int:
        return self.tracer.tokens(node)[0].base.stream

    def _traced_size(self, node: Node) -> Any:
        """A size that the model itself asks for: of the token axis, what it was when traced."""
        source, dim = node.args[:2]
        assert isinstance(source, Node)
        assert isinstance(dim, int)
        if any(atom.is_token for atom in self.tracer.of(source)[dim]):
            return hint(node.meta["val"])
        return self._copy(node, {source: self.env[source, self.native.get(source, 0)]})

    def write_whole(self, node: Node) -> Any:
        """Append a barrier or the output on whole tokens."""
        self.emit.origin = node
        mapping = {value: self.whole(value) for value in tensor_inputs(node) if self.native.get(value, 0)}
        if node.op == "output":
            return map_arg(node.args[0], lambda n: self._mapped(n, mapping))
        self.env[node, 0] = self._copy(node, mapping)
        return None

    def _copy(self, node: Node, mapping: dict[Node, Any]) -> Any:
        if is_op(node, "scaled_dot_product_attention") and "attn_mask" in mapping:
            mapping = dict(mapping)
            return self._attention_with_mask(node, mapping)
        return self.emit.copy(node, lambda n: self._mapped(n, mapping))

    def _mapped(self, node: Node, mapping: dict[Node, Any]) -> Any:
        """An input of a node that is being written. Literals follow the input that they are the size of."""
        if node in mapping:
            return mapping[node]
        if node.meta.get(LITERAL):
            return self.emit.copy(node, lambda n: self._mapped(n, mapping))
        return self.env[node, 0]

    def _continues_chain(self, node: Node, version: int) -> bool:
        """Whether a node is still the residual stream: an addition to it, or the same values."""
        inputs = [value for value in tensor_inputs(node) if self.native.get(value, 0)]
        chained = [value for value in inputs if value in self.chain and self.native[value] == version]
        if not chained or self.tracer.of(chained[0]) != self.tracer.of(node):
            return False
        if is_op(node, "add"):
            return argument(node, "alpha", 1) == 1
        unchanged = is_op(node, "dropout") and (not argument(node, "train") or argument(node, "p") == 0)
        recast = is_op(node, "to") and node.meta["val"].dtype == inputs[0].meta["val"].dtype
        return is_op(node, *_SAME) or unchanged or recast

    # ---- what meets tokens -----------------------------------------------------------------------------------------

    def _rebased_companions(self, node: Node, newest: dict[int, int]) -> dict[Node, Any]:
        """Operands indexed by token that are not part of the stream: tables, masks, biases, features from before it."""
        mapping: dict[Node, Any] = {}
        for value in tensor_inputs(node):
            if self.stream_of(value) is not None or not isinstance(value.meta["val"], torch.Tensor):
                continue
            dims = consumer_dims(self.tracer, node, value)
            places = self._places(value, dims)
            if places:
                version = newest[dims[places[0]][0].base.stream]
                mapping[value] = self._gathered(value, dims, places, version)
        return mapping

    def _places(self, value: Node, dims: tuple[Dim, ...]) -> list[int]:
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
            and dim[0].base.stream in self.streams
        ]

    def _gathered(self, value: Node, dims: tuple[Dim, ...], places: list[int], version: int) -> Any:
        stream = self.streams[dims[places[0]][0].base.stream]
        key = (value, dims, version)
        if key not in self._companions:
            if self._is_older_feature(value, dims, stream):
                table = self.env[value, 0]
                layout = Layout(dims, places[0], stream.batch)
                for step in range(1, version + 1):
                    table = stream.rebase(self.emit, table, layout, step)
            else:
                table = self.env[value, 0]
                while table.meta["val"].dim() < len(dims):
                    table = self.emit.call(aten.unsqueeze.default, table, 0)
                for place in places:
                    index = stream.kept(self.emit, version, dims[place][0])
                    index = align(self.emit, index, dims, place, stream.batch)
                    table = self.emit.call(aten.take_along_dim.default, table, index, place)
            self._companions[key] = table
        return self._companions[key]

    def _is_older_feature(self, value: Node, dims: tuple[Dim, ...], stream: Stream) -> bool:
        """Features of the same tokens from before the stream (a long skip) are merged; tables and masks are gathered.

        A feature tensor depends on the input, is floating point and has the shape of what it meets, batch included.
        """
        tensor = value.meta["val"]
        full = [dim_size(dim) for dim in self.tracer.of(value)] == [dim_size(dim) for dim in dims]
        single = sum(any(atom.is_token for atom in dim) for dim in dims) == 1
        batched = not stream.batch or any(atom in stream.batch for dim in self.tracer.of(value) for atom in dim)
        return value in self.tracer.depends and tensor.is_floating_point() and full and single and batched

    def _weighted(self, node: Node, value: Any, newest: dict[int, int]) -> Any:
        """The input of a pooling over tokens, weighted by size: sum(x) -> sum(size x), mean(x) -> sum(size x) / N.

        ``mean`` divides by the tokens there are, so its weights are size * there are / there were.
        """
        source = node.args[0]
        assert isinstance(source, Node)
        stream, layout = self.stream_of(source), self.layout(source)
        assert stream is not None
        version = newest[self._number(source)]
        sizes = stream.sizes_of(self.emit, version, layout.atom)
        weights = align(self.emit, sizes, layout.axes, layout.tokens, stream.batch)
        if self.tracer.pools[node] == "mean":
            weights = self.emit.call(aten.mul.Tensor, weights, stream.count(version, layout.atom) / layout.atom.size)
        weights = self.emit.call(aten.to.dtype, weights, value.meta["val"].dtype)
        return self.emit.call(aten.mul.Tensor, value, weights)

    def _propose_bias(self, node: Node, mapping: dict[Any, Any], newest: dict[int, int]) -> None:
        """Proportional attention: log(size) joins the mask of the fused op, or the input of the written-out softmax."""
        if self.compilation.options.proportional_attention is False:
            return
        if is_op(node, "scaled_dot_product_attention"):
            dims = scores_dims(self.tracer, node)
            place = len(dims) - 1
        elif node in self.tracer.attention_nodes and is_op(node, "softmax", "_softmax"):
            dims = self.tracer.of(node)
            place = int(argument(node, "dim")) % len(dims)
        else:
            return
        if not token_atoms((dims[place],)):
            return
        run = dims[place][0]
        stream, version = self.streams.get(run.base.stream), newest.get(run.base.stream, 0)
        if stream is None or version == 0:
            return
        first = argument(node, "query") if is_op(node, "scaled_dot_product_attention") else node.args[0]
        dtype = mapping.get(first, self.env.get((first, 0))).meta["val"].dtype  # type: ignore[union-attr]
        bias = align(self.emit, stream.log_size(self.emit, version, run, dtype), dims, place, stream.batch)
        if is_op(node, "scaled_dot_product_attention"):
            mapping["attn_mask"] = bias
        else:
            mapping[first] = self.emit.call(aten.add.Tensor, mapping[first], bias)

    def _attention_with_mask(self, node: Node, mapping: dict[Any, Any]) -> Any:
        bias = mapping.pop("attn_mask")
        mask = argument(node, "attn_mask")
        if mask is not None:
            mask = self._mapped(mask, mapping)
            if mask.meta["val"].dtype == torch.bool:
                bias = self.emit.call(aten.where.ScalarOther, mask, bias, float("-inf"))
            else:
                bias = self.emit.call(aten.add.Tensor, mask, bias)
        args = [self._mapped(argument(node, name), mapping) for name in ("query", "key", "value")]
        options = {name: argument(node, name) for name in ("dropout_p", "scale", "enable_gqa")}
        return self.emit.call(node.target, *args, bias, options.pop("dropout_p"), False, **options)

    # ---- reducing --------------------------------------------------------------------------------------------------

    def reduce(self, site: Site, seed: int) -> None:
        """Append the fused node behind a site's residual add; later readers of the add see the new version."""
        node = site.reduce_at
        assert node is not None
        self.emit.origin = node
        axes = self.tracer.of(node)
        run = token_atoms(axes)[0]
        if run.base.stream not in self.streams:
            self.streams[run.base.stream] = Stream(run, self._batch(site, axes))
            self.native[node] = 0
        stream, version = self.streams[run.base.stream], self.native[node]
        if run != stream.run:
            raise Barrier("other tokens joined the stream between two reductions")
        layout = self.layout(node)
        x = layout.to_canonical(self.emit, self.env[node, version], stream.count(version, run))
        metric = self._metric(site, stream, version)
        step = stream.reduce(self.emit, x, metric, site.strategy, site.r, seed, additive=node in self.chain)
        self.env[node, version + 1] = layout.from_canonical(self.emit, step.merged, step.count)
        self.native[node] = version + 1
        self.chain.add(node)

    def _batch(self, site: Site, axes: Axes) -> tuple[Atom, ...]:
        """The batch atoms: those that the stream shares with the attention's keys, tokens aside."""
        keys = {atom for dim in self.tracer.of(site.attention.key) for atom in dim}
        return tuple(atom for dim in axes for atom in dim if atom in keys and not atom.is_token)

    def _metric(self, site: Site, stream: Stream, version: int) -> Node:
        """The matching metric: the attention's keys, averaged over the heads, ``[B, N, D]``."""
        key = site.attention.key
        axes = list(self.tracer.of(key))
        place, feature = (d % len(axes) for d in (site.attention.key_tokens, site.attention.key_features))
        node = self.env[key, self.native.get(key, 0)]
        if not token_atoms((axes[place],)):
            axes[place] = (stream.run,)  # the stream's first site: its keys were made before the stream starts
        run = axes[place][0]
        if self.native.get(key, 0) != version:
            raise Barrier("the keys are not of the tokens that are reduced")
        heads = [i for i, d in enumerate(axes) if i not in (place, feature) and not any(a in stream.batch for a in d)]
        if heads:
            node = self.emit.call(aten.mean.dim, node, heads)
            axes = [dim for i, dim in enumerate(axes) if i not in heads]
            place -= sum(i < place for i in heads)
        layout = Layout(tuple(axes), place, stream.batch)
        node = layout.to_canonical(self.emit, node, stream.count(version, run))
        return stream.trim(self.emit, node, run)


def consumer_dims(tracer: Any, node: Node, value: Node) -> tuple[Dim, ...]:
    """The dims, in a node's own terms, that an operand's dims are lined up with."""
    own: Axes = tracer.of(value)
    if is_op(node, "cat"):
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
    if is_op(node, "matmul", "bmm") and len(own) > 2:
        return (*tracer.of(node)[:-2], *own[-2:])
    if is_op(node, "baddbmm", "addmm"):
        return tracer.of(node) if value is node.args[0] else own
    elementwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_op(node, "prelu", "copy")
    return tracer.of(node) if elementwise else own


def scores_dims(tracer: Any, node: Node) -> tuple[Dim, ...]:
    """The dims of a fused attention's scores: batch and heads, queries, keys."""
    q, k = (tracer.of(argument(node, name)) for name in ("query", "key"))
    return (*tracer.of(node)[:-2], q[-2], k[-2])
