"""What meets a reduced stream follows it: each companion against plain indexing, or the oracle's merge, of its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from tests.rewriting.twice import GAIN, METRICS, OWN, B, C, N, Steps, X, random, reduced
from tests.rewriting.writing import emitted
from tofu_fx.axes.atoms import Atom
from tofu_fx.axes.rules.table import find_rule
from tofu_fx.axes.tracer import AxisTracer, trace
from tofu_fx.fx.nodes import is_op
from tofu_fx.rewriting.companions import Companions
from tofu_fx.rewriting.layout import Emitter
from tofu_fx.rewriting.versions import Stream
from tofu_fx.testing import capture_aten

H, D = 2, C // 2
THERE = torch.rand(B, N, generator=torch.Generator().manual_seed(0)) > 0.3
#: what the model does with x ``[B, N, C]``, and with the stream y that it makes of it
Meeting = Callable[["Model", Tensor, Tensor, Tensor], Any]


class Model(nn.Module):
    """A stream, which starts at ``2 * x``, and something that meets it."""

    def __init__(self, meeting: Meeting) -> None:
        super().__init__()
        self.meeting = meeting
        self.table = nn.Parameter(random(N, C, seed=10))
        self.bias = nn.Parameter(random(1, H, N, N, seed=11))
        self.register_buffer("cos", random(1, 1, N, D, seed=12))
        self.register_buffer("pairs", random(N, N, seed=13) > 0)

    def forward(self, x: Tensor, there: Tensor) -> Any:
        return self.meeting(self, x, 2 * x, there)

    @staticmethod
    def heads(y: Tensor) -> Tensor:
        return y.view(B, N, H, D).transpose(1, 2)


@functools.cache
def traced(meeting: Meeting) -> tuple[Any, AxisTracer, Atom, tuple[Any, ...]]:
    """The graph, its axes with the stream's tokens, that of the batch, and the graph's inputs."""
    model = Model(meeting)
    gm, given = capture_aten(model, X, THERE)
    held = {id(value) for value in (*model.parameters(), *model.buffers())}
    sources = zip(gm.graph.find_nodes(op="placeholder"), given, strict=True)
    state = frozenset(node for node, value in sources if id(value) in held)
    start = next(node for node in gm.graph.nodes if is_op(node, "mul"))
    known = frozenset(node for node in gm.graph.nodes if is_op(node, "matmul", "scaled_dot_product_attention"))
    seeds = {start: lambda tracer, axes: (axes[0], (OWN,), axes[2])}
    tracer = trace(lambda space: AxisTracer(gm.graph, find_rule, state, seeds, known, known, space))
    assert all(barrier.node.op == "output" for barrier in tracer.barriers), tracer.barriers
    (batch,) = tracer.of(start)[0]
    return gm, tracer, batch, given


def companions_of(tracer: AxisTracer, emit: Emitter, stream: Stream, env: dict[Any, Any]) -> Companions:
    return Companions(tracer, emit, {0: stream}, env)


def followed(meeting: Meeting, op: str, version: int = 2, strategy: str = "mean") -> list[Tensor]:
    """What the companions of the last such op become at a version of the stream."""
    gm, tracer, batch, given = traced(meeting)
    node = [node for node in gm.graph.nodes if is_op(node, op)][-1]

    def write(emit: Emitter, *nodes: Node) -> Any:
        stream, _ = reduced(emit, nodes[:4], strategy, batch=batch)
        env: dict[Any, Any] = dict(zip(((n, 0) for n in gm.graph.find_nodes(op="placeholder")), nodes[4:], strict=True))
        for old in gm.graph.nodes:
            if old.op == "call_function":
                env[old, 0] = emit.copy(old, lambda n: env[n, 0])
        companions = companions_of(tracer, emit, stream, env)
        found = companions.rebased(node, {0: version}, {})
        assert companions.rebased(node, {0: version}, {}) == found  # made once: the same nodes
        assert companions.rebased(node, {0: 0}, {}) == {}
        return list(found.values())

    return list(emitted(write, X, *METRICS, GAIN, *given))


MODEL = Model(lambda m, x, y, there: y)
ORIGIN = Steps("mean").origin  # of each version: the token whose place each token has, ``[B, M]``


def rows(table: Tensor, origin: Tensor) -> Tensor:
    """``[N, ..]`` -> ``[B, M, ..]``"""
    return torch.stack([table[kept] for kept in origin])


def pairs(table: Tensor, origin: Tensor) -> Tensor:
    """``[.., N, N]`` -> ``[B, .., M, M]``"""
    return torch.stack([table[..., kept, :][..., kept] for kept in origin])


TABLES: dict[str, tuple[Meeting, str, Callable[[Tensor], Tensor]]] = {
    "positions": (lambda m, x, y, _: y + m.table, "add", lambda kept: rows(MODEL.table, kept)),
    "rotary": (lambda m, x, y, _: m.heads(y) * m.cos, "mul", lambda kept: rows(MODEL.cos[0, 0], kept)[:, None]),
    "relative bias": (
        lambda m, x, y, _: m.heads(y) @ m.heads(y).transpose(2, 3) + m.bias,
        "add",
        lambda kept: pairs(MODEL.bias[0], kept),
    ),
    "mask of pairs": (
        lambda m, x, y, _: F.scaled_dot_product_attention(*[m.heads(y)] * 3, attn_mask=m.pairs),
        "scaled_dot_product_attention",
        lambda kept: pairs(MODEL.pairs, kept)[:, None],
    ),
    "padding of each sample": (
        lambda m, x, y, there: F.scaled_dot_product_attention(*[m.heads(y)] * 3, attn_mask=there[:, None, None]),
        "scaled_dot_product_attention",
        lambda kept: THERE.gather(1, kept)[:, None, None],
    ),
    "flags of tokens": (
        lambda m, x, y, there: y.masked_fill(there[:, :, None], 0.0),
        "masked_fill",
        lambda kept: THERE.gather(1, kept)[:, :, None],
    ),
    "one number for each token": (
        lambda m, x, y, _: y + x.tanh()[:, :, :1],
        "add",
        lambda kept: X.tanh()[:, :, 0].gather(1, kept)[:, :, None],
    ),
    "class token beside each": (
        lambda m, x, y, _: y + x[:, :1].expand(-1, N, -1),
        "add",
        lambda kept: X[:, :1].expand(-1, kept.shape[1], -1),
    ),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", TABLES)
@torch.no_grad()
def test_rows_of_the_survivors_are_picked_for_each_sample(name: str, version: int) -> None:
    meeting, op, expected = TABLES[name]
    (found,) = followed(meeting, op, version)
    assert torch.equal(found, expected(ORIGIN[version - 1]))


OLDER: dict[str, tuple[Meeting, str]] = {
    "long skip": (lambda m, x, y, _: y + x.tanh(), "add"),
    "joined by channels": (lambda m, x, y, _: torch.cat([y, x.tanh()], -1), "cat"),
    "stacked": (lambda m, x, y, _: torch.stack([x.tanh(), y]), "stack"),
    "summed products": (lambda m, x, y, _: torch.einsum("bnc,bnc->bn", y, x.tanh()), "einsum"),
}


@pytest.mark.parametrize("strategy", ["prune", "mean", "mlerp"])
@pytest.mark.parametrize("name", OLDER)
@torch.no_grad()
def test_features_from_before_the_stream_are_merged_as_it_was(name: str, strategy: str) -> None:
    (found,) = followed(*OLDER[name], strategy=strategy)
    torch.testing.assert_close(found, Steps(strategy).rebased(X.tanh(), strategy))


@pytest.mark.parametrize("other", ["table[0]", "1.5", "x[:, :1]"])
def test_what_is_the_same_for_all_tokens_is_no_companion(other: str) -> None:
    meets: dict[str, Meeting] = {
        "table[0]": lambda m, x, y, _: y + m.table[0],
        "1.5": lambda m, x, y, _: y + 1.5,
        "x[:, :1]": lambda m, x, y, _: y + x[:, :1],
    }
    assert followed(meets[other], "add") == []
