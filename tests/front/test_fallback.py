"""What cannot be compiled as rewritten is compiled untouched, and says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import same_bits
from tests.zoo import ZOO
from tofu_fx import backend
from tofu_fx.errors import TofuWarning


def run(model: Any, x: Tensor, on_error: str = "fallback") -> tuple[Tensor, list[str]]:
    """The outputs through the backend, and what it said."""
    options = {"inner_backend": "eager", "on_error": on_error, "r": 4, "profitable_only": False}
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        outputs = torch.compile(model, backend="tofu", options=options)(x)
    return outputs, [str(w.message) for w in caught if issubclass(w.category, TofuWarning)]


class With(nn.Module):
    """A ViT, and something that is done to its outputs."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.vit, self.after = ZOO["vit"].model(), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.vit(x))


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "vmap": lambda y: torch.vmap(lambda row: row * 2 + row.sum())(y),
    "grad": lambda y: y + torch.func.grad(lambda y: (y**2).sum())(y),
    "jvp": lambda y: torch.func.jvp(torch.sin, (y,), (y,))[1],
}


@pytest.mark.parametrize("on_error", ["fallback", "raise"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_declined_by_name(name: str, on_error: str) -> None:
    model, x = With(TRANSFORMS[name]), ZOO["vit"].batch()
    outputs, (message,) = run(model, x, on_error)
    assert f"the graph holds torch.func's {name}" in message
    assert f"_{name}_increment_nesting" in message
    assert name != "vmap" or __file__ in message
    with torch.no_grad():
        assert same_bits(outputs, model(x))


def fail_on_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inner backend that takes any graph but one with our operators in it."""
    inner = backend._inner

    def picky(gm: torch.fx.GraphModule, *args: Any) -> Any:
        if any("tofu" in str(node.target) for node in gm.graph.nodes):
            raise RuntimeError("no such kernel")
        return inner(gm, *args)

    monkeypatch.setattr(backend, "_inner", picky)


def test_inner_backend_that_fails_on_the_rewritten_graph_gets_the_untouched_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_on_rewritten(monkeypatch)
    model, x = ZOO["vit"].model(), ZOO["vit"].batch()
    outputs, (message,) = run(model, x)
    assert "compiled untouched, because eager failed on the rewritten graph: RuntimeError: no such kernel" in message
    with torch.no_grad():
        assert same_bits(outputs, model(x))


def test_inner_backend_that_fails_on_the_rewritten_graph_raises_if_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on_rewritten(monkeypatch)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="failed on the rewritten graph"):
        run(ZOO["vit"].model(), ZOO["vit"].batch(), "raise")


def test_failure_behind_the_passes_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise KeyError("on purpose")

    monkeypatch.setattr(backend, "carry_over", fail)
    model, x = ZOO["vit"].model(), ZOO["vit"].batch()
    outputs, (message,) = run(model, x)
    assert "on purpose" in message
    with torch.no_grad():
        assert same_bits(outputs, model(x))


def test_failure_of_the_untouched_graph_is_the_inner_backends_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no graph at all")

    monkeypatch.setattr(backend, "_inner", fail)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no graph at all") as caught:
        run(ZOO["vit"].model(), ZOO["vit"].batch())
    assert isinstance(caught.value.inner_exception, RuntimeError)


def test_value_that_recording_loses_is_a_failed_pass_and_no_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tofu_fx.passes.lower_to_aten._refuse_what_cannot_be_inlined", lambda traced: None)
    model, x = With(TRANSFORMS["vmap"]), ZOO["vit"].batch()
    outputs, (message,) = run(model, x)
    assert "could not be recorded as ATen calls" in message
    with torch.no_grad():
        assert same_bits(outputs, model(x))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
if hasattr(torch.optim, "Muon"):  # its graph holds its parameters, and multiplies them
    OPTIMIZERS["muon"] = lambda parameters: torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=1e-3)


AT_NIGHT = pytest.mark.nightly("11 s; of the three it is the simplest")


@pytest.mark.parametrize("name", [pytest.param(n, marks=AT_NIGHT) if n == "sgd" else n for n in OPTIMIZERS])
def test_whole_training_step_is_compiled_without_a_word(name: str) -> None:
    x, losses = ZOO["vit"].batch(), {}
    for whole in (True, False):
        model = ZOO["vit"].model().train()
        optimizer = OPTIMIZERS[name](model.parameters())
        options = {"inner_backend": "aot_eager", "on_error": "raise", "r": 4, "profitable_only": False}

        def step(x: Tensor, call: Any = None, optimizer: Any = optimizer, model: Any = model) -> Tensor:
            optimizer.zero_grad()
            loss = (model if call is None else call)(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        torch._dynamo.reset()
        call = torch.compile(step if whole else model, backend="tofu", options=options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", TofuWarning)
            losses[whole] = [(call(x) if whole else step(x, call)).item() for _ in range(3)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)  # float32 through three steps, fused or not
    assert losses[True][0] != losses[True][2]
