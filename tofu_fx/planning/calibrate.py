"""``tofu_fx.calibrate``: a plan from a model, a few dozen inputs and a target."""

from __future__ import annotations

import math
import platform
import random
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, Literal

import torch

from tofu_fx.errors import CalibrationError, TofuWarning
from tofu_fx.options import Options
from tofu_fx.planning.batches import Batch, read_batches
from tofu_fx.planning.cost import CostModel, features, fit_weights
from tofu_fx.planning.linearity import STEPS, site_linearity, spread
from tofu_fx.planning.metrics import OutputError, choose_metric
from tofu_fx.planning.plan import Calibration, Figures, Plan, PlanRow, Spread
from tofu_fx.planning.progress import Progress
from tofu_fx.planning.rehearsal import Choice, Choices
from tofu_fx.planning.schedule import DEFAULT_RATIO
from tofu_fx.planning.schedule import spread as spread_evenly
from tofu_fx.planning.sensitivity import FIRST, Kind, Predictor, Sensitivity, candidates, kinds
from tofu_fx.planning.timing import compile_call, device_name, device_of, time_calls
from tofu_fx.planning.trial import Trial
from tofu_fx.planning.tuning import Tuner, with_kinds
from tofu_fx.planning.uniform import UNIFORM, uniform

Policy = Literal["auto", "sensitivity", "linearity"]

#: of the inputs, about as many are used to measure single sites; whole plans are measured on all
SITE_SAMPLES = 16
#: rounds of search, measurement and correction
ROUNDS = 8
#: shares of the sites that prune, by rising linearity, among which the threshold is chosen
PRUNED_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
#: a measured speed-up that is so near to the target has met it: medians of single runs differ by as much
NEAR = 0.98
#: times that a missed target is planned again
ATTEMPTS = 3


