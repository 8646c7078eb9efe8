"""Compare the outputs of two runs of one model, whatever structure they have."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten


def tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors of any output structure, in order."""
    return [value for value in tree_flatten(outputs)[0] if isinstance(value, torch.Tensor)]


def relative_error(outputs: Any, expected: Any) -> float:
    """Largest difference of any output, relative to that output's largest magnitude. NaN where only one has a NaN.

    Places where both hold the same infinity or a NaN are equal. Integers and flags must be equal: else infinite.

    Raises:
        AssertionError: another number of tensors, another shape or another dtype.
    """
    worst = 0.0
    found, wanted = tensors(outputs), tensors(expected)
    assert len(found) == len(wanted), f"{len(found)} tensors came out, {len(wanted)} were expected"
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape, f"a tensor is {tuple(a.shape)}, {tuple(b.shape)} was expected"
        assert a.dtype == b.dtype, f"a tensor is {a.dtype}, {b.dtype} was expected"
        if not a.numel():
            continue
        if not a.is_floating_point():
            worst = worst if torch.equal(a, b) else float("inf")
            continue
        same = (a == b) | (a.isnan() & b.isnan())
        scale = torch.where(b.isfinite(), b, 0).abs().max().clamp_min(1e-12)
        error = (torch.where(same, 0, a - b).abs().max() / scale).item()
        worst = error if error != error else max(worst, error)
    return worst


def same_bits(outputs: Any, expected: Any) -> bool:
    """Whether all output tensors have the same shapes, dtypes and values (NaN equals NaN)."""
    found, wanted = tensors(outputs), tensors(expected)
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for a, b in zip(found, wanted, strict=True)
    )


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a value that the outputs depend on: no zero heads, no 1e-5 LayerScale, no zero biases.

    A freshly made model often hides mistakes: its last layer is zero, its position table too. Vectors that scale are
    near 1, vectors that shift near 0; matrices keep the variance of what they multiply. Returns the model in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator).to(parameter)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() <= 1:
                scales = name.endswith("weight") or "gamma" in name or "lambda" in name or "scale" in name
                parameter.copy_(normal(parameter) * 0.1 + (1.0 if scales else 0.0))
            elif any(part in name for part in ("token", "pos_embed", "position", "latent", "probe", "bias_table")):
                parameter.copy_(normal(parameter) * 0.5)
            elif parameter.numel():
                parameter.copy_(normal(parameter) * parameter[0].numel() ** -0.5)
    return model.eval()
