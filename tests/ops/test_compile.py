"""The operators under torch.library and torch.compile."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.streams import DTYPES, implementation, same_bits, stream
from tests.oracle.operators import reference_fuse
from tofu_fx.ops import STRATEGIES, cpu, fuse_tokens, permute_tokens
from tofu_fx.ops.fuse import _fuse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck_fuse(strategy: str, dtype: torch.dtype) -> None:
    x, metric, size = stream(dtype=dtype)
    x.requires_grad_()
    torch.library.opcheck(fuse_tokens, (x, metric.to(dtype), size, 5, strategy, 1, 0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck_fuse_nothing(strategy: str) -> None:
    x, metric, size = stream()
    torch.library.opcheck(fuse_tokens, (x, metric, size, 0, strategy, 1, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_permute(dtype: torch.dtype) -> None:
    x, _, size = stream(dtype=dtype)
    torch.library.opcheck(permute_tokens, (x.requires_grad_(), size, 3, 1, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_the_rest(dtype: torch.dtype) -> None:
    x, metric, size = stream(dtype=dtype)
    merged, _, assignment, kept = fuse_tokens(x, metric, size, 5, "mlerp", 1, 0)
    ops = torch.ops.tofu
    grad = torch.randn_like(merged)
    torch.library.opcheck(ops.mlerp_backward.default, (grad, x, size, assignment, kept))
    x.requires_grad_()
    torch.library.opcheck(ops.restore_tokens.default, (merged, assignment, x, merged))
    for strategy in STRATEGIES:
        torch.library.opcheck(ops.rebase.default, (x, size, assignment, kept, strategy))
        torch.library.opcheck(ops.merge_groups.default, (x, size, assignment, kept, strategy))


def layer(x: Tensor, size: Tensor, strategy: str) -> Tensor:
    """A reduction, work on fewer tokens, an older tensor rebased, and the way back."""
    y, new_size, assignment, kept = torch.ops.tofu.fuse_tokens(x, x, size, 4, strategy, 1, 0)
    old = torch.ops.tofu.rebase(x.sin(), size, assignment, kept, strategy)
    z = torch.tanh(y) + old * new_size.log().unsqueeze(-1)
    return torch.ops.tofu.restore_tokens(z, assignment, x, y)


def run(function: Callable[..., Tensor], x: Tensor, size: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    for tensor in (x, size):
        torch._dynamo.mark_dynamic(tensor, [0, 1])
    out = function(x, size, strategy)
    out.square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiles_whole_forward_and_backward_for_every_batch_and_length(strategy: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for batch, tokens in [(2, 17), (5, 17), (3, 21)]:
        x, _, size = stream(batch=batch, tokens=tokens)
        for found, value in zip(run(compiled, x, size, strategy), run(layer, x, size, strategy), strict=True):
            assert same_bits(found, value)
    assert counter.frame_count == 1


def test_compiles_with_inference_and_static_shapes() -> None:
    torch._dynamo.reset()
    x, _, size = stream()
    with torch.inference_mode():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert same_bits(compiled(x, size, "mlerp"), layer(x, size, "mlerp"))


def test_a_bad_r_is_refused_while_compiling() -> None:
    torch._dynamo.reset()
    x, metric, size = stream()
    compiled = torch.compile(lambda x: fuse_tokens(x, metric, size, 9, "mean", 0, 0)[0], backend="aot_eager")
    with pytest.raises(Exception, match="r=9 is out of range"):
        compiled(x)


def test_a_graph_with_the_operators_can_be_copied() -> None:
    """Compilers deepcopy graph modules; restore and rebase must be there as operators, not as Python closures."""
    graph = torch.fx.Graph()
    x, assignment = graph.placeholder("x"), graph.placeholder("assignment")
    graph.output(graph.call_function(torch.ops.tofu.restore_tokens.default, (x, assignment)))
    module = copy.deepcopy(torch.fx.GraphModule(torch.nn.Module(), graph))
    assert module(torch.ones(1, 2, 3), torch.tensor([[0, 1, 1]])).shape == (1, 3, 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_reduction_on_cpu_is_few_calls(strategy: str) -> None:
    """What it costs beside the work itself; ATen alone takes about a hundred."""
    calls: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with implementation("cpp"), Count():
        _fuse(*stream(tokens=40), 12, strategy, 1, 0)
    assert "aten.bmm.default" in calls
    assert len(calls) <= 20, calls


def test_without_a_compiler_the_operators_run_on_aten_and_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no working compiler\nand many lines more")

    monkeypatch.setattr("tofu_fx.ops.build.load", refuse)
    monkeypatch.setattr(cpu, "library", functools.cache(cpu.library.__wrapped__))
    expected = reference_fuse(*stream(), 6, "mean", 1, 0)
    with caplog.at_level("INFO", logger="tofu_fx"):
        found = fuse_tokens(*stream(), 6, "mean", 1, 0)
    assert not cpu.usable(stream()[0])
    assert torch.equal(found[2], expected[2])
    assert [record.message for record in caplog.records] == [
        "token operators run on ATen, because their C++ does not compile: no working compiler"
    ]
