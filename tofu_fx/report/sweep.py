"""``tofu_fx.sweep``: every way to choose a schedule at several budgets, with its speed and what it costs in quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tofu_fx.calibration.batches import Batch, device_of, read_batches
from tofu_fx.calibration.calibrate import Target, calibrate
from tofu_fx.calibration.output_error import OutputError, choose_metric
from tofu_fx.calibration.progress import Progress
from tofu_fx.calibration.refusals import RefusedInput, model_refusals
from tofu_fx.calibration.timing import call_with, compile_variant, device_name, room_for_variants, time_calls
from tofu_fx.calibration.trial import Trial
from tofu_fx.calibration.uniform import UNIFORM, uniform_plans
from tofu_fx.errors import CalibrationError
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.report.explain import share_of_flops
from tofu_fx.report.swept import CALIBRATED, LINES, PLAIN, Sweep, SweepRow


def sweep(  # noqa: PLR0913 - a user names each of them
    model: Any,
    inputs: Any,
    *,
    evaluate: Callable[[Any], float] | None = None,
    flops: Sequence[float] = (0.9, 0.75, 0.6, 0.5),
    metric: Any = None,
    inner_backend: Literal["inductor", "aot_eager", "eager"] = "inductor",
    calibrated: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Sweep:
    """Compare the schedules that need no calibration, and calibrated plans, at equal shares of the operations.

    Every plan is compiled and timed in turns with the plain model, in eval mode and without gradients.

    Args:
        model: a module or function, as for torch.compile; it is left as it was found.
        inputs: as for ``tofu_fx.calibrate``. Speed is measured on the first batch, errors on all batches of its size (a
            shorter last batch would be compiled anew; it is left out).
        evaluate: a function that gets the model, compiled, and returns how good it is, higher is better (accuracy). It
            brings its own data; other batch sizes than the first batch's are compiled as they come.
        flops: shares of the plain model's operations, each in (0, 1).
        metric: without ``evaluate``: the error of the outputs, as for ``tofu_fx.calibrate``.
        inner_backend: what compiles plain and the reduced graphs.
        calibrated: whether to calibrate a plan for each budget, too; else only schedules that need none.
        seed: of the calibration.
        batch_size: at most so many samples in one call.
        progress: whether to show progress bars on stderr.

    Returns:
        The rows, with ``table()``, ``save_csv(path)`` and ``plot(path)``.

    Raises:
        CalibrationError: inputs, budgets or a model that cannot be used, or no schedule that reaches any budget.
    """
    budgets = _read_budgets(flops)
    if batch_size < 1:
        raise CalibrationError(f"batch_size: expected at least 1, got {batch_size}")
    # An iterator can be gone through once, and the inputs are needed several times.
    once = isinstance(inputs, Iterable) and not isinstance(inputs, (Tensor, tuple, Mapping, str, bytes))
    items = list(inputs) if once else inputs
    batches = read_batches(items, batch_size, model)
    batches = [batch for batch in batches if batch.samples == batches[0].samples]
    with Trial(model, Options()) as trial:
        found = None if evaluate else choose_metric(metric, trial.plain(batches[0]), trial.last_graph)
        plans = uniform_plans(model, items, budgets)
        missing = [
            f"{name} {budget:g}: the same r at every site never leaves so few operations"
            for name in UNIFORM
            for budget in budgets
            if (name, budget) not in plans
        ]
        if calibrated:
            for budget in budgets:
                try:
                    plans[CALIBRATED, budget] = calibrate(
                        model, items, flops=budget, metric=metric, seed=seed, batch_size=batch_size,
                        inner_backend=inner_backend, progress=progress,
                    )  # fmt: skip
                except RefusedInput:  # of the input, not of the budget
                    raise
                except CalibrationError as error:
                    missing.append(f"{CALIBRATED} {budget:g}: {error}")
        if not plans:
            raise CalibrationError(f"no schedule reaches flops={', '.join(map(str, budgets))}: " + "; ".join(missing))
        with Progress(progress) as bar:
            rows = _measure(model, batches, plans, evaluate, found, inner_backend, bar)
    return Sweep(
        rows=rows,
        measure=found.name if found else "score",
        batch=batches[0].samples,
        samples=sum(batch.samples for batch in batches) if found else 0,
        device=device_name(device_of(model, batches)),
        inner_backend=inner_backend,
        unreachable=missing,
    )


def _measure(
    model: Any,
    batches: Sequence[Batch],
    plans: Mapping[tuple[str, float], Plan],
    evaluate: Callable[[Any], float] | None,
    metric: OutputError | None,
    inner_backend: str,
    bar: Progress,
) -> list[SweepRow]:
    ways: dict[tuple[str, float | None], Plan | None] = {(PLAIN, None): None}
    for name in LINES:
        budgets = sorted((budget for schedule, budget in plans if schedule == name), reverse=True)
        ways.update({(name, budget): plans[name, budget] for budget in budgets})
    chosen = {way: {"plan": plan} if plan is not None else None for way, plan in ways.items()}
    bar.phase("counting operations", len(ways))
    shares = {}
    for way, options in chosen.items():
        shares[way] = 1.0 if options is None else share_of_flops(model, batches[0], options)
        bar.advance(1)
    torch._dynamo.reset()
    with room_for_variants():
        bar.phase(f"compiling with {inner_backend}", len(ways))
        compiled = {}
        for way, options in chosen.items():
            compiled[way] = compile_variant(model, options, inner_backend)
            call_with(compiled[way], batches[0])
            bar.advance(1)
        bar.phase("timing, in turns", 1)
        calls = {" ".join(map(str, way)): partial(call_with, run, batches[0]) for way, run in compiled.items()}
        timed = time_calls(calls, device_of(model, batches))
        bar.phase("quality", len(ways))
        plain = []
        for batch in batches if metric else ():
            with model_refusals(model, batch):
                plain.append(call_with(compiled[PLAIN, None], batch))
        rows = []
        for way, run in compiled.items():
            speed = timed[" ".join(map(str, way))]
            score = _score(evaluate, run) if evaluate else None
            error = _error(metric, run, batches, plain) if metric else None
            rows.append(SweepRow(*way, shares[way], speed.speedup, speed.seconds, score, error, ways[way]))
            bar.advance(1)
    return rows


def _read_budgets(flops: Sequence[float]) -> list[float]:
    if not isinstance(flops, Sequence) or isinstance(flops, str) or not flops:
        raise CalibrationError(f"flops: expected some shares of the operations, such as (0.75, 0.5), got {flops!r}")
    return [value for share in dict.fromkeys(flops) if (value := Target.read(flops=share).value) is not None]


def _score(evaluate: Callable[[Any], float], run: Any) -> float:
    value = evaluate(run)
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if math.isnan(score):
        raise CalibrationError(f"evaluate: the function must return a number, higher is better; it returned {value!r}")
    return score


def _error(metric: OutputError, run: Any, batches: Sequence[Batch], plain: Sequence[Any]) -> float:
    errors = [metric(call_with(run, batch), expected) for batch, expected in zip(batches, plain, strict=True)]
    return float(torch.cat(errors).mean())
