"""What a reduction compares tokens by: the attention's keys, one vector for each token, padding kept apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from tofu_fx.companions import scores_dims
from tofu_fx.layout import Layout, aten, shape_of
from tofu_fx.masks import HIDDEN
from tofu_fx.planning.site import Site
from tofu_fx.streams import Stream
from tofu_fx.tokens import Atom, Axes, Barrier, Dim, token_atoms
from tofu_fx.tracer import AxisTracer

if TYPE_CHECKING:
    from tofu_fx.rewriter import Rewriter


def batch_of(tracer: AxisTracer, site: Site, axes: Axes) -> tuple[Atom, ...]:
    """The batch atoms: those that the stream shares with the attention's keys, tokens aside."""
    key = tracer.of(site.attention.key)
    positions, keys = key[site.attention.key_tokens], {atom for dim in key for atom in dim}
    own = [atom for dim in axes for atom in dim if not atom.is_token]
    strange = [atom for atom in keys.difference(own, positions) if atom.base.kind == "plain"]
    missing = [atom for atom in own if atom.base.kind == "plain" and atom not in keys]
    if strange and missing:
        # An axis of the keys that the stream lacks may be its batch under another name: to take it for heads would
        # match all samples as one.
        raise Barrier("the batch of the keys cannot be lined up with the stream's")
    return tuple(atom for atom in own if atom in keys)


@dataclass(frozen=True)
class Metric:
    """The metric of one site, at the version that its stream has there."""

    rewriter: Rewriter
    site: Site
    stream: Stream
    version: int

    def node(self) -> Node:
        """Append the attention's keys averaged over the heads, ``[B, N, D]``; with padding, ``[B, N, D + 1]``."""
        site, stream, version, rewriter = self.site, self.stream, self.version, self.rewriter
        key = site.attention.key
        axes = list(rewriter.tracer.of(key))
        place, feature = (d % len(axes) for d in (site.attention.key_tokens, site.attention.key_features))
        node = rewriter.env[key, rewriter.native.get(key, 0)]
        if not token_atoms((axes[place],)):
            axes[place] = (stream.run,)  # the stream's first site: its keys were made before the stream starts
        run = axes[place][0]
        if rewriter.native.get(key, 0) != version:
            raise Barrier("the keys are not of the tokens that are reduced")
        if any(len(dim) > 1 and i not in (place, feature) for i, dim in enumerate(axes)):  # bmm: [B*H, N, D]
            apart = [[d] if i in (place, feature) else [(atom,) for atom in d] for i, d in enumerate(axes)]
            place, feature = (sum(map(len, apart[:i])) for i in (place, feature))
            axes = [dim for dims in apart for dim in dims]
            node = rewriter.emit.call(
                aten.reshape.default, node, shape_of(rewriter.emit, axes, stream.count(rewriter.emit, version, run))
            )
        heads = [i for i, d in enumerate(axes) if i not in (place, feature) and not any(a in stream.batch for a in d)]
        if heads:
            node = rewriter.emit.call(aten.mean.dim, node, heads)
            axes = [dim for i, dim in enumerate(axes) if i not in heads]
            place -= sum(i < place for i in heads)
        layout = Layout(tuple(axes), place, stream.batch)
        node = layout.to_canonical(rewriter.emit, node, stream.count(rewriter.emit, version, run))
        if site.padding:
            node = rewriter.emit.call(torch.ops.tofu.separate.default, node, self._valid())
        return stream.trim(rewriter.emit, node, run)

    def _valid(self) -> Node:
        """Which of the keys are no padding, ``[B or 1, N, 1]`` bool, by all masks of a site together."""
        site, stream, version, rewriter = self.site, self.stream, self.version, self.rewriter
        valid: Node | None = None
        for mask in site.padding:
            fused = site.attention.softmax is None
            dims = scores_dims(rewriter.tracer, mask.consumer) if fused else rewriter.tracer.of(mask.consumer)
            if rewriter.native.get(mask.value, 0):
                node = rewriter.at(mask.value, version)
            else:
                rebased = (
                    rewriter.companions.rebased(mask.consumer, {stream.run.base.stream: version}) if version else {}
                )
                node = rebased.get(mask.value, rewriter.env[mask.value, 0])
            if mask.kind == "bias":
                node = rewriter.emit.call(aten.gt.Scalar, node, HIDDEN)
            else:
                node = rewriter.emit.call((aten.ne if mask.kind == "keep" else aten.eq).Scalar, node, 0)
            node = self._over_keys(node, dims, (-1 if fused else site.attention.softmax_dim) % len(dims))
            valid = node if valid is None else rewriter.emit.call(aten.logical_and.default, valid, node)
        assert valid is not None
        return valid

    def _over_keys(self, node: Node, dims: tuple[Dim, ...], place: int) -> Node:
        """Flags over (a part of) ``dims`` -> ``[B or 1, N, 1]``: whether any query of any head has the flag."""
        while node.meta["val"].dim() < len(dims):
            node = self.rewriter.emit.call(aten.unsqueeze.default, node, 0)
        batch = [i for i, dim in enumerate(dims) if i != place and any(atom in self.stream.batch for atom in dim)]
        if any(atom not in self.stream.batch for i in batch for atom in dims[i]) or len(batch) > 1:
            raise Barrier("a padding mask whose batch is merged with the heads")
        for i in range(len(dims)):
            if i != place and i not in batch:
                node = self.rewriter.emit.call(aten.any.dim, node, i, True)
        count = self.rewriter.emit.call(aten.sym_size.int, node, place)
        return self.rewriter.emit.call(aten.reshape.default, node, [-1, count, 1])
