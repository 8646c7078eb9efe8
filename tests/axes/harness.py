"""What a row of the table is, and how it is judged: by numbers without a compiler, and by what the compiler does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from tests.axes.layouts import (
    PAIRS,
    B,
    C,
    D,
    H,
    N,
    arrange,
    constant,
    copies,
    generator,
    pooled,
    reduced,
    same,
    sizes,
    split,
    survivors,
)  # fmt: skip
from tofu_fx.compilation import Captured, Compilation, Lowered
from tofu_fx.fx.spellings import respell
from tofu_fx.fx.stages import advanced
from tofu_fx.pipeline import run_passes, without
from tofu_fx.plan.options import Options

# The verdicts.
CARRIED = "carried"  # the op does the same on fewer tokens
SIZED = "by size"  # it does if each token counts as often as it stands for others
BARRIER = "barrier"  # it does not: the tokens must be whole
CAUTIOUS = "(barrier)"  # it would, but no rule says so: the tokens are whole, which costs speed only

#: tensor of tokens, size of each token ``[B, M]``, the place that each token had ``[B, M]`` -> what must come out
Fewer = Callable[[Tensor, Tensor, Tensor], Tensor]


def already_aten(graph: Captured) -> Lowered:
    """Instead of lower_to_aten, for a graph that is ATen and has no parameters."""
    return advanced(Lowered, graph, model_state=frozenset(), traced_outputs=())


@dataclass(frozen=True)
class Row:
    """One op along one axis. ``function`` takes a tensor of ``layout`` and gives one of ``out``.

    A layout names the axes of each dim: b samples, n tokens, h heads, d features of a head, c features; other names are
    axes that the op makes. ``fewer`` says what the function is on fewer tokens, where it is not the function itself: it
    counts tokens by size, or reads a table by the places that they had (``placed``).
    """

    op: str
    axis: str
    verdict: str
    function: Callable[[Tensor], Tensor]
    layout: str = "b n c"
    out: str = ""
    fewer: Fewer | None = None
    placed: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        """How the test is called."""
        return f"{self.op}, {self.axis}{f': {self.note}' if self.note else ''}"

    @property
    def result(self) -> str:
        """The layout of what comes out."""
        return (self.out or self.layout) if self.out != "-" else ""


X = torch.randn(B, N, C, generator=generator(0))


def holds(row: Row) -> bool:
    """By numbers alone: whether the op on the surviving tokens gives the surviving tokens of the op on all of them."""
    rows, x = survivors(), copies(X)
    wanted = reduced(row.function(arrange(x, row.layout)), row.result, rows)
    (few,) = reduced(arrange(x, row.layout), row.layout, rows)
    try:
        given = row.function(few) if row.fewer is None else row.fewer(few, sizes(rows), rows)
    except (RuntimeError, IndexError):
        return False  # shapes that say the number of tokens
    return all(same(given, one) for one in wanted)


FAKES = FakeTensorMode(allow_non_fake_inputs=True)


def block(x: Tensor, layout: str = "b n c") -> Tensor:
    """Attention and MLP over tokens ``[B, N, C]``, which come out in a layout; in some the stream itself has it."""
    own = layout if layout in ("n b c", "(b n) c") else "b n c"
    x = arrange(x, own)
    qkv, names = split(F.linear(F.layer_norm(x, (C,)), constant(3 * C, C)), own)
    qkv = qkv.permute(names.index("b"), names.index("n"), 2) if own != "b n c" else qkv
    q, k, v = qkv.view(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
    x = x + F.linear(arrange(heads, own), constant(C, C))
    x = x + F.gelu(F.linear(x, constant(C, C) + 0.1))
    return x if own == layout else arrange(x, layout)


def traced(function: Callable[[Tensor], Any], x: Tensor) -> GraphModule:
    """The ATen graph of a function of one fake tensor."""
    with FAKES:
        return make_fx(lambda x: function(x), pre_dispatch=True, _allow_non_fake_inputs=True)(x)


@cache
def traced_block(layout: str) -> GraphModule:
    """The block, its tokens in a layout."""
    block(X)  # makes the weights, as real tensors
    return traced(lambda x: block(x, layout), FAKES.from_tensor(X))


class Compiled:
    """A row after a block that loses two tokens of each sample: what the compiler made of it.

    The graph gives what the op gives, its mean over the tokens, and if it can that of the tokens with it added.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        first = traced_block(row.layout)
        stream = first.graph.output_node().args[0]
        assert isinstance(stream, Node)
        holds(row)  # makes the constants, as real tensors
        with torch.no_grad():
            second = traced(self._op_and_mean, stream.meta["val"])
        graph, root = Graph(), torch.nn.Module()
        out = _appended(graph, root, first, {})
        last = next(reversed(graph.nodes))
        graph.output(_appended(graph, root, second, {next(iter(second.graph.nodes)): out}))
        behind = list(graph.nodes)[list(graph.nodes).index(last) + 1 : -1]
        result = graph.output_node().args[0][0]  # type: ignore[index]
        #: the nodes of the op (those of the mean stand after its result), and the names of what they call
        self.nodes = behind[: behind.index(result) + 1] if result in behind else []
        self.called = {getattr(node.target, "__name__", "").split(".")[0] for node in self.nodes}
        respell(graph)  # what lower_to_aten does beside tracing
        asked = {
            "r": PAIRS, "strategy": "mean", "placement": "stream", "unread": "keep", "profitable_only": False,
            "on_error": "raise",
        }  # fmt: skip
        # The graph is ATen already, and what verify looks for shows when it runs: two passes that take half the time.
        passes = (already_aten, *without("lower_to_aten", "verify"))
        with torch.no_grad():
            self.compilation: Compilation = run_passes(passes, GraphModule(root, graph), Options.parse(asked), [X])

    def _op_and_mean(self, x: Tensor) -> tuple[Tensor, ...]:
        out = self.row.function(x)
        mean = pooled(out, self.row.result)
        if self.row.result != self.row.layout or self.row.placed:
            return out, mean
        # The result meets what it was made of: axes that have met may not be taken for one where they are not.
        return out, mean, pooled(x + out, self.row.layout)

    @property
    def reasons(self) -> list[str]:
        """Why the compiler wants whole tokens at the op, or gives the site up; empty where it carries them."""
        site, barriers = self.compilation.sites[0], self.compilation.barriers
        if not site.matched:
            return [str(site.decline)]
        return [str(barrier) for barrier in barriers if barrier.node in self.nodes]

    def is_right(self) -> bool:
        """Whether the rewritten graph gives what the plain one gives for tokens of which some are copies of others.

        An op that reads tables by place distinguishes the copies: then it gives what one of each pair gives.
        """
        x, layout = copies(X), self.row.layout
        given, stream = self.compilation.gm(x), block(x, layout)
        if self.row.fewer is None or not self.row.placed or self.reasons:
            return all(same(a, b) for a, b in zip(given, self._op_and_mean(stream), strict=True))
        wrong = torch.ones(given[1].shape, dtype=torch.bool)
        for choice in itertools.product((0, 1), repeat=PAIRS):
            rows = survivors(choice)
            (few,) = reduced(stream, layout, rows)
            wanted = pooled(self.row.fewer(few, sizes(rows), rows), self.row.result, sizes(rows))
            wrong &= ~torch.isclose(wanted, given[1], rtol=1e-4, atol=2e-5)
        return not wrong.any()


def _appended(graph: Graph, root: torch.nn.Module, gm: GraphModule, env: dict[Node, Any]) -> Any:
    """Append a graph to another, its constants under names of their own; gives what it returns."""
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            name = f"constant{len(root._buffers)}"
            root.register_buffer(name, getattr(gm, node.target))
            env[node] = graph.get_attr(name)
            env[node].meta = dict(node.meta)
        elif node.op == "output":
            return map_arg(node.args[0], env.__getitem__)
        elif node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    raise AssertionError("a graph without an output")
