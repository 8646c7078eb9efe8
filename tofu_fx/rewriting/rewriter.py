"""Writing the reduced graph: every node of the old graph again, at the version its tokens have by then.

The new graph is written from front to back, so a node that is needed at another version (rebased, restored, recomputed
on whole tokens) is simply appended where it is first needed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from tofu_fx.axes.atoms import Barrier, dim_size, hint, token_atoms
from tofu_fx.fx.nodes import argument, is_op, tensor_inputs
from tofu_fx.fx.op_families import SAME_VALUES
from tofu_fx.rewriting.context import Key, RewriteContext
from tofu_fx.rewriting.strides import as_traced
from tofu_fx.rewriting.weights import attention_bias, biased_attention, biased_scores, weighted

_SAME = SAME_VALUES | {"lift_fresh"}


@dataclass
class Rewriter:
    """Writes nodes: at the version of their inputs, or on whole tokens."""

    ctx: RewriteContext
    #: nodes that are the residual stream since its last reduction, with nothing but additions in between
    chain: set[Node] = field(default_factory=set)
    _row_wise: dict[Node, bool] = field(default_factory=dict)

    # ---- a node's value at a version -------------------------------------------------------------------------------

    def whole(self, node: Node, copied: bool = False) -> Any:
        """The node with all the tokens of the traced graph.

        At the residual stream this is a restore. What each token alone decides after it (the final norm, a head, its
        parts) is done again on the whole tokens; anything else, and what is to be ``copied`` because a branch ends
        there that saved this work, is a copy of each token's representative.
        """
        version = self.ctx.native.get(node, 0)
        if (node, 0) not in self.ctx.env:
            stream = self.ctx.stream_of(node)
            if stream is None or not isinstance(version, int):
                raise Barrier("scores between two streams cannot be made whole again")
            sources = self._reduced_inputs(node)
            if node in self.chain and not copied:
                value = self.ctx.env[node, version]
                self.ctx.env[node, 0] = stream.restore(
                    self.ctx.emit, value, self.ctx.layout(node), version, additive=True
                )
            elif isinstance(node.meta["val"], (tuple, list)) or (not copied and self._is_row_wise_of_chain(node)):
                self.ctx.env[node, 0] = self.ctx.copy(node, {value: self.whole(value, copied) for value in sources})
            else:
                value = self.ctx.env[node, version]
                self.ctx.env[node, 0] = stream.restore(
                    self.ctx.emit, value, self.ctx.layout(node), version, additive=False
                )
        return self.ctx.env[node, 0]

    def settle(self, border: Node) -> None:
        """Make whole, ahead of the border of an autocast region, what may be wanted whole after it.

        There it would be computed in another precision. What nobody wants is dead code.
        """
        ahead = list(itertools.takewhile(lambda node: node is not border, self.ctx.tracer.graph.nodes))
        seen = set(ahead)
        for node in ahead:
            redone = self.ctx.native.get(node, 0) and node not in self.chain and self._is_row_wise_of_chain(node)
            if redone and any(user not in seen for user in node.users):
                self.ctx.emit.origin = node
                self.whole(node)

    def _reduced_inputs(self, node: Node) -> list[Node]:
        return [value for value in tensor_inputs(node) if self.ctx.native.get(value, 0)]

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
        if node in self.ctx.tracer.attention_nodes or (is_op(node, "add") and len(sources) > 1):
            return False
        return all(len(token_atoms(part)) <= 1 for value in (node, *sources) for part in self.ctx.tracer.parts(value))

    # ---- writing a node --------------------------------------------------------------------------------------------

    def write(self, node: Node) -> None:
        """Append the node at the newest version of its inputs."""
        self.ctx.emit.origin = node
        carried = [
            value for value in tensor_inputs(node) if any(n in self.ctx.streams for n in self.ctx.numbers(value))
        ]
        if not any(self.ctx.native.get(value, 0) for value in carried):
            self.ctx.env[node, 0] = self.ctx.copy(node, {})
            return
        if is_op(node, "sym_size"):
            self.ctx.env[node, 0] = self._traced_size(node)
            return
        newest: dict[int, int] = {}
        for value in carried:
            for number, version in self.ctx.versions(value).items():
                newest[number] = max(newest.get(number, 0), version)
        mapping: dict[Any, Any] = {value: self.ctx.at(value, self.ctx.key(value, newest)) for value in carried}
        mapping.update(self.ctx.companions.rebased(node, newest, mapping))
        if node in self.ctx.tracer.pools:
            mapping[node.args[0]] = weighted(self.ctx, node, mapping[node.args[0]], newest)
        bias = attention_bias(self.ctx, node, mapping, newest)
        if bias is not None and is_op(node, "scaled_dot_product_attention"):
            new = biased_attention(self.ctx, node, mapping, bias)
        else:
            if bias is not None:
                mapping[node.args[0]] = biased_scores(self.ctx, node, mapping[node.args[0]], bias)
            new = self.ctx.copy(node, mapping)
        key = self.ctx.key(node, newest)
        self.ctx.env[node, key] = new
        if key:
            self.ctx.native[node] = key
            if self._continues_chain(node, key):
                self.chain.add(node)

    def _traced_size(self, node: Node) -> Any:
        """A size that the model itself asks for: of the token axis, what it was when traced."""
        source, dim = node.args[:2]
        assert isinstance(source, Node)
        assert isinstance(dim, int)
        if any(atom.is_token for atom in self.ctx.tracer.of(source)[dim]):
            return hint(node.meta["val"])
        return self.ctx.copy(node, {source: self.ctx.env[source, self.ctx.native.get(source, 0)]})

    def write_whole(self, node: Node) -> Any:
        """Append a barrier or the output on whole tokens."""
        self.ctx.emit.origin = node
        ends = node in self.ctx.tracer.ends
        mapping = {value: self.whole(value, copied=ends) for value in self._reduced_inputs(node)}
        if node.op == "output":
            return map_arg(node.args[0], lambda n: self._as_traced(n, self.ctx.mapped(n, mapping)))
        self.ctx.env[node, 0] = self.ctx.copy(node, mapping)
        return None

    def _as_traced(self, old: Node, new: Any) -> Any:
        was, now = old.meta.get("val"), new.meta.get("val") if isinstance(new, Node) else None
        if not isinstance(was, torch.Tensor) or not isinstance(now, torch.Tensor):
            return new
        return as_traced(self.ctx.emit, was, new)

    def _continues_chain(self, node: Node, version: Key) -> bool:
        """Whether a node is still the residual stream: an addition to it, or the same values."""
        inputs = self._reduced_inputs(node)
        chained = [value for value in inputs if value in self.chain and self.ctx.native[value] == version]
        if not chained or not isinstance(node.meta["val"], torch.Tensor) or self._form(chained[0]) != self._form(node):
            return False
        if is_op(node, "add"):
            return argument(node, "alpha", 1) == 1
        unchanged = is_op(node, "dropout") and (not argument(node, "train") or argument(node, "p") == 0)
        recast = is_op(node, "to") and node.meta["val"].dtype == inputs[0].meta["val"].dtype
        return is_op(node, *_SAME) or unchanged or recast

    def _form(self, node: Node) -> list[Any]:
        """Where a node has its tokens and samples. Features may be named after the stream or the branch added to it."""
        stream, axes = self.ctx.stream_of(node), self.ctx.tracer.of(node)
        assert stream is not None
        return [dim if any(atom.is_token or atom in stream.batch for atom in dim) else dim_size(dim) for dim in axes]
