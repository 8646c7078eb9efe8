"""A tiny model as an ATen graph with its axes: what finding attentions, masks and places starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from tofu_fx.axes.rules.table import find_rule
from tofu_fx.axes.tracer import AxisTracer, trace
from tofu_fx.sites.attention import find_attentions
from tofu_fx.sites.site import Attention, Found
from tofu_fx.testing import capture_aten

B, N, HEADS, WIDTH = 2, 12, 2, 8


class Model(nn.Module):
    """What a block is made of; ``how`` puts it together."""

    def __init__(self, how: Callable[..., Any]) -> None:
        super().__init__()
        self.how = how
        self.norm, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.proj, self.up, self.down = (
            nn.Linear(a * WIDTH, b * WIDTH) for a, b in ((1, 3), (1, 1), (1, 2), (2, 1))
        )
        self.context = nn.Linear(WIDTH, 2 * WIDTH)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.gamma = nn.Parameter(torch.randn(WIDTH))
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.register_buffer("mask", torch.zeros(N, N))

    def forward(self, *inputs: Tensor) -> Any:
        return self.how(self, *inputs)

    def heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """``[B, N, parts * C]`` -> parts of ``[B, H, N, D]``."""
        return x.view(*x.shape[:2], parts, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def joined(self, x: Tensor) -> Tensor:
        """``[B, H, N, D]`` -> ``[B, N, C]``, projected."""
        return self.proj(x.transpose(1, 2).flatten(2))

    def attend(self, x: Tensor) -> Tensor:
        return self.joined(F.scaled_dot_product_attention(*self.heads(self.qkv(x), 3)))

    def read(self, x: Tensor, context: Tensor) -> Tensor:
        """Attention from x to a text."""
        (q,) = self.heads(self.proj(x), 1)
        return self.joined(F.scaled_dot_product_attention(q, *self.heads(self.context(context), 2)))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


@dataclass
class Traced:
    """A graph, its inputs, which of these the model holds itself, and the axes of its tensors."""

    model: Model
    gm: GraphModule
    inputs: tuple[Any, ...]
    state: frozenset[Node]
    axes: AxisTracer

    @cached_property
    def attentions(self) -> list[Attention]:
        return list(find_attentions(self.axes))

    @cached_property
    def order(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.gm.graph.nodes)}

    @cached_property
    def values(self) -> dict[Node, Any]:
        """What each node computes."""
        found: dict[Node, Any] = {}

        class Noting(Interpreter):
            def run_node(self, n: Node) -> Any:
                found[n] = super().run_node(n)
                return found[n]

        with torch.no_grad():
            Noting(self.gm).run(*self.inputs)
        return found

    def site(self, place: int = 0) -> Found:
        """A site for one of the attentions, of which nothing is decided yet."""
        attention = self.attentions[place]
        sizes = attention.query.meta["val"].shape
        return Found("here", "", attention, int(sizes[attention.query_tokens]), HEADS, WIDTH)


def traced(how: Callable[..., Any], *inputs: Tensor, mask: Tensor | None = None) -> Traced:
    """The graph of a model that does ``how(model, *inputs)``; with the same weights on every call.

    ``mask`` is what the model holds in its buffer of that name.
    """
    torch.manual_seed(0)
    model = Model(how).eval()
    if mask is not None:
        model.mask = mask
    gm, given = capture_aten(model, *inputs)
    held = {id(value) for value in (*model.parameters(), *model.buffers())}
    sources = zip(gm.graph.find_nodes(op="placeholder"), given, strict=True)
    state = frozenset(node for node, value in sources if id(value) in held)
    axes = trace(lambda space: AxisTracer(gm.graph, find_rule, state, space=space))
    return Traced(model, gm, given, state, axes)


def tokens(count: int = N, seed: int = 0, batch: int = B) -> Tensor:
    """A stream ``[B, N, C]``."""
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed))
