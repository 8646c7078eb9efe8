"""The three proofs of a rewrite, for any model: identity, permutation, meaning; and a way to see the graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

import tofu_fx
from tofu_fx.planning.plan import Plan

EAGER: dict[str, Any] = {"inner_backend": "eager", "on_error": "raise"}


def compiled(model: Any, **options: Any) -> Any:
    """The model through the backend, lowered to eager, failing aloud."""
    torch._dynamo.reset()
    return torch.compile(model, backend="tofu", options={**EAGER, **options})


def tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors of any output structure, in order."""
    return [value for value in tree_flatten(outputs)[0] if isinstance(value, torch.Tensor)]


def relative_error(outputs: Any, expected: Any) -> float:
    """Largest difference of any output, relative to that output's largest magnitude."""
    worst = 0.0
    for a, b in zip(tensors(outputs), tensors(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.is_floating_point() and a.numel():
            worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item())
    return worst


def permutation_plan(model: Any, *inputs: Any, **kwargs: Any) -> Plan:
    """A plan that permutes the tokens at every site instead of reducing them."""
    plan = tofu_fx.explain(model, *inputs, options={"r": 1}, **kwargs).plan
    rows = [row.model_copy(update={"strategy": "permute", "r": 0}) for row in plan.sites]
    return Plan(sites=rows)


def permutation_error(model: Callable[..., Any], *inputs: Any, **kwargs: Any) -> tuple[float, int]:
    """Relative error of the outputs when tokens are permuted at every site, and the number of sites.

    A permutation loses nothing, so whatever is indexed by token and was not brought along shows as a large error.
    """
    plan = permutation_plan(model, *inputs, **kwargs)
    expected = model(*inputs, **kwargs)
    outputs = compiled(model, plan=plan)(*inputs, **kwargs) if plan.sites else expected
    return relative_error(outputs, expected), len(plan.sites)


def same_bits(outputs: Any, expected: Any) -> bool:
    """Whether all output tensors are equal bit for bit (NaN equals NaN)."""
    pairs = zip(tensors(outputs), tensors(expected), strict=True)
    return all(a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in pairs)


def spy(monkeyable: Mapping[str, Any] | None = None) -> Any:
    """A backend that keeps the graphs that it is given, and runs them as they are."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    backend.graphs = graphs  # type: ignore[attr-defined]
    return backend
