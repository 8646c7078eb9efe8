"""What most tests use: the proofs of `tofu_fx.testing`, and the backend lowered to eager."""

from __future__ import annotations

from typing import Any

import torch

from tofu_fx.testing import (
    EAGER,
    MEANING_TOLERANCE,
    PERMUTATION_TOLERANCE,
    Study,
    meaning_errors,
    plan_rows,
    randomise,
    relative_error,
    same_bits,
    study,
    tensors,
)

__all__ = [
    "EAGER", "MEANING_TOLERANCE", "PERMUTATION_TOLERANCE", "Study", "compiled", "meaning_errors",
    "plan_rows", "randomise", "relative_error", "same_bits", "study", "tensors",
]  # fmt: skip


def compiled(model: Any, **options: Any) -> Any:
    """The model through the backend, lowered to eager, raising where a pass fails."""
    torch._dynamo.reset()
    return torch.compile(model, backend="tofu", options={**EAGER, **options})
