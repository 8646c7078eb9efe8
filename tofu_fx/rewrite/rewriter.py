"""Writing the reduced graph: every node of the old graph again, at the version its tokens have by then.

The new graph is written from front to back, so a node that is needed at another version (rebased, restored, recomputed
on whole tokens) is simply appended where it is first needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from tofu_fx.axes.atoms import Axes, Barrier, dim_size, hint, token_atoms, token_dim
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.compilation import Compilation
from tofu_fx.fx.nodes import LITERAL, argument, is_op, tensor_inputs
from tofu_fx.fx.op_families import SAME_VALUES
from tofu_fx.plan.options import Match
from tofu_fx.plan.sketch import folds
from tofu_fx.rewrite.companions import Companions
from tofu_fx.rewrite.layout import Count, Emitter, Layout
from tofu_fx.rewrite.similarity import Metric, batch_of
from tofu_fx.rewrite.strides import as_traced
from tofu_fx.rewrite.versions import SHUFFLE, Stream, Version
from tofu_fx.rewrite.weights import attention_bias, biased_attention, biased_scores, weighted
from tofu_fx.sites.site import Branch, Rehearsed, Site

#: The version of a node: 0 with the tokens that were traced. A node of two streams (text that reads an image) is at a
#: version of each: (number of the stream, its version) for both.
Key = int | tuple[tuple[int, int], ...]

_SAME = SAME_VALUES | {"lift_fresh"}


@dataclass
class Rewriter:
    """The old graph's axes, the new graph's nodes, and the streams' versions in between."""

    compilation: Compilation
    emit: Emitter
    streams: dict[int, Stream] = field(default_factory=dict)
    #: (old node, version) -> new node or number; nodes without tokens stand at version 0
    env: dict[tuple[Node, Any], Any] = field(default_factory=dict)
    #: the version at which a node of tokens was computed
    native: dict[Node, Key] = field(default_factory=dict)
    #: nodes that are the residual stream since its last reduction, with nothing but additions in between
    chain: set[Node] = field(default_factory=set)
    #: site id -> the reduction of its branch, which other branches may share
    matches: dict[str, Version] = field(default_factory=dict)
    _row_wise: dict[Node, bool] = field(default_factory=dict)

    @property
    def tracer(self) -> AxisTracer:
        """The old graph's axes."""
        return self.compilation.traced

    @cached_property
    def companions(self) -> Companions:
        """What follows the streams without being part of them."""
        return Companions(self.tracer, self.emit, self.streams, self.env)

    def stream_of(self, node: Node) -> Stream | None:
        """The stream that a node carries, once that stream has been reduced; else None."""
        atoms = self.tracer.tokens(node)
        return self.streams.get(atoms[0].base.stream) if atoms else None

    def numbers(self, node: Node) -> list[int]:
        """The numbers of the streams whose tokens a node carries: several in attention from one to another."""
        return sorted({atom.base.stream for atom in self.tracer.tokens(node)})

    def versions(self, node: Node) -> dict[int, int]:
        """The version at which a node was computed, of each stream whose tokens it carries."""
        native, numbers = self.native.get(node, 0), self.numbers(node)
        return dict.fromkeys(numbers, native) if isinstance(native, int) else dict(native)

    def key(self, node: Node, newest: Mapping[int, int]) -> Key:
        """The version of a node whose streams are at those of ``newest``."""
        versions = [(number, newest.get(number, 0)) for number in self.numbers(node)]
        if len(versions) > 1:
            return tuple(versions) if any(version for _, version in versions) else 0
        return versions[0][1] if versions else 0

    def layout(self, node: Node, dim: int | None = None) -> Layout:
        """Where a node's tokens, batch and features are."""
        axes: Axes = self.tracer.of(node)
        stream = self.stream_of(node)
        assert stream is not None
        return Layout(axes, token_dim(axes) if dim is None else dim, stream.batch)

    # ---- a node's value at a version -------------------------------------------------------------------------------

    def at(self, node: Node, version: Key) -> Any:
        """The node at a version that is not older than its own: rebased by the same merges, step by step."""
        if (node, version) not in self.env:
            if not isinstance(version, int):
                raise Barrier("attention between two streams of which one is reduced meanwhile")
            stream = self.stream_of(node)
            assert stream is not None
            previous = self.at(node, version - 1)
            self.env[node, version] = stream.rebase(self.emit, previous, self.layout(node), version)
        return self.env[node, version]

    def ahead(self, node: Node) -> Any:
        """The node on whole tokens, ahead of its place in the graph: the keys of a branch that is to be entered."""
        if (node, 0) not in self.env:
            for value in node.all_input_nodes:
                if not value.meta.get(LITERAL):
                    self.ahead(value)
            self.env[node, 0] = self.copy(node, {})
        return self.env[node, 0]

    def whole(self, node: Node, copied: bool = False) -> Any:
        """The node with all the tokens of the traced graph.

        At the residual stream this is a restore. What each token alone decides after it (the final norm, a head, its
        parts) is done again on the whole tokens; anything else, and what is to be ``copied`` because a branch ends
        there that saved this work, is a copy of each token's representative.
        """
        version = self.native.get(node, 0)
        if (node, 0) not in self.env:
            stream = self.stream_of(node)
            if stream is None or not isinstance(version, int):
                raise Barrier("scores between two streams cannot be made whole again")
            sources = self._reduced_inputs(node)
            if node in self.chain and not copied:
                value = self.env[node, version]
                self.env[node, 0] = stream.restore(self.emit, value, self.layout(node), version, additive=True)
            elif isinstance(node.meta["val"], (tuple, list)) or (not copied and self._is_row_wise_of_chain(node)):
                self.env[node, 0] = self.copy(node, {value: self.whole(value, copied) for value in sources})
            else:
                value = self.env[node, version]
                self.env[node, 0] = stream.restore(self.emit, value, self.layout(node), version, additive=False)
        return self.env[node, 0]

    def settle(self, border: Node) -> None:
        """Make whole, ahead of the border of an autocast region, what may be wanted whole behind it.

        There it would be computed in another precision. What nobody wants is dead code.
        """
        ahead = list(itertools.takewhile(lambda node: node is not border, self.tracer.graph.nodes))
        seen = set(ahead)
        for node in ahead:
            redone = self.native.get(node, 0) and node not in self.chain and self._is_row_wise_of_chain(node)
            if redone and any(user not in seen for user in node.users):
                self.emit.origin = node
                self.whole(node)

    def _reduced_inputs(self, node: Node) -> list[Node]:
        return [value for value in tensor_inputs(node) if self.native.get(value, 0)]

    def _is_row_wise_of_chain(self, node: Node) -> bool:
        """Whether a node's value at each token follows from the residual stream at that token."""
        if node not in self._row_wise:
            sources = self._reduced_inputs(node)
            self._row_wise[node] = node in self.chain or (
                self._is_row_wise(node) and bool(sources) and all(self._is_row_wise_of_chain(v) for v in sources)
            )
        return self._row_wise[node]

    def _is_row_wise(self, node: Node) -> bool:
        """Whether an op lets no token see another.

        An op that carries one token axis from each input to the output maps position to position: had it mixed them,
        it would be a barrier, an attention, or hold the axis twice (the products of an unusual attention). Sums of two
        are left out: in a post-norm block that is the stream itself going on, and to do a whole MLP again for it would
        undo the reduction.
        """
        sources = self._reduced_inputs(node)
        if node in self.tracer.attention_nodes or (is_op(node, "add") and len(sources) > 1):
            return False
        return all(len(token_atoms(part)) <= 1 for value in (node, *sources) for part in self.tracer.parts(value))

    # ---- writing a node --------------------------------------------------------------------------------------------

    def write(self, node: Node) -> None:
        """Append the node at the newest version of its inputs."""
        self.emit.origin = node
        carried = [value for value in tensor_inputs(node) if any(n in self.streams for n in self.numbers(value))]
        if not any(self.native.get(value, 0) for value in carried):
            self.env[node, 0] = self.copy(node, {})
            return
        if is_op(node, "sym_size"):
            self.env[node, 0] = self._traced_size(node)
            return
        newest: dict[int, int] = {}
        for value in carried:
            for number, version in self.versions(value).items():
                newest[number] = max(newest.get(number, 0), version)
        mapping: dict[Any, Any] = {value: self.at(value, self.key(value, newest)) for value in carried}
        mapping.update(self.companions.rebased(node, newest))
        if node in self.tracer.pools:
            mapping[node.args[0]] = weighted(self, node, mapping[node.args[0]], newest)
        bias = attention_bias(self, node, mapping, newest)
        if bias is not None and is_op(node, "scaled_dot_product_attention"):
            new = biased_attention(self, node, mapping, bias)
        else:
            if bias is not None:
                mapping[node.args[0]] = biased_scores(self, node, mapping[node.args[0]], bias)
            new = self.copy(node, mapping)
        key = self.key(node, newest)
        self.env[node, key] = new
        if key:
            self.native[node] = key
            if self._continues_chain(node, key):
                self.chain.add(node)

    def number(self, node: Node) -> int:
        """The number of the stream whose tokens a node carries."""
        return self.tracer.tokens(node)[0].base.stream

    def _traced_size(self, node: Node) -> Any:
        """A size that the model itself asks for: of the token axis, what it was when traced."""
        source, dim = node.args[:2]
        assert isinstance(source, Node)
        assert isinstance(dim, int)
        if any(atom.is_token for atom in self.tracer.of(source)[dim]):
            return hint(node.meta["val"])
        return self.copy(node, {source: self.env[source, self.native.get(source, 0)]})

    def write_whole(self, node: Node) -> Any:
        """Append a barrier or the output on whole tokens."""
        self.emit.origin = node
        ends = node in self.tracer.ends
        mapping = {value: self.whole(value, copied=ends) for value in self._reduced_inputs(node)}
        if node.op == "output":
            return map_arg(node.args[0], lambda n: self._as_traced(n, self.mapped(n, mapping)))
        self.env[node, 0] = self.copy(node, mapping)
        return None

    def _as_traced(self, old: Node, new: Any) -> Any:
        was, now = old.meta.get("val"), new.meta.get("val") if isinstance(new, Node) else None
        if not isinstance(was, torch.Tensor) or not isinstance(now, torch.Tensor):
            return new
        return as_traced(self.emit, was, new)

    def copy(self, node: Node, mapping: dict[Node, Any]) -> Any:
        """Append a node again with some inputs replaced, the others whole."""
        return self.emit.copy(node, lambda n: self.mapped(n, mapping))

    def mapped(self, node: Node, mapping: dict[Node, Any]) -> Any:
        """An input of a node that is being written. Literals follow the input that they are the size of."""
        if node in mapping:
            return mapping[node]
        if node.meta.get(LITERAL):
            return self.emit.copy(node, lambda n: self.mapped(n, mapping))
        return self.env[node, 0]

    def _continues_chain(self, node: Node, version: Key) -> bool:
        """Whether a node is still the residual stream: an addition to it, or the same values."""
        inputs = self._reduced_inputs(node)
        chained = [value for value in inputs if value in self.chain and self.native[value] == version]
        if not chained or not isinstance(node.meta["val"], torch.Tensor) or self._form(chained[0]) != self._form(node):
            return False
        if is_op(node, "add"):
            return argument(node, "alpha", 1) == 1
        unchanged = is_op(node, "dropout") and (not argument(node, "train") or argument(node, "p") == 0)
        recast = is_op(node, "to") and node.meta["val"].dtype == inputs[0].meta["val"].dtype
        return is_op(node, *_SAME) or unchanged or recast

    def _form(self, node: Node) -> list[Any]:
        """Where a node has its tokens and samples. Features may be named after the stream or the branch added to it."""
        stream, axes = self.stream_of(node), self.tracer.of(node)
        assert stream is not None
        return [dim if any(atom.is_token or atom in stream.batch for atom in dim) else dim_size(dim) for dim in axes]

    # ---- reducing --------------------------------------------------------------------------------------------------

    def reduce(self, site: Site, count: Count, seed: int) -> None:
        """Append the fused node behind a site's residual add, which leaves ``count`` tokens to all later readers."""
        node = site.reduce_at
        assert node is not None
        self.emit.origin = node
        axes = self.tracer.of(node)
        run = token_atoms(axes)[0]
        if run.base.stream not in self.streams:
            self.streams[run.base.stream] = Stream(run, batch_of(self.tracer, site, axes))
            self.native[node] = 0
        stream, version = self.streams[run.base.stream], self.native.get(node, 0)
        if run != stream.run:
            raise Barrier("other tokens joined the stream between two reductions")
        if version != stream.newest:
            raise Barrier("the tokens are whole again ahead of it")
        layout = self.layout(node)
        step = self._fused(site, stream, node, layout, count, seed)
        self.env[node, version + 1] = layout.from_canonical(self.emit, step.merged, step.count)
        self.native[node] = version + 1
        self.chain.add(node)

    def _fused(self, site: Site, stream: Stream, node: Node, layout: Layout, count: Count, seed: int) -> Version:
        """Append the fused node of a site behind ``node``, at the stream's newest version."""
        version = stream.newest
        x = layout.to_canonical(self.emit, self.env[node, version], stream.count(self.emit, version, stream.run))
        # What keys there are belong to the attention; other branches compare what goes into them.
        own = node is site.reduce_at or site.match in ("features", "sketch")
        kind = site.match if own else "features"
        metric = Metric(self, site, stream, version, x).node(kind)
        rehearsed, others = self.compilation.rehearsed, {}
        if rehearsed is not None:
            others = self._other_metrics(site, stream, version, x)
        additive = node in self.chain
        strategy = SHUFFLE if self.compilation.shuffle else site.strategy
        step = stream.reduce(self.emit, x, metric, strategy, count, seed, additive, site.cells)
        if rehearsed is not None:
            fuse = step.merged.args[0]
            assert isinstance(fuse, Node)
            rehearsed.append(Rehearsed(site, fuse, {site.match: metric, **others}))
        return step

    def enter(self, site: Site, branch: Branch, count: Count, seed: int) -> None:
        """Append what makes the tokens of a branch fewer: the match of its site, or that of the site that it shares."""
        node = branch.enter
        self.emit.origin = node
        axes = self.tracer.of(node)
        run = token_atoms(axes)[0]
        stream = self.streams[run.base.stream] = Stream(run, batch_of(self.tracer, site, axes))
        owner, layout = (site.shares or site).id, self.layout(node)
        if self.compilation.options.reuse == "none" and self.compilation.rehearsed is None:
            owner = f"{owner} {branch.kind}"
        if owner in self.matches:
            stream.versions.append(self.matches[owner])
            self.env[node, 1] = stream.rebase(self.emit, self.env[node, 0], layout, 1)
        else:
            step = self._fused(site, stream, node, layout, count, seed)
            self.matches[owner] = step
            self.env[node, 1] = layout.from_canonical(self.emit, step.merged, step.count)
        self.native[node] = 1
        self.chain.add(node)

    def _other_metrics(self, site: Site, stream: Stream, version: int, x: Node) -> dict[str, Node]:
        """The metrics of a site beside its own, those that can be written."""
        found = {}
        for kind in get_args(Match):
            # On a stream, which has few tokens, matching is a small part of the time: nothing to sketch for.
            if kind != site.match and (kind != "sketch" or (site.placement == "branch" and folds(site.dim) > 1)):
                with suppress(Barrier):
                    found[kind] = Metric(self, site, stream, version, x).node(kind)
        return found

    def canonical(self, node: Node) -> Node:
        """A node of tokens, at the version at which it was computed, as ``[B, N, F]``."""
        version, stream, layout = self.native[node], self.stream_of(node), self.layout(node)
        assert stream is not None
        assert isinstance(version, int)
        return layout.to_canonical(self.emit, self.env[node, version], stream.count(self.emit, version, layout.atom))
