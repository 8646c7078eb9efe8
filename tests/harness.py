"""What most tests use: the proofs of `tofu_fx.testing`, and the backend lowered to eager."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings

from tofu_fx import testing
from tofu_fx.testing import (
    EAGER,
    MEANING_TOLERANCE,
    PERMUTATION_TOLERANCE,
    Proofs,
    Study,
    meaning_errors,
    plan_rows,
    randomise,
    reducing,
    relative_error,
    same_bits,
    study,
    tensors,
)

__all__ = [
    "EAGER",
    "MEANING_TOLERANCE",
    "PERMUTATION_TOLERANCE",
    "Study",
    "compiled",
    "meaning_errors",
    "plan_rows",
    "prove",
    "randomise",
    "relative_error",
    "rewritten",
    "same_bits",
    "study",
    "tensors",
]  # fmt: skip

#: whether HYPOTHESIS_PROFILE=nightly is running
NIGHTLY = settings.get_current_profile_name() == "nightly"


def compiled(model: Any, **options: Any) -> Any:
    """The model through the backend, lowered to eager, raising where a pass fails."""
    torch._dynamo.reset()
    return torch.compile(model, backend="tofu", options={**EAGER, **options})


@functools.wraps(testing.prove)
def prove(*args: Any, **kwargs: Any) -> Proofs:
    """`tofu_fx.testing.prove`; for every change of "mlerp" alone, from whose graph the others' differ the least.

    All strategies are proved at night, and for every change those of tests/models/test_models.py.
    """
    if not NIGHTLY:
        kwargs.setdefault("strategies", ("mlerp",))
    return testing.prove(*args, **kwargs)


def rewritten(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Study:
    """What `prove` has of "mlerp" in the placement that is chosen by itself, without any proof."""
    with torch.no_grad():
        return study(model, *args, variants={"mlerp": reducing(2, None, "mlerp")}, proofs=False, **kwargs)
