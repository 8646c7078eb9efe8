"""Several ways to compile one model, side by side in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tofu_fx.planning.batches import Batch
from tofu_fx.report.explain import explain


@contextmanager
def room_for_variants() -> Iterator[None]:
    """Within it, any number of variants of one model are compiled, and none silently runs as plain Python."""
    # Dynamo counts compilations by code object, not by model: after eight variants of one forward it would stop.
    many = {"recompile_limit": 10_000, "accumulated_recompile_limit": 100_000, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(many):  # type: ignore[no-untyped-call, unused-ignore]
        yield


def compile_variant(model: Any, options: Mapping[str, Any] | None, inner_backend: str) -> Any:
    """The model compiled through tofu with some options, or plain where there are none (a module stays a module).

    A pass that fails is an error when it is first called: a model that was compiled untouched would be measured as if
    it were reduced.
    """
    if options is None:
        return torch.compile(model, backend=inner_backend, dynamic=False)
    chosen = {**options, "inner_backend": inner_backend, "on_error": "raise"}
    return torch.compile(model, backend="tofu", dynamic=False, options=chosen)


def call_with(compiled: Any, batch: Batch) -> Any:
    """The outputs for a batch; what tofu raises while compiling comes out as it was raised."""
    try:
        return compiled(*batch.args, **batch.kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise (error.inner_exception or error) from None


def share_of_flops(model: Any, batch: Batch, options: Mapping[str, Any]) -> float:
    """Operations of a call that are left under some options, as a share of the plain model's (1 where it has none).

    To be asked before anything is compiled: ``tofu_fx.explain`` clears what Dynamo has compiled.
    """
    explained = explain(model, *batch.args, options={**options, "on_error": "raise"}, **batch.kwargs)
    return explained.flops_after / explained.flops_before if explained.flops_before else 1.0
