"""Every rule is true of its op: where it puts the tokens, shuffling the input's tokens shuffles the output's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tofu_fx.axes.atoms import Atom, Barrier, Base, token_atoms
from tofu_fx.axes.rules.result import Carried, Dropped, Pooled
from tofu_fx.axes.rules.table import RULES, find_rule
from tofu_fx.axes.tracer import AxisTracer

B, N, C = 3, 7, 8
X = torch.randn(B, N, C, generator=torch.Generator().manual_seed(0))
W = torch.randn(C, C, generator=torch.Generator().manual_seed(1))
TABLE = torch.randn(1, 1, C, generator=torch.Generator().manual_seed(2))

Function = Callable[[Tensor], Any]

CARRIED: dict[str, Function] = {
    "linear": lambda x: F.linear(x, W),
    "matmul with a weight": lambda x: x @ W,
    "weight by matmul": lambda x: W @ x.transpose(1, 2),
    "bmm": lambda x: torch.bmm(x, W.expand(B, C, C)),
    "addmm of merged tokens": lambda x: torch.addmm(W[0], x.reshape(-1, C), W).view(B, N, C),
    "einsum": lambda x: torch.einsum("bnc,cd->bdn", x, W),
    "layer_norm": lambda x: F.layer_norm(x, (C,)),
    "rms_norm": lambda x: F.rms_norm(x, (C,)),
    "softmax over features": lambda x: x.softmax(-1),
    "gelu": F.gelu,
    "hardswish": lambda x: F.hardswish(x),
    "add a table of features": lambda x: x + TABLE,
    "clamp": lambda x: x.clamp(-1, 1),
    "where": lambda x: torch.where(x > 0, x, -x),
    "dropout in eval": lambda x: F.dropout(x, 0.5, False),
    "to": lambda x: x.to(torch.float64),
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(2, 0, 1),
    "movedim": lambda x: x.movedim(1, 0),
    "heads": lambda x: x.view(B, N, 2, 4).permute(2, 0, 3, 1),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)),
    "flatten": lambda x: x.flatten(0, 1),
    "flatten features": lambda x: x.unflatten(-1, (2, 4)).flatten(2),
    "unsqueeze and squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1),
    "repeat features": lambda x: x.repeat(1, 1, 2),
    "chunk features": lambda x: x.chunk(2, -1)[1],
    "split features": lambda x: x.split([3, 5], -1)[0],
    "unbind features": lambda x: x.unbind(-1)[2],
    "select a feature": lambda x: x.select(-1, 1),
    "slice features": lambda x: x[..., 2:6:2],
    "features written over": lambda x: torch.slice_scatter(x, x[..., 1:4] * 2, 2, 0, 3),
    "every second feature written over": lambda x: torch.slice_scatter(x, x[..., :4] * 2, 2, 0, C, 2),
    "rotation by complex numbers": lambda x: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.view_as_complex(TABLE.unflatten(-1, (-1, 2)))
    ).flatten(2),
    "stack": lambda x: torch.stack((x, -x), 2),
    "cat features": lambda x: torch.cat((x, x * 2), -1),
    "mean of features": lambda x: x.mean(-1, keepdim=True),
    "norm of features": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "max of features": lambda x: x.amax(-1),
    "pad features": lambda x: F.pad(x, (1, 2)),
    "convolution with tokens as batch": lambda x: F.conv1d(x.reshape(-1, 1, C), W[:, None, :3]).view(B, N, C, -1),
    "batch norm in eval": lambda x: F.batch_norm(x.transpose(1, 2), TABLE[0, 0], TABLE[0, 0].abs()),
    "embedding": lambda x: F.embedding((x[..., 0] > 0).long(), W),
    "zeros_like": torch.zeros_like,
}

GONE: dict[str, Function] = {
    "mean over tokens": lambda x: x.mean(1),
    "sum over tokens": lambda x: x.sum(1, keepdim=True),
    "max over tokens": lambda x: x.amax(1),
}

BARRIER: dict[str, tuple[Function, str]] = {
    "flip": (lambda x: x.flip(1), "no rule"),
    "roll": (lambda x: x.roll(1, 1), "no rule"),
    "sort": (lambda x: x.sort(1).values, "no rule"),
    "cumsum": (lambda x: x.cumsum(1), "no rule"),
    "one of the tokens": (lambda x: x[:, 3], "taken by its position"),
    "some of the tokens": (lambda x: x[:, 2:5], "are taken"),
    "written over some": (lambda x: torch.slice_scatter(x, TABLE.expand(B, 2, C), 1, 2, 4), "are taken"),
    "written over by others": (lambda x: torch.slice_scatter(x, TABLE.expand(B, N, C), 1), "written over others"),
    "every second token": (lambda x: x[:, ::2], "are taken"),
    "a pair of tokens": (lambda x: x.chunk(2, 1)[0], "are taken"),
    "taken apart": (lambda x: x.unbind(1)[0], "taken apart"),
    "softmax over tokens": (lambda x: x.softmax(1), "softmax over tokens"),
    "norm over tokens": (lambda x: F.layer_norm(x.transpose(1, 2), (N,)), "statistics run over tokens"),
    "mixing tokens": (lambda x: F.linear(x.transpose(1, 2), torch.ones(4, N)), "contracted with a fixed matrix"),
    "gram matrix of features": (lambda x: x.transpose(1, 2) @ x, "outside of a recognised attention"),
    "einsum over tokens": (lambda x: torch.einsum("bnc,bnd->bcd", x, x), "outside of a recognised attention"),
    "std": (lambda x: x.std(1), "statistic over tokens"),
    "padded": (lambda x: F.pad(x, (0, 0, 1, 0)), "padded"),
    "repeated": (lambda x: x.repeat(1, 2, 1), "repeated"),
    "convolution over tokens": (lambda x: F.conv1d(x, torch.ones(4, N, 3)), "convolution over tokens"),
    "batch norm in training": (lambda x: F.batch_norm(x.transpose(1, 2), None, None, training=True), "statistics"),
    "in place": (lambda x: x.clone().mul_(2), "in place"),
    "in place through a view": (lambda x: x.clone()[:, 2:4].mul_(2), "in place"),
    "reshaped across": (lambda x: x.transpose(1, 2).reshape(B, N, C), "cuts across"),
    "merged with features": (lambda x: x.reshape(B, N * C).softmax(-1), ""),
}


def traced(function: Function) -> tuple[AxisTracer, Any]:
    """The axes of a function of one stream of tokens, and its output node."""
    gm = make_fx(function, pre_dispatch=True)(X)
    source = next(iter(gm.graph.nodes))
    atom = Atom(Base("tokens", N, "token", 0), 0, N)
    tracer = AxisTracer(gm.graph, find_rule, seeds={source: lambda _, axes: (axes[0], (atom,), axes[2])}).run()
    return tracer, gm.graph.output_node().args[0]


def shuffled(x: Tensor, dims: list[int], places: list[int]) -> Tensor:
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    for dim, beside in zip(dims, places, strict=True):
        size = x.shape[dim]
        x = x.unflatten(dim, (beside, N, size // beside // N)).index_select(dim + 1, order).flatten(dim, dim + 2)
    return x


@pytest.mark.parametrize("name", CARRIED)
def test_tokens_are_where_the_rule_says(name: str) -> None:
    function = CARRIED[name]
    tracer, output = traced(function)
    assert not [b for b in tracer.barriers if b.node.op != "output"], [str(b) for b in tracer.barriers]
    axes = tracer.of(output)
    dims = [i for i, dim in enumerate(axes) if any(atom.is_token for atom in dim)]
    assert len(dims) == len(token_atoms(axes)) == 1
    beside = [1]
    for atom in axes[dims[0]]:
        if atom.is_token:
            break
        beside[0] *= atom.size
    result = function(shuffled(X, [1], [1]))
    # The same sums in the same order, but BLAS may block rows by their place: a few eps.
    torch.testing.assert_close(result, shuffled(function(X), dims, beside), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", GONE)
def test_reductions_over_tokens_drop_them_without_a_barrier(name: str) -> None:
    tracer, output = traced(GONE[name])
    assert not tracer.barriers
    assert not tracer.tokens(output)
    result = find_rule(output.target)(tracer.known, output)
    assert isinstance(result, Dropped)
    kind = name.split()[0]
    assert (result.kind if isinstance(result, Pooled) else "max") == kind
    assert tracer.pools == ({output: kind} if kind != "max" else {})


@pytest.mark.parametrize("name", BARRIER)
def test_ops_that_need_the_tokens_in_their_places_are_barriers_with_a_reason(name: str) -> None:
    function, reason = BARRIER[name]
    tracer, output = traced(function)
    assert tracer.barriers
    assert any(reason in str(barrier) for barrier in tracer.barriers)
    assert not tracer.tokens(output)


def test_a_rule_names_the_axes_that_it_mixes() -> None:
    tracer, output = traced(CARRIED["layer_norm"])
    result = find_rule(output.target)(tracer.known, output)
    assert type(result) is Carried
    assert result.axes == tracer.of(output)
    assert result.mixed == tracer.of(output)[2]


def state(tracer: AxisTracer) -> str:
    """All that a walk found."""
    return repr([{**vars(tracer), "known": None, "graph": None}, vars(tracer.samples)])


@pytest.mark.parametrize("name", [*CARRIED, *GONE, *BARRIER])
def test_rules_change_nothing_and_say_the_same_each_time(name: str) -> None:
    tracer, _ = traced({**CARRIED, **GONE, **{key: function for key, (function, _) in BARRIER.items()}}[name])
    before = state(tracer)
    for node in tracer.graph.nodes:
        rule = find_rule(node.target) if node.op == "call_function" else None
        if rule is not None:
            first, second = (said(rule, tracer, node) for _ in range(2))
            assert first == second
    assert state(tracer) == before


def said(rule: Any, tracer: AxisTracer, node: Any) -> str:
    try:
        return repr(rule(tracer.known, node))
    except Barrier as barrier:
        return str(barrier)


def test_every_rule_is_of_an_op_that_exists() -> None:
    assert [name for name in RULES if not hasattr(torch.ops.aten, name)] == []