def calibrate(
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
    inner_backend: Literal["inductor", "aot_eager", "eager"] = "inductor",
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
        progress: whether to show a progress bar on stderr.

    Returns:
        The plan: save it, edit it, pass it as ``options={"plan": ...}``. ``plan.calibration`` says what was measured.

    Raises:
        CalibrationError: inputs, a target or a model that calibration cannot work with; says what to do.
    """
    target = Target.read(speedup=speedup, flops=flops, error=error)
    if policy not in ("auto", "sensitivity", "linearity"):
        raise CalibrationError(f"policy: expected 'auto', 'sensitivity' or 'linearity', got {policy!r}")
    if batch_size < 1:
        raise CalibrationError(f"batch_size: expected at least 1, got {batch_size}")
    batches = read_batches(inputs, batch_size, device_of(model) if isinstance(model, torch.nn.Module) else None)
    if getattr(model, "training", False):
        warnings.warn(
            "tofu_fx: the model is in training mode; it is calibrated in eval mode and left in training mode",
            TofuWarning,
            stacklevel=2,
        )
    started = time.perf_counter()
    with Trial(model, Options(proportional_attention="auto")) as trial, Progress(progress) as bar:
        run = _Run(trial, batches, target, policy, random.Random(seed), bar, inner_backend, metric)
        plan = run.plan()
    calibration = plan.calibration
    assert calibration is not None
    seconds = round(time.perf_counter() - started, 1)
    return plan.model_copy(update={"calibration": calibration.model_copy(update={"seed": seed, "seconds": seconds})})


@dataclass(frozen=True)
class Target:
    """What the plan is made for."""

    kind: Literal["speedup", "flops", "error", "none"]
    value: float | None

    @classmethod
    def read(cls, **given: float | None) -> Target:
        """The one target that was given.

        Raises:
            CalibrationError: two targets, or one that nothing can meet.
        """
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) > 1:
            raise CalibrationError(f"give one target, not {' and '.join(named)}: each decides how many tokens go")
        if not named:
            return cls("none", None)
        ((name, value),) = named.items()
        ranges = {"speedup": (1.0, math.inf), "flops": (0.0, 1.0), "error": (0.0, math.inf)}
        low, high = ranges[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
            expected = f"a number above {low:g}" + (f" and below {high:g}" if high < math.inf else "")
            raise CalibrationError(f"{name}: expected {expected}, got {value!r}")
        return cls(name, float(value))  # type: ignore[arg-type]


@dataclass
class _Run:
    """One calibration, phase by phase."""

    trial: Trial
    batches: list[Batch]
    target: Target
    policy: Policy
    random: random.Random
    bar: Progress
    inner_backend: str
    user_metric: Any
    notes: list[str] = field(default_factory=list)
    linearity: dict[str, tuple[Spread | None, Spread | None]] = field(default_factory=dict)
    sensitivity: dict[str, Sensitivity] = field(default_factory=dict)
    threshold: float | None = None
    chosen_by: Literal["sensitivity", "linearity"] = "sensitivity"
    compared: dict[str, Figures] = field(default_factory=dict)

    def plan(self) -> Plan:
        """All phases."""
        plain = self._plain_outputs()
        metric = choose_metric(self.user_metric, plain[0], self.trial.last_graph)
        self.metric = metric
        self._announce()
        numbers = self._site_batches()
        self._measure_sites(numbers, plain, metric)
        costs = self._time_model()
        self.tuner = Tuner(
            self.trial, self.batches, plain, metric, costs, self._predictor(), self._best_kinds(), self._multiple(),
            self.random, self.bar.advance,
        )  # fmt: skip
        choices, predicted, measured = self._meet_target(numbers)
        return self._write(choices, predicted, measured)

    # ---- what the model does -----------------------------------------------------------------------------------------

    def _plain_outputs(self) -> list[Any]:
        self.bar.phase("plain model", len(self.batches))
        plain = []
        for number, batch in enumerate(self.batches):
            outputs = self.trial.plain(batch)
            for value in torch.utils._pytree.tree_leaves(outputs):
                if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any()):
                    raise CalibrationError(
                        f"the plain model's outputs hold NaN for calibration batch {number}: nothing can be compared "
                        "with them; check the weights and the inputs"
                    )
            plain.append(outputs)
            self.bar.advance(1)
        self.trial.require_sites()
        return plain

    def _announce(self) -> None:
        """Say how many forward passes there will be at most, before they start."""
        sites = self.trial.rehearsed()
        tried = sum(len(candidates(entry)) for entry in sites)
        whole = len(PRUNED_SHARES) + 4 + ATTEMPTS * (ROUNDS + 1) + 4
        samples = sum(batch.samples for batch in self.batches)
        self.bar.say(
            f"calibrating {len(sites)} sites on {samples} samples: at most {tried} passes from one site on over "
            f"{min(SITE_SAMPLES, samples)} samples or so, {len(sites) * 2 * (STEPS + 1)} passes of single branches, "
            f"and {whole} whole passes"
        )

    def _site_batches(self) -> list[int]:
        """The batches on which single sites are measured."""
        numbers: list[int] = []
        samples = 0
        for number, batch in enumerate(self.batches):
            if samples < SITE_SAMPLES:
                numbers.append(number)
                samples += batch.samples
        return numbers

    def _measure_sites(self, numbers: list[int], plain: list[Any], metric: OutputError) -> None:
        """Linearity and sensitivity of every site."""
        entries = self.trial.rehearsed()
        self.sensitivity = {entry.site.id: Sensitivity(entry.site) for entry in entries}
        errors: dict[tuple[str, Choice], list[float]] = {}
        between: dict[str, list[torch.Tensor]] = {}
        pairs: dict[str, list[torch.Tensor]] = {}
        self.bar.phase("single sites", len(numbers) * sum(1 + len(candidates(entry)) for entry in entries))
        for number in numbers:
            batch = self.batches[number]
            again = metric(self.trial.record(batch), plain[number])
            self._check_repeatable(float(again.mean()), metric)
            for entry in entries:
                found = self.trial.recorded(entry)
                if found is not None:
                    order = torch.tensor(_paired(batch.samples, self.random))
                    values = self._linearity_of(entry, found, order)
                    if values is not None:
                        between.setdefault(entry.site.id, []).append(values[0].cpu())
                        pairs.setdefault(entry.site.id, []).append(values[1].cpu())
                self.bar.advance(1)
                for choice in candidates(entry):
                    outputs = self.trial.reduced(batch, {entry.site.id: choice})
                    errors.setdefault((entry.site.id, choice), []).extend(metric(outputs, plain[number]).tolist())
                    self.bar.advance(1)
        self.trial.forget()
        for (name, choice), values_of in errors.items():
            mean = sum(values_of) / len(values_of)
            loss = max(mean, 0.0) ** metric.power if math.isfinite(mean) else math.inf
            self.sensitivity[name].measured[choice] = loss
        for entry in entries:
            name = entry.site.id
            self.linearity[name] = spread(between.get(name, [])), spread(pairs.get(name, []))

    def _linearity_of(self, entry: Any, found: Any, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        rehearsal, inputs, start = found
        x = start.values[entry.fuse.args[0]]
        if x.shape[0] != len(order):  # several batch axes in one: pairs of samples are pairs of their rows
            order = torch.arange(x.shape[0]).roll(1)
        return site_linearity(rehearsal, entry, inputs, start, order.to(x.device))

    def _check_repeatable(self, error: float, metric: OutputError) -> None:
        if not error <= 0.01:
            raise CalibrationError(
                f"two calls of the model with the same inputs differ by {error:.3g} ({metric.name}) although nothing "
                "was reduced: a model that is random in eval mode cannot be calibrated"
            )

    # ---- cost --------------------------------------------------------------------------------------------------------

    def _time_model(self) -> list[CostModel]:
        """The cost model of each graph: operations for a target in operations, else seconds on this device."""
        models = [CostModel.of(rehearsal) for rehearsal in self.trial.rehearsals]
        if self.target.kind in ("flops", "none"):
            return models
        batch = self.batches[0].split(max(1, self.batches[0].samples // 2))[0]
        profiles = [self._removing(share) for share in (0.0, 0.03, 0.1, 0.25, 0.5)]
        self.bar.phase("cost model", len(profiles))
        rows, seconds = [], []
        for choices in profiles:
            self.trial.reduced(batch, choices)
            timed = time_calls(
                {"plan": lambda choices=choices: self.trial.reduced(batch, choices)},  # type: ignore[misc]
                device_of(self.trial.model, [batch]),
                rounds=3,
                warmup=0,
            )
            seconds.append(timed["plan"].seconds)
            parts = [features(m, r, choices) for m, r in zip(models, self.trial.rehearsals, strict=True)]
            rows.append([sum(column) for column in zip(*parts, strict=True)])
            self.bar.advance(1)
        flop, byte, reduction, constant = fit_weights(rows, seconds)
        if flop == byte == 0:  # the time does not hang on the tokens: count operations
            self.notes.append("the time of a forward pass does not depend on its tokens here; operations were planned")
            return models
        weights = {"per_flop": flop, "per_byte": byte, "per_reduction": reduction}
        return [replace(m, **weights, constant=constant if i == 0 else 0.0) for i, m in enumerate(models)]

    def _removing(self, share: float) -> Choices:
        """The same share of the arriving tokens gone at every site."""
        choices, left = {}, dict[Any, int]()
        for site in self.trial.sites:
            stream = self.trial.stream_of[site.id]
            count = left.setdefault(stream, site.tokens)
            r = min(round(share * count), site.cap(count))
            if r:
                choices[site.id] = Choice(*FIRST, r)
            left[stream] = count - r
        return choices

    def _multiple(self) -> int:
        """Token counts that this device's kernels like; any where there are few tokens."""
        most = max(site.tokens for site in self.trial.sites)
        wanted = 8 if device_of(self.trial.model, self.batches).type == "cuda" else 4
        return wanted if most >= 16 * wanted else 1

    # ---- deciding ----------------------------------------------------------------------------------------------------

    def _predictor(self) -> Predictor:
        kinds_of = self._best_kinds()
        curves = {name: found.curves() for name, found in self.sensitivity.items()}
        chosen = {name: found[kinds_of[name]] for name, found in curves.items() if kinds_of[name] in found}
        sites = self.trial.sites
        return Predictor(sites, self.trial.stream_of, chosen, dict.fromkeys((site.id for site in sites), 1.0))

    def _best_kinds(self) -> dict[str, Kind]:
        """The kind of least measured error at each site."""
        return {name: self._best_kind(found, None) for name, found in self.sensitivity.items()}

    def _best_kind(self, found: Sensitivity, strategy: str | None) -> Kind:
        curves = {kind: c for kind, c in found.curves().items() if strategy is None or kind[0] == strategy}
        fallback = (strategy or FIRST[0], FIRST[1])
        return min(curves, key=lambda kind: curves[kind].errors[-1], default=fallback)

    def _score(self, name: str) -> Spread | None:
        """A site's linearity: between samples where there are several, else between tokens."""
        between, pairs = self.linearity[name]
        return between or pairs

    def _kinds_by_linearity(self, pruned: float) -> tuple[dict[str, Kind], float]:
        """Prune at the share of the sites whose linearity is lowest, merge at the others; and the threshold."""
        known = {name: score.mean for name in self.linearity if (score := self._score(name)) is not None}
        ranked = sorted(known.values())
        count = round(pruned * len(ranked))
        if count in (0, len(ranked)):
            threshold = 0.0 if count == 0 else 1.0 + 1e-9
        else:
            threshold = (ranked[count - 1] + ranked[count]) / 2
        decided = {}
        for name, found in self.sensitivity.items():
            strategy = "prune" if known.get(name, 1.0) < threshold else "mlerp"
            decided[name] = self._best_kind(found, strategy)
        return decided, threshold

    def _budget(self) -> float:
        """The cost that the target allows; for an error the cost is what is searched for."""
        plain = self.tuner.cost({})
        if self.target.kind == "speedup":
            assert self.target.value is not None
            return plain / self.target.value
        if self.target.kind == "flops":
            assert self.target.value is not None
            return plain * self.target.value
        choices = {
            site.id: Choice(*FIRST, r)
            for members in self.trial.streams()
            for site, r in zip(members, spread_evenly(members[0].tokens, DEFAULT_RATIO, len(members)), strict=True)
        }
        return self.tuner.cost(choices)

    def _meet_target(self, numbers: list[int]) -> tuple[Choices, Figures, Figures]:
        if self.target.kind == "error":
            return self._meet_error(numbers)
        budget = self._budget()
        plain = self.tuner.cost({})
        attempts = ATTEMPTS if self.target.kind == "speedup" else 1
        fastest = 0.0
        for attempt in range(attempts):
            if budget < self.tuner.cheapest() and attempt == 0:
                raise CalibrationError(self._cannot(plain / self.tuner.cheapest(), self._least_flops()))
            choices = self._search(budget, numbers)
            if choices is None:
                break
            predicted = self._predicted(choices)
            measured = self._measured(choices)
            fastest = max(fastest, measured.speedup or 0.0)
            if self.target.kind != "speedup":
                return choices, predicted, measured
            assert self.target.value is not None
            assert measured.speedup is not None
            if measured.speedup >= NEAR * self.target.value:
                return choices, predicted, measured
            self.notes.append(
                f"attempt {attempt + 1} reached {measured.speedup:.2f}x, not {self.target.value:g}x: planned again "
                "with less time"
            )
            self.bar.say(self.notes[-1])
            budget *= 0.99 * measured.speedup / self.target.value
        raise CalibrationError(self._cannot(fastest, self._least_flops()))

    def _cannot(self, speedup: float, flops: float) -> str:
        if self.target.kind == "flops":
            return f"flops={self.target.value:g} cannot be reached: the least that this model can do is {flops:.3f}"
        return f"speedup={self.target.value:g} cannot be reached: the best that this model can do is {speedup:.2f}x"

    def _least_flops(self) -> float:
        front = self.tuner.front()
        return self.tuner.flops(self.tuner.choices(front.removed[int(front.cost.argmin())]))

    def _search(self, budget: float, numbers: list[int]) -> Choices | None:
        """The best plan found within a cost, and how the other ways to choose compare."""
        tuner = self.tuner
        self.bar.phase("plans", len(PRUNED_SHARES) + 3 + ROUNDS + 5)
        first = tuner.within_cost(budget)
        if first is None:
            return None
        if self.threshold is None:
            self._choose_kinds(first, numbers)
        tuner.measure(with_kinds(first, tuner.kinds))
        schedules = {name: uniform(self.trial, tuner.cost, budget, kind_of) for name, kind_of in UNIFORM.items()}
        compared = {name: tuner.measure(choices) for name, choices in schedules.items() if choices is not None}
        tuner.refit()
        tuner.refine(budget, ROUNDS)
        best = tuner.best(budget)
        self.compared = {
            name: Figures(error=tuner.error(found.loss), flops=round(tuner.flops(found.choices), 4))
            for name, found in compared.items()
        }
        return best.choices if best is not None else None

    def _choose_kinds(self, first: Choices, numbers: list[int]) -> None:
        """Which kinds the sites get: by sensitivity, one everywhere, or by linearity with the best threshold."""
        tuner = self.tuner
        names = [site.id for site in self.trial.sites]
        matches = sorted({match for e in self.trial.rehearsed() for _, match in kinds(e)})
        by_measure: list[dict[str, Kind]] = [self._best_kinds()]
        by_measure += [{name: ("mlerp", match) for name in names} for match in matches]
        available = {e.site.id: e.metrics for e in self.trial.rehearsed()}
        usable = [kinds_of for kinds_of in by_measure if all(kinds_of[name][1] in available[name] for name in names)]
        losses = [tuner.loss(with_kinds(first, kinds_of), numbers) for kinds_of in usable]
        by_linearity = [self._kinds_by_linearity(share) for share in PRUNED_SHARES]
        linear = [tuner.loss(with_kinds(first, kinds_of), numbers) for kinds_of, _ in by_linearity]
        place = linear.index(min(linear))
        self.threshold = by_linearity[place][1]
        least, least_linear = tuner.error(min(losses)), tuner.error(linear[place])
        verdict = "a lower" if least_linear < least else "no lower"
        self.notes.append(
            f"prune or merge by linearity (threshold {self.threshold:.3f}) has {verdict} error than by measured "
            f"sensitivity: {least_linear:.4g} and {least:.4g} on {sum(self.batches[n].samples for n in numbers)} samples"
        )
        linearity = self.policy == "linearity" or (self.policy == "auto" and least_linear < least)
        self.chosen_by = "linearity" if linearity else "sensitivity"
        tuner.kinds = by_linearity[place][0] if linearity else usable[losses.index(min(losses))]
        curves = {name: found.curves() for name, found in self.sensitivity.items()}
        chosen = {name: found[tuner.kinds[name]] for name, found in curves.items() if tuner.kinds[name] in found}
        tuner.predictor = replace(tuner.predictor, curves=chosen)

    def _meet_error(self, numbers: list[int]) -> tuple[Choices, Figures, Figures]:
        """The cheapest measured plan within the error."""
        assert self.target.value is not None
        tuner, limit = self.tuner, self.target.value**self.metric.power
        self.bar.phase("plans", len(PRUNED_SHARES) + 4 + ROUNDS)
        wanted = tuner.within_loss(limit)
        if wanted:
            self._choose_kinds(wanted, numbers)
        # Between a plan that is too coarse and one that is fine, the correct prediction or else the middle is next.
        coarse, fine = tuner.cheapest(), tuner.cost({})
        for _ in range(ROUNDS):
            choices = tuner.within_loss(limit)
            if not choices or not coarse < tuner.cost(choices) < fine:
                choices = tuner.within_cost((coarse + fine) / 2)
            if not choices or tuner.key(choices) in tuner.measured:
                break
            found = tuner.measure(choices)
            if found.loss > limit:
                coarse = max(coarse, tuner.cost(choices))
            else:
                fine = min(fine, tuner.cost(choices))
            tuner.refit()
        fitting = [c for c in tuner.measured.values() if c.choices and c.loss <= limit]
        if not fitting:
            least = min(
                (tuner.error(e) for s in self.sensitivity.values() for e in s.measured.values()), default=math.nan
            )
            raise CalibrationError(
                f"error={self.target.value:g} ({self.metric.name}) cannot be met by any plan that was tried: the least "
                f"error of removing tokens at a single site was {least:.3g}"
            )
        best = min(fitting, key=lambda candidate: tuner.cost(candidate.choices))
        return best.choices, self._predicted(best.choices), self._measured(best.choices)

    # ---- the plan ----------------------------------------------------------------------------------------------------

    def _predicted(self, choices: Choices) -> Figures:
        tuner = self.tuner
        loss = sum(tuner.predictor.contributions(choices))
        in_time = self.target.kind in ("speedup", "error")
        return Figures(
            error=tuner.error(loss),
            flops=round(tuner.flops(choices), 4),
            speedup=round(tuner.cost({}) / tuner.cost(choices), 3) if in_time else None,
        )

    def _measured(self, choices: Choices) -> Figures:
        """Error on all inputs, and speed against the plain model, both compiled."""
        tuner, device = self.tuner, device_of(self.trial.model, self.batches)
        found = tuner.measure(choices)
        batch = self.batches[0]
        self.bar.phase(f"compiling with {self.inner_backend} and timing", 3)
        plan = Plan(sites=self._rows(choices))
        with self.trial.set_aside():
            calls = {"plain": compile_call(self.trial.model, batch, None, self.inner_backend)}
            self.bar.advance(1)
            if choices:
                calls["plan"] = compile_call(self.trial.model, batch, {"plan": plan}, self.inner_backend)
            self.bar.advance(1)
            timed = time_calls(calls, device)
            self.bar.advance(1)
        return Figures(
            error=tuner.error(found.loss),
            flops=round(tuner.flops(choices), 4),
            speedup=round(timed["plan"].speedup if choices else 1.0, 3),
        )

    def _rows(self, choices: Choices) -> list[PlanRow]:
        tuner = self.tuner
        contributions = dict(zip((s.id for s in self.trial.sites), tuner.predictor.contributions(choices), strict=True))
        rows = []
        for site in self.trial.sites:
            choice = choices.get(site.id, Choice(*tuner.kinds[site.id], 0))
            between, pair = self.linearity[site.id]
            rows.append(
                PlanRow.of(site, self.trial.graph_of[site.id]).model_copy(
                    update={
                        "strategy": choice.strategy,
                        "match": choice.match,
                        "r": choice.r,
                        "linearity": between,
                        "pair_linearity": pair,
                        "error": tuner.error(contributions[site.id]) if choice.r else 0.0,
                        "reason": self._reason(site.id, choice),
                    }
                )
            )
        return rows

    def _reason(self, name: str, choice: Choice) -> str:
        curves = self.sensitivity[name].curves()
        if not curves:
            return "every candidate gave outputs that are no numbers"
        if not choice.r:
            return "tokens are cheaper to remove elsewhere"
        error = self.tuner.error
        merge = min((c.errors[-1] for kind, c in curves.items() if kind[0] == "mlerp"), default=math.inf)
        prune = min((c.errors[-1] for kind, c in curves.items() if kind[0] == "prune"), default=math.inf)
        said = f"alone, half of its tokens merged cost {error(merge):.3g}, pruned {error(prune):.3g}"
        if self.chosen_by == "linearity":
            score = self._score(name)
            side = "below" if choice.strategy == "prune" else "not below"
            return f"linearity {score.mean if score else math.nan:.3f} is {side} {self.threshold:.3f}; {said}"
        return said

    def _write(self, choices: Choices, predicted: Figures, measured: Figures) -> Plan:
        device = device_of(self.trial.model, self.batches)
        calibration = Calibration(
            target=self.target.kind,
            value=self.target.value,
            policy=self.chosen_by,
            threshold=self.threshold,
            metric=self.metric.name,
            seed=0,
            samples=self.tuner.samples,
            forward_passes=round(self.tuner.passes, 1),
            seconds=0.0,
            device=device_name(device),
            libraries=_libraries(),
            predicted=predicted,
            measured=measured,
            compared=self.compared,
            notes=self.notes,
        )
        return Plan(model=_name_of(self.trial.model), calibration=calibration, sites=self._rows(choices))


def _paired(samples: int, rng: random.Random) -> list[int]:
    """A partner for each sample, itself for none (of several)."""
    order = list(range(samples))
    rng.shuffle(order)
    partner = [0] * samples
    for place, sample in enumerate(order):
        partner[sample] = order[(place + 1) % samples]
    return partner


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
