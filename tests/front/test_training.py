"""Gradients, train mode, autocast, grad modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.harness import MEANING_TOLERANCE, compiled, relative_error, same_bits
from tests.oracle.stream import Reducer, reference_vit
from tests.zoo import ZOO

# A gradient is a longer chain of the same sums than the output (backward through every layer): four times its bound.
GRADIENT_TOLERANCE = 4 * MEANING_TOLERANCE


def gradients(call: Any, model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of every parameter, and of the input, for a loss that weighs every output differently."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    outputs = call(x)
    (outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).sum().backward()
    assert x.grad is not None
    return {"input": x.grad, **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def differentiable_merge(
    members: torch.Tensor, weights: torch.Tensor, strategy: str, unit: float = 0.0
) -> torch.Tensor:
    """The formulas of `tests.oracle.operators.reference_merge` for autograd, which takes its norms as numbers.

    No group cancels here, so that `unit`, by which that is told, is not needed.
    """
    weights = weights.double()[:, None]
    mean = (weights * members).sum(0) / weights.sum()
    return mean if strategy == "mean" else mean / mean.norm() * members.norm(dim=1).max()


@pytest.mark.parametrize("strategy", ["prune", "mean", "mlerp"])
@pytest.mark.parametrize("name", ["deit3", "siglip"])
def test_gradients_equal_autograd_through_the_eager_reference(
    name: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.oracle.operators.reference_merge", differentiable_merge)
    entry = ZOO[name]
    model, x = entry.model().train(), entry.batch()
    found = gradients(compiled(model, r=4, strategy=strategy, inner_backend="aot_eager"), model, x)
    rows = [(strategy, 4)] * 3
    expected = gradients(lambda x: reference_vit(model, x, Reducer(rows, *entry.protected)), model, x)
    plain = gradients(model, model, x)
    assert found.keys() == expected.keys() == plain.keys()
    assert max(relative_error(found[key], plain[key]) for key in plain) > 1e-2
    # A gradient that is a difference of larger numbers is as exact as those: measured against the largest of all.
    scale = max(value.abs().max() for value in expected.values())
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < GRADIENT_TOLERANCE * scale, key


def test_no_reduction_gives_the_gradients_of_the_plain_model_bit_for_bit() -> None:
    entry = ZOO["deit"]
    model, x = entry.model().train(), entry.batch()
    found = gradients(compiled(model, ratio=0.0, inner_backend="aot_eager"), model, x)
    torch._dynamo.reset()
    plain = gradients(torch.compile(model, backend="aot_eager"), model, x)
    assert all(same_bits(found[key], plain[key]) for key in plain)
    assert found.keys() == plain.keys()


def test_a_training_step_lowers_the_loss() -> None:
    entry = ZOO["vit_gap"]
    model, x = entry.model().train(), entry.batch(4)
    call = compiled(model, ratio=0.4, inner_backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(call(x), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_autocast_forward_reduces_and_stays_near_float32() -> None:
    entry = ZOO["deit"]
    model, x = entry.model(), entry.batch()
    call = compiled(model, r=1, strategy="mean")
    with torch.no_grad():
        exact = compiled(model, r=1, strategy="mean")(x)
        torch._dynamo.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs, plain = call(x), model(x)
    assert outputs.dtype == plain.dtype
    assert outputs.isfinite().all()
    # bfloat16 keeps 8 bits: 0.4% a rounding, a dozen of them in a row. A near tie may merge another pair, one of 36.
    assert relative_error(outputs.float(), exact) < 0.1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_gives_the_same_values(mode: Any) -> None:
    entry = ZOO["deit"]
    model, x = entry.model(), entry.batch()
    with mode():
        outputs = compiled(model, r=4, strategy="mlerp")(x)
    with torch.no_grad():
        expected = reference_vit(model, x, Reducer([("mlerp", 4)] * 3, 1))
    assert relative_error(outputs.detach(), expected) < MEANING_TOLERANCE
    assert outputs.requires_grad == (mode is torch.enable_grad)
