"""What is known while a graph is written again: old nodes at their versions, the streams, and the new graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.fx import Node

from tofu_fx.axes.atoms import Axes, Barrier, token_dim
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.fx.nodes import LITERAL
from tofu_fx.rewriting.companions import Companions
from tofu_fx.rewriting.layout import Emitter, Layout
from tofu_fx.rewriting.versions import Stream
from tofu_fx.sites.site import Site

#: The version of a node: 0 with the tokens that were traced. A node of two streams (text that reads an image) is at a
#: version of each: (number of the stream, its version) for both.
Key = int | tuple[tuple[int, int], ...]


@dataclass
class RewriteContext:
    """The old graph's axes, the new graph's nodes, and the streams' versions in between."""

    #: the old graph's axes
    tracer: AxisTracer
    emit: Emitter
    sites: Sequence[Site] = ()
    #: whether log(size) is added to the logits of keys that stand for several tokens
    proportional: bool = True
    streams: dict[int, Stream] = field(default_factory=dict)
    #: (old node, version) -> new node or number; nodes without tokens stand at version 0
    env: dict[tuple[Node, Any], Any] = field(default_factory=dict)
    #: the version at which a node of tokens was computed
    native: dict[Node, Key] = field(default_factory=dict)

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

    def number(self, node: Node) -> int:
        """The number of the stream whose tokens a node carries."""
        return self.tracer.tokens(node)[0].base.stream

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

    def canonical(self, node: Node) -> Node:
        """A node of tokens, at the version at which it was computed, as ``[B, N, F]``."""
        version, stream, layout = self.native[node], self.stream_of(node), self.layout(node)
        assert stream is not None
        assert isinstance(version, int)
        return layout.to_canonical(self.emit, self.env[node, version], stream.count(self.emit, version, layout.atom))
