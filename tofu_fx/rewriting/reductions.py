"""Writing what makes tokens fewer: the operator of a site, on its residual stream or at the entry of a branch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from tofu_fx.axes.atoms import Barrier, token_atoms
from tofu_fx.plan.words import grouping_of
from tofu_fx.rewriting.layout import Count, Layout
from tofu_fx.rewriting.reducer import Reducer, Step
from tofu_fx.rewriting.rewriter import Rewriter
from tofu_fx.rewriting.similarity import Similarity, batch_of
from tofu_fx.rewriting.versions import Stream, Version
from tofu_fx.sites.site import Branch, Planned


@dataclass
class Reductions:
    """Writes the reductions of a graph; ``apart`` gives each branch of a block a match of its own."""

    rewriter: Rewriter
    reducer: Reducer
    apart: bool = False
    #: site id -> the reduction of its branch, which other branches may share
    matches: dict[str, Version] = field(default_factory=dict)

    def reduce(self, site: Planned, count: Count, seed: int) -> None:
        """Append the fused node after a site's residual add, which leaves ``count`` tokens to all later readers."""
        node, context = site.reduce_at, self.rewriter.ctx
        context.emit.origin = node
        axes = context.tracer.of(node)
        run = token_atoms(axes)[0]
        if run.base.stream not in context.streams:
            context.streams[run.base.stream] = Stream(run, batch_of(context.tracer, site, axes))
            context.native[node] = 0
        stream, version = context.streams[run.base.stream], context.native.get(node, 0)
        if run != stream.run:
            raise Barrier("other tokens joined the stream between two reductions")
        if version != stream.newest:
            raise Barrier("the tokens are whole again ahead of it")
        layout = context.layout(node)
        step = self._fused(site, stream, node, layout, count, seed)
        context.env[node, version + 1] = layout.from_canonical(context.emit, step.merged, step.count)
        context.native[node] = version + 1
        self.rewriter.chain.add(node)

    def enter(self, site: Planned, branch: Branch, count: Count, seed: int) -> None:
        """Append what makes the tokens of a branch fewer: the match of its site, or that of the site that it shares."""
        node, context = branch.enter, self.rewriter.ctx
        context.emit.origin = node
        axes = context.tracer.of(node)
        run = token_atoms(axes)[0]
        stream = context.streams[run.base.stream] = Stream(run, batch_of(context.tracer, site, axes))
        owner, layout = site.shares or site.id, context.layout(node)
        if self.apart:
            owner = f"{owner} {branch.kind}"
        if owner in self.matches:
            stream.versions.append(self.matches[owner])
            context.env[node, 1] = stream.rebase(context.emit, context.env[node, 0], layout, 1)
        else:
            step = self._fused(site, stream, node, layout, count, seed)
            self.matches[owner] = step
            context.env[node, 1] = layout.from_canonical(context.emit, step.merged, step.count)
        context.native[node] = 1
        self.rewriter.chain.add(node)

    def _fused(self, site: Planned, stream: Stream, node: Node, layout: Layout, count: Count, seed: int) -> Version:
        """Append the fused node of a site after ``node``, at the stream's newest version."""
        context, version = self.rewriter.ctx, stream.newest
        emit, run = context.emit, stream.run
        x = layout.to_canonical(emit, context.env[node, version], stream.count(emit, version, run))
        # What keys there are belong to the attention; other branches compare what goes into them.
        own = node is site.reduce_at or site.match in ("features", "sketch")
        similarity = Similarity(context, site, stream, version, x)
        kind = site.match if own else "features"
        match, grouping = similarity.node(kind), grouping_of(kind)

        def write(size: Node, gone: Count) -> Node:
            return self.reducer.fuse(emit, Step(site, run, x, match, size, gone, seed, similarity.node, grouping))

        additive = node in self.rewriter.chain
        return stream.reduce(emit, x, write, self.reducer.strategy(site), count, additive)
