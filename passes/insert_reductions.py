"""Write the graph again with the planned reductions in it.

Before: ``%y = add(%x, %branch)``, ... 197 tokens in all that follows
After:  ``%y = add(%x, %branch)``; ``%z = tofu.fuse_tokens(%y, mean of keys over heads, sizes, r, strategy, 1, 0)``, and
        all that follows on fewer tokens: log(size) in later attentions, pooling weighted by size, tables and masks
        gathered, whole tokens restored at barriers and outputs.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from tofu_fx.compilation import Compilation
from tofu_fx.graphs import LITERAL, tensor_inputs
from tofu_fx.layout import Emitter
from tofu_fx.planning.site import Decline
from tofu_fx.rewriter import Rewriter
from tofu_fx.tokens import Barrier


def insert_reductions(compilation: Compilation) -> None:
    """Replace ``compilation.gm``; every node of the new graph has its fake value.

    A stream that turns out to meet something that cannot be served is given up, and the others are written again.
    """
    while compilation.reducing:
        try:
            compilation.gm = GraphModule(compilation.gm, _write(compilation))
            return
        except Barrier as barrier:
            _give_up(compilation, str(barrier))


def _write(compilation: Compilation) -> Graph:
    old, new = compilation.gm.graph, Graph()
    values = [node.meta.get("val") for node in old.find_nodes(op="placeholder")]
    fake_mode = next(v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor))
    rewriter = Rewriter(compilation, Emitter(new, fake_mode))
    reductions = {site.reduce_at: (number, site) for number, site in enumerate(compilation.reducing)}
    barriers = {barrier.node for barrier in compilation.barriers}
    for node in old.nodes:
        compilation.at = node
        if node.op in ("placeholder", "get_attr"):
            rewriter.env[node, 0] = new.node_copy(node)
            rewriter.env[node, 0].meta = dict(node.meta)
            if hasattr(node, "_dynamo_source"):
                rewriter.env[node, 0]._dynamo_source = node._dynamo_source
        elif node.op == "output":
            new.output(rewriter.write_whole(node))
        elif node in barriers:
            rewriter.write_whole(node)
        elif not node.meta.get(LITERAL):
            rewriter.write(node)
        if node in reductions:
            number, site = reductions[node]
            rewriter.reduce(site, seed=number)
    new.eliminate_dead_code()
    new.lint()
    return new


def _give_up(compilation: Compilation, reason: str) -> None:
    """Decline the sites of the streams that meet at the node where writing stopped."""
    at = compilation.at
    assert isinstance(at, Node)
    tracer = compilation.traced
    streams = {atom.base.stream for value in (at, *tensor_inputs(at)) for atom in tracer.tokens(value)}
    for site in compilation.reducing:
        if site.stream in streams or not streams:
            site.decline = Decline(reason, at)
