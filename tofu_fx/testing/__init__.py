"""Proofs that a graph rewrite is right: of this compiler on your model, or of your own pass."""

from tofu_fx.testing.compare import randomise, relative_error, same_bits, tensors
from tofu_fx.testing.proofs import (
    MEANING_TOLERANCE,
    PERMUTATION_TOLERANCE,
    Proofs,
    meaning_errors,
    meaning_variants,
    prove,
)
from tofu_fx.testing.study import EAGER, Study, permutation_plan, plan_rows, study

__all__ = [
    "EAGER",
    "MEANING_TOLERANCE",
    "PERMUTATION_TOLERANCE",
    "Proofs",
    "Study",
    "meaning_errors",
    "meaning_variants",
    "permutation_plan",
    "plan_rows",
    "prove",
    "randomise",
    "relative_error",
    "same_bits",
    "study",
    "tensors",
]
