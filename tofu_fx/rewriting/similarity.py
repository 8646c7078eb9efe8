"""What a reduction compares tokens by: one vector for each token from its attention, padding kept apart."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from tofu_fx.axes.atoms import Atom, Axes, Barrier, Dim, token_atoms
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.errors import PlanError
from tofu_fx.fx.nodes import is_op, tensor_inputs
from tofu_fx.plan.sketch import folds
from tofu_fx.plan.words import RANK
from tofu_fx.rewriting.companions import is_one, scores_dims
from tofu_fx.rewriting.context import RewriteContext
from tofu_fx.rewriting.layout import Layout, aten, shape_of
from tofu_fx.rewriting.versions import Stream
from tofu_fx.sites.mask_values import FAR_BELOW
from tofu_fx.sites.site import Planned


def batch_of(tracer: AxisTracer, site: Planned, axes: Axes) -> tuple[Atom, ...]:
    """The batch atoms: those that the stream shares with the attention's keys, tokens aside."""
    key = tracer.of(site.attention.key)
    positions, keys = key[site.attention.key_tokens], {atom for dim in key for atom in dim}
    own = [atom for dim in axes for atom in dim if not atom.is_token]
    foreign = [atom for atom in keys.difference(own, positions) if atom.base.kind == "plain"]
    missing = [atom for atom in own if atom.base.kind == "plain" and atom not in keys]
    if foreign and missing:
        # An axis of the keys that the stream lacks may be its batch under another name: to take it for heads would
        # match all samples as one.
        raise Barrier("the batch of the keys cannot be lined up with the stream's")
    return tuple(atom for atom in own if atom in keys and atom.base.kind != "feature")


