"""``tofu_fx.export``: a model on fewer tokens as a program that runs where tofu_fx is not installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.export import ExportedProgram

from tofu_fx.errors import PassError, TofuError
from tofu_fx.ops.portable import DECOMPOSITIONS
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.standalone.rewrite import options_of, rewritten
from tofu_fx.standalone.trace import trace


def export(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    plan: Plan | Mapping[str, Any] | str | None = None,
    options: Options | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Export a model on fewer tokens.

    Args:
        model: a module, a function or an ExportedProgram, for inference.
        args: what it is called with, as for ``torch.export.export``; nothing for an ExportedProgram.
        kwargs: named arguments.
        plan: as the option ``plan``.
        options: as for ``torch.compile(model, backend="tofu", options=...)``; what is about compiling decides nothing.
        dynamic_shapes: as for ``torch.export.export``. The batch may be dynamic; sizes that the number of tokens
            depends on may not.

    Returns:
        A program of ATen's operators only: ``torch.export.save`` it, compile it with AOTInductor, convert it with
        ``torch.onnx.export``. It computes what the compiled model does, but for rounding. Inputs and outputs, names of
        parameters and dynamic sizes are the model's. Where nothing was reduced it is the model's own program, and a
        TofuWarning says why.

    Raises:
        TofuError: ``args`` is no tuple; ``torch.export`` cannot trace the model; or what a mask that is an input hides
            decides which tokens may merge: no program can check that.
        OptionError, PlanError: wrong options, or a plan that does not fit.
        PassError: a pass failed, and ``on_error`` is "raise"; or an operator of this package would be left.
    """
    if not isinstance(args, (tuple, list)):  # a tensor is a sequence, too: of its samples
        raise TofuError(
            f"args: expected a tuple of what the model is called with, got {type(args).__name__}: pass (x,)"
        )
    traced = trace(model, args, kwargs or {}, dynamic_shapes)
    program, guards = rewritten(traced, options_of(plan, options))
    unseen = [guard.what for guard in guards if not guard.of_state]  # what the model holds is in the program as it is
    if unseen:
        raise TofuError(
            "the reduction depends on what is in a mask, which no exported program checks: it holds only while "
            f"{'; '.join(unseen)}. Export the model without that mask, or make it inside of the model; tofu_fx.rewrite "
            "checks it"
        )
    exported = program.run_decompositions(dict(DECOMPOSITIONS))
    left = sorted({str(n.target) for n in exported.graph.nodes if str(n.target).startswith("tofu.")})
    if left:
        raise PassError(f"the exported program would need tofu_fx where it runs, for {', '.join(left)}")
    return exported
