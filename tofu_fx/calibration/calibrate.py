"""``tofu_fx.calibrate``: a plan from a model, a few dozen inputs and a target."""

from __future__ import annotations

import platform
import random
import time
import warnings
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from typing import Any, Literal, get_args

import torch

from tofu_fx.backend import refuse_pipeline
from tofu_fx.calibration.batches import device_of, read_batches
from tofu_fx.calibration.decide import ATTEMPTS, PASSES, Decider, Decision, Policy, finite
from tofu_fx.calibration.linearity import STEPS
from tofu_fx.calibration.progress import Progress
from tofu_fx.calibration.rehearsal import Choice, Choices
from tofu_fx.calibration.sensitivity import candidates
from tofu_fx.calibration.survey import Survey
from tofu_fx.calibration.target import Target
from tofu_fx.calibration.timing import call_with, compile_variant, device_name, room_for_variants, time_calls
from tofu_fx.calibration.trial import Trial
from tofu_fx.calibration.uniform import plan_of, rows_of, with_matrices
from tofu_fx.errors import CalibrationError, TofuWarning
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.plan.records import Calibration, PlanRow

InnerBackend = Literal["inductor", "aot_eager", "eager"]


def calibrate(  # noqa: PLR0913 - a user names each of them
    model: Any,
    inputs: Any,
    *,
    speedup: float | None = None,
    flops: float | None = None,
    error: float | None = None,
    metric: Any = None,
    policy: Policy = "auto",
    seed: int = 0,
    batch_size: int = 16,
    inner_backend: InnerBackend = "inductor",
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Plan:
    """Measure a model on a few inputs and plan which of its layers lose how many tokens, and how.

    One target at most is given. Without one, the tokens of the default ratio are spread over the layers as the
    measurements say. The model is called in eval mode and without gradients, and is left as it was found.

    Args:
        model: a module or function, as for torch.compile.
        inputs: a tensor ``[samples, ...]``, a tuple of positional arguments, a dict of keyword arguments, or an
            iterable of these (a DataLoader; its labels are ignored). 32 to 64 samples are typical, in random order.
        speedup: how many times faster than the plain model, measured on this device with ``inner_backend``.
        flops: share of the plain model's operations that may be left, in (0, 1).
        error: how much error is allowed, in the metric's unit; then the fastest plan within it.
        metric: the error of outputs: "relative_l2", "kl", or a function of (outputs, plain outputs) that returns a
            number or one for each sample. By default KL in nats where the output is ``[B, classes]`` from a linear
            layer with a bias, else the relative L2 distance.
        policy: what chooses prune or merge: "sensitivity" (measured errors), "linearity" (the paper's score and a
            threshold), or "auto" (whichever has the lower measured error).
        seed: of the pairs of samples and of the search. The same seed gives the same plan, as far as times allow.
        batch_size: at most so many samples in one call.
        inner_backend: what compiles the graphs whose speed is measured.
        options: options of the backend that say where tokens may go: ``placement``, ``branches``, ``cell``, ``grid``,
            ``max_downsample``, ``proportional_attention``.
        progress: whether to show a progress bar on stderr.

    Returns:
        The plan: save it, edit it, pass it as ``options={"plan": ...}``. ``plan.calibration`` says what was measured.

    Raises:
        CalibrationError: inputs, a target or a model that calibration cannot work with; says what to do.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile returned stands for the model inside
    refuse_pipeline(model)
    target = Target.read(speedup=speedup, flops=flops, error=error)
    if not callable(model):
        raise CalibrationError(f"model: expected a module or a function, got {type(model).__name__}")
    for name, value, known in (("policy", policy, Policy), ("inner_backend", inner_backend, InnerBackend)):
        if value not in get_args(known):
            expected = ", ".join(map(repr, get_args(known)))
            raise CalibrationError(f"{name}: expected one of {expected}, got {value!r}")
    for name, number, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if type(number) is not int or number < least:
            raise CalibrationError(f"{name}: expected a whole number of at least {least}, got {number!r}")
    batches = read_batches(inputs, batch_size, model)
    if getattr(model, "training", False):
        warnings.warn(
            "tofu_fx: the model is in training mode; it is calibrated in eval mode and left in training mode",
            TofuWarning,
            stacklevel=2,
        )
    started = time.perf_counter()
    with Trial(model, _placing(options)) as trial, Progress(progress) as bar:
        survey = Survey(trial, batches, bar, random.Random(seed), metric)
        survey.run_plain()
        survey.measure_information(seed)
        _announce(survey, target)
        survey.measure_sites()
        decider = Decider(
            survey,
            target,
            policy,
            survey.operations(),
            survey.seconds(),
            lambda choices: _speed(survey, choices, inner_backend),
        )
        decision = decider.decide()
        rows = _rows(decider, decision)
        bare = with_matrices(trial, Plan(model=_name_of(model), sites=rows))
    calibration = Calibration(
        target=target.kind,
        value=None if target.kind == "none" else target.value,
        policy=decider.chosen_by,
        threshold=decider.threshold,
        metric=survey.metric.name,
        seed=seed,
        samples=survey.samples,
        forward_passes=round(survey.passes, 1),
        seconds=round(time.perf_counter() - started, 1),
        device=device_name(device_of(model, batches)),
        libraries=_libraries(),
        predicted=decision.predicted,
        measured=decision.measured,
        compared=decider.compared,
        notes=decider.notes,
    )
    return bare.model_copy(update={"calibration": calibration})


def _placing(options: Mapping[str, Any] | None) -> Options:
    """The options that calibration can be told; the others are what it decides."""
    known = ("placement", "branches", "cell", "grid", "max_downsample", "proportional_attention", "unread")
    for key in options or {}:
        if key not in known:
            raise CalibrationError(f"options: calibration takes {', '.join(known)}; it decides on {key!r} itself")
    return Options.parse(options)


def _announce(survey: Survey, target: Target) -> None:
    """Say how many forward passes there will be at most, before they start."""
    entries = survey.trial.rehearsed()
    attempts = ATTEMPTS if target.kind == "speedup" else 1
    survey.bar.say(
        f"calibrating {len(entries)} sites on {survey.samples} samples: at most "
        f"{sum(len(candidates(entry)) for entry in entries)} passes from one site on and "
        f"{2 * (STEPS + 1) * len(entries)} of single branches over {survey.samples_of(survey.few)} samples, and "
        f"{attempts * PASSES} whole passes"
    )


def _speed(survey: Survey, choices: Choices, inner_backend: str) -> float:
    """How many times faster than the plain model a plan is on the first batch, both compiled."""
    trial, batch = survey.trial, survey.batches[0]
    if not any(choice.r for choice in choices.values()) and not any(r.compilation.unread for r in trial.rehearsals):
        return 1.0
    survey.bar.phase(f"compiling with {inner_backend} and timing", 3)
    ways = {"plain": None, "plan": {"plan": plan_of(trial, choices), "unread": trial.options.unread}}
    with trial.set_aside(), room_for_variants():
        calls = {}
        for name, options in ways.items():
            compiled = compile_variant(trial.model, options, inner_backend)
            calls[name] = partial(call_with, compiled, batch)
            calls[name]()
            survey.bar.advance(1)
        timed = time_calls(calls, device_of(trial.model, survey.batches))
        survey.bar.advance(1)
    return timed["plan"].speedup


def _rows(decider: Decider, decision: Decision) -> list[PlanRow]:
    survey, predictor = decider.survey, decider.tuner.predictor
    names = [site.id for site in survey.trial.sites]
    shares = dict(zip(names, predictor.contributions(decision.choices), strict=True))
    rows = []
    for row in rows_of(survey.trial, decision.choices):
        if row.id not in shares:
            rows.append(row.model_copy(update={"reason": "fewer than two free tokens may arrive here"}))
            continue
        between, pairs = survey.linearity[row.id]
        measured = {
            "linearity": between,
            "pair_linearity": pairs,
            "error": finite(survey.metric.error(shares[row.id])),
            "reason": decider.reason(row.id, decision.choices.get(row.id, Choice())),
        }
        rows.append(row.model_copy(update=measured))
    return rows


def _libraries() -> dict[str, str]:
    known = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("tofu-fx", "timm", "transformers", "diffusers"):
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known


def _name_of(model: Any) -> str | None:
    """What the model calls itself, where it says so, else its class."""
    configured: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    config = getattr(model, "config", None)
    name = configured.get("architecture") or getattr(config, "name_or_path", "") or getattr(config, "_name_or_path", "")
    return str(name) or (type(model).__name__ if isinstance(model, torch.nn.Module) else None)