@dataclass(frozen=True)
class Similarity:
    """What one site compares tokens by, at the version that its stream has there."""

    context: RewriteContext
    site: Planned
    stream: Stream
    version: int
    #: the tokens themselves, ``[B, N, C]``
    x: Node

    def node(self, kind: str) -> Node:
        """Append what tokens are compared by, ``[B, N, M]``; with padding, ``[B, N, M + 1]``.

        Args:
            kind: "keys" (averaged over the heads: the paper's), "heads" (the keys of all heads side by side),
                "queries_keys" (the queries of all heads besides), "features" (the tokens of the stream, each less
                the mean of its channels, as a layer norm without weights), "sketch" (the features, folded), or
                "fisher" (the tokens of the stream, projected by the site's own matrix).
        """
        attention = self.site.attention
        if kind == "fisher":
            return self._apart(self._projected(), distance=True)
        if kind in ("features", "sketch"):
            return self._apart(self._folded(self._features()) if kind == "sketch" else self._features())
        emit, stream = self.context.emit, self.stream
        node, run = self._vectors(attention.key, attention.key_tokens, attention.key_features, kind == "keys")
        node = stream.trim(emit, node, run)
        if kind == "queries_keys":
            query = (attention.query, attention.query_tokens, attention.query_features)
            queries, other = self._vectors(*query, mean_heads=False)
            node = emit.call(aten.cat.default, [stream.trim(emit, queries, other), node], 2)
        return self._apart(node)

    def _features(self) -> Node:
        return self.context.emit.call(aten.layer_norm.default, self.x, [self.x.meta["val"].shape[2]])

    def _projected(self) -> Node:
        emit, value = self.context.emit, self.x.meta["val"]
        matrix, features = self.site.projection, value.shape[2]
        if matrix is None:  # calibration puts its own in their places
            with unset_fake_temporarily():
                matrix = torch.zeros(features, min(RANK, features))
        if matrix.shape[0] != features:
            raise PlanError(
                f"the plan is of another model: at {self.site.id} its projection is for tokens of {matrix.shape[0]} "
                f"features, the graph's have {features}"
            )
        with unset_fake_temporarily():
            constant = matrix.to(value.device, value.dtype)
        return emit.call(aten.matmul.default, self.x, emit.constant(constant))

    def _folded(self, node: Node) -> Node:
        """Runs of neighbouring channels summed with alternating signs: `folds` says how many each, 1 leaves them alone.

        The hashes of this count sketch are the places of the channels: these have no order of their own, and a fixed
        one gives the same matches on every run.
        """
        emit, fold = self.context.emit, folds(node.meta["val"].shape[2])
        if fold == 1:
            return node
        runs = emit.call(aten.unfold.default, node, 2, fold, fold)
        even, odd = (
            emit.call(aten.sum.dim_IntList, emit.call(aten.slice.Tensor, runs, 3, start, fold, 2), [3])
            for start in (0, 1)
        )
        return emit.call(aten.sub.Tensor, even, odd)

    def _apart(self, node: Node, distance: bool = False) -> Node:
        """Vectors of the stream's tokens with padding, if there may be any, kept apart from the rest."""
        if not self.site.padding:
            return node
        emit = self.context.emit
        valid = self.stream.trim(emit, self._valid(), self._keys_run())
        return emit.call(torch.ops.tofu.separate.default, node, valid, *([True] if distance else []))

    def _keys_run(self) -> Atom:
        """The run of tokens that the keys are of: the stream's, where they were made before the stream starts."""
        attention = self.site.attention
        axes = self.context.tracer.of(attention.key)
        atoms = token_atoms((axes[attention.key_tokens % len(axes)],))
        return atoms[0] if atoms else self._first_run(attention.key, attention.key_tokens)

    def _first_run(self, source: Node, place: int) -> Atom:
        """The run of keys or queries from before the stream starts: its own, and null tokens at the ends."""
        tracer, attention, run = self.context.tracer, self.site.attention, self.stream.run
        own = tracer.space.flat(tracer.of(attention.query)[attention.query_tokens])
        other = tracer.space.flat(tracer.of(source)[place])
        if own is None or other is None or own.base is not other.base:
            return run
        return Atom(run.base, run.offset + other.offset - own.offset, other.size)

    def _vectors(self, source: Node, place: int, feature: int, mean_heads: bool) -> tuple[Node, Atom]:
        """Queries or keys as ``[B, N, M]``, and the run of tokens that they are of."""
        stream, version, context = self.stream, self.version, self.context
        axes = list(context.tracer.of(source))
        place, feature = (d % len(axes) for d in (place, feature))
        now = context.native.get(source, 0)
        node = context.env[source, now] if now else context.ahead(source)
        if not token_atoms((axes[place],)):
            axes[place] = (self._first_run(source, place),)
        run = axes[place][0]
        if len(token_atoms(tuple(axes))) > 1:
            raise Barrier("the keys carry the tokens of another stream, too")
        if context.native.get(source, 0) != version:
            raise Barrier("the keys are not of the tokens that are reduced")
        if any(len(dim) > 1 and i not in (place, feature) for i, dim in enumerate(axes)):  # bmm: [B*H, N, D]
            apart = [[d] if i in (place, feature) else [(atom,) for atom in d] for i, d in enumerate(axes)]
            place, feature = (sum(map(len, apart[:i])) for i in (place, feature))
            axes = [dim for dims in apart for dim in dims]
            node = context.emit.call(
                aten.reshape.default, node, shape_of(context.emit, axes, stream.count(context.emit, version, run))
            )
        heads = [i for i, d in enumerate(axes) if i not in (place, feature) and not any(a in stream.batch for a in d)]
        if heads and mean_heads:
            node = context.emit.call(aten.mean.dim, node, heads)
            axes = [dim for i, dim in enumerate(axes) if i not in heads]
            place -= sum(i < place for i in heads)
        layout = Layout(tuple(axes), place, stream.batch)
        return layout.to_canonical(context.emit, node, stream.count(context.emit, version, run)), run

    def _valid(self) -> Node:
        """Which of the keys are no padding, ``[B or 1, N, 1]`` bool: blank scores show it, as in ``Masks``."""
        attention, emit, tracer = self.site.attention, self.context.emit, self.context.tracer
        if attention.mask is not None:
            dims = scores_dims(tracer, attention.node)
            seen = self._aside(attention.node, attention.mask)
            while seen.meta["val"].dim() < len(dims):
                seen = emit.call(aten.unsqueeze.default, seen, 0)
            return self._over_keys(self._visible(seen, dims), dims, len(dims) - 1)
        way, after = attention.way, attention.after
        dims, place = tracer.of(way[-1]), attention.softmax_dim % len(tracer.of(way[-1]))
        version = self._reduced(way[0])
        # Only their shape is read: what compiles the graph drops the product, if it is made for that alone.
        scores = self.context.env[way[0], version] if version else self.context.ahead(way[0])
        blank = emit.call(aten.zeros_like.default, scores)
        if is_op(way[0], "baddbmm"):
            blank = emit.call(aten.add.Tensor, blank, self._aside(way[0], tensor_inputs(way[0])[0]))
        seen = self._visible(self._along(way, blank), dims)
        if any(value not in after for node in after[1:] for value in tensor_inputs(node)):
            left = self._along(after, emit.call(aten.ones_like.default, scores))
            seen = emit.call(aten.logical_and.default, seen, emit.call(aten.ne.Scalar, left, 0))
        return self._over_keys(seen, dims, place)

    def _aside(self, consumer: Node, value: Node) -> Node:
        """An operand that joins the scores, at the version of the keys."""
        context, newest = self.context, {self.stream.run.base.stream: self.version}
        known = {value: context.at(value, self.version)} if self._reduced(value) else {}
        if self.version:
            known.update(context.companions.rebased(consumer, newest, known))
        return known[value] if value in known else context.ahead(value)

    def _reduced(self, value: Node) -> Any:
        """The version at which a node of this stream was computed; 0 of another stream's, which is whole for this one.

        The keys of an attention branch are reduced by then, where the MLP of its block compares tokens for itself.
        """
        same = self.stream.run.base.stream in self.context.numbers(value)
        return self.context.native.get(value, 0) if same else 0

    def _along(self, way: tuple[Node, ...], value: Node) -> Node:
        """Append the ops of a way again, for another tensor at its start."""
        for before, node in itertools.pairwise(way):
            mapping = {other: self._aside(node, other) for other in tensor_inputs(node) if other is not before}
            value = self.context.copy(node, {**mapping, before: value})
        return value

    def _visible(self, logits: Node, dims: tuple[Dim, ...]) -> Node:
        emit, batch = self.context.emit, self.stream.batch
        if logits.meta["val"].dtype == torch.bool:
            return logits
        inner = [i for i, dim in enumerate(dims) if not any(atom in batch for atom in dim)]
        top = emit.call(aten.amax.default, logits, inner, True)
        return emit.call(aten.gt.Scalar, emit.call(aten.sub.Tensor, logits, top), -FAR_BELOW)

    def _over_keys(self, node: Node, dims: tuple[Dim, ...], place: int) -> Node:
        """Flags over (a part of) ``dims`` -> ``[B or 1, N, 1]``: whether any query of any head has the flag."""
        emit, batch = self.context.emit, self.stream.batch
        mixed = [i for i, dim in enumerate(dims) if any(a in batch for a in dim) and any(a not in batch for a in dim)]
        if any(not is_one(node.meta["val"].shape[i]) for i in mixed):
            count = emit.call(aten.sym_size.int, node, place)
            apart = [[(atom,) for atom in dim] if i in mixed else [dim] for i, dim in enumerate(dims)]
            place, dims = sum(map(len, apart[:place])), tuple(dim for part in apart for dim in part)
            node = emit.call(aten.reshape.default, node, shape_of(emit, dims, count))
        found = [i for i, dim in enumerate(dims) if i != place and any(atom in batch for atom in dim)]
        if len(found) > 1:
            raise Barrier("a padding mask over several batch axes")
        for i in range(len(dims)):
            if i != place and i not in found:
                node = emit.call(aten.any.dim, node, i, True)
        count = emit.call(aten.sym_size.int, node, place)
        if found and found[0] > place:
            node = emit.call(aten.transpose.int, node, found[0], place)
        return emit.call(aten.reshape.default, node, [-1, count, 1])
