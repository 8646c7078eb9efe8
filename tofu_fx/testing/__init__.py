"""Proofs that a graph rewrite is right: of this compiler on your model, or of your own pass.

`tofu_fx.testing.strategies` (imported by its own name; needs hypothesis) draws the models and graphs to try it on.
"""

from tofu_fx.testing.assertions import (
    changes_nothing,
    honest_meta,
    idempotent,
    keeps_outputs,
    leaves_alone,
    order_independent,
    permutation_safe,
    well_formed,
)
from tofu_fx.testing.axis import Unfit
from tofu_fx.testing.compare import randomise, relative_error, same_bits, tensors
from tofu_fx.testing.duplicates import repeated, without_positions
from tofu_fx.testing.formulas import Undecided
from tofu_fx.testing.graphs import Pass, applied, capture, capture_aten, difference, lowered, same_graph
from tofu_fx.testing.interpreter import Interpreter
from tofu_fx.testing.proofs import (
    MEANING_TOLERANCE,
    PERMUTATION_TOLERANCE,
    Proofs,
    meaning_errors,
    prove,
    reducing,
)
from tofu_fx.testing.spec import Spec
from tofu_fx.testing.study import EAGER, Study, plan_rows, study
from tofu_fx.testing.transformers import Transformer

__all__ = [
    "EAGER",
    "MEANING_TOLERANCE",
    "PERMUTATION_TOLERANCE",
    "Interpreter",
    "Pass",
    "Proofs",
    "Spec",
    "Study",
    "Transformer",
    "Undecided",
    "Unfit",
    "applied",
    "capture",
    "capture_aten",
    "changes_nothing",
    "difference",
    "honest_meta",
    "idempotent",
    "keeps_outputs",
    "leaves_alone",
    "lowered",
    "meaning_errors",
    "order_independent",
    "permutation_safe",
    "plan_rows",
    "prove",
    "randomise",
    "reducing",
    "relative_error",
    "repeated",
    "same_bits",
    "same_graph",
    "study",
    "tensors",
    "well_formed",
    "without_positions",
]
