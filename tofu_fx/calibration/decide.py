"""From a survey and a target to a plan that was measured: which kinds of reduction, how many tokens where."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from tofu_fx.calibration.batches import device_of
from tofu_fx.calibration.cost import CostModel
from tofu_fx.calibration.fisher import COLUMNS
from tofu_fx.calibration.kinds import best_kind, by_linearity, curves_of
from tofu_fx.calibration.rehearsal import Choice, Choices
from tofu_fx.calibration.sensitivity import Kind, Predictor, first_kind, kinds
from tofu_fx.calibration.survey import Survey
from tofu_fx.calibration.target import Target
from tofu_fx.calibration.tune import Tuner
from tofu_fx.calibration.uniform import UNIFORM, uniform
from tofu_fx.errors import CalibrationError
from tofu_fx.plan.records import Figures
from tofu_fx.plan.schedule import DEFAULT_RATIO, spread

Policy = Literal["auto", "sensitivity", "linearity"]

#: rounds of search, measurement and correction
ROUNDS = 8
#: shares of the sites that prune, by rising linearity, among which the threshold is chosen
PRUNED_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
#: a measured speed-up that is so near to the target has met it: medians of single runs differ by as much
NEAR = 0.98
#: times that a speed-up is planned for before it is given up
ATTEMPTS = 3
#: whole passes over the inputs at most, for one attempt
PASSES = len(PRUNED_SHARES) + 8 + len(COLUMNS) + 1 + len(UNIFORM) + ROUNDS


@dataclass
class Decision:
    """The plan that was chosen, with what was predicted of it and measured."""

    choices: Choices
    predicted: Figures
    measured: Figures


@dataclass
class Decider:
    """Plans for one survey.

    ``operations`` and ``seconds`` are the cost models of its graphs; ``seconds`` is None where a forward pass takes as
    long with fewer tokens. ``speed_of`` compiles and times choices against the plain model.
    """

    survey: Survey
    target: Target
    policy: Policy
    operations: list[CostModel]
    seconds: list[CostModel] | None
    speed_of: Callable[[Choices], float]
    notes: list[str] = field(default_factory=list)
    compared: dict[str, Figures] = field(default_factory=dict)
    threshold: float | None = None
    chosen_by: Literal["sensitivity", "linearity"] = "sensitivity"

    def __post_init__(self) -> None:
        best = {name: best_kind(found) for name, found in self.survey.sensitivity.items()}
        trial = self.survey.trial
        weights = dict.fromkeys((site.id for site in trial.sites), 1.0)
        predictor = Predictor(trial.sites, trial.stream_of, curves_of(self.survey, best), weights)
        timed = self.target.kind in ("speedup", "error")
        if self.seconds is None:
            instead = ": operations were planned instead of time" if timed else ""
            self.notes.append(f"a forward pass takes as long with fewer tokens here{instead}")
        costs = (self.seconds if timed else None) or self.operations
        self.tuner = Tuner(self.survey, costs, predictor, best, self._multiple())

    def decide(self) -> Decision:
        """The plan for the target.

        Raises:
            CalibrationError: the target cannot be met; says what can.
        """
        if self.target.kind == "error":
            return self._meet_error()
        if self.target.kind == "speedup":
            return self._meet_speedup()
        budget = self._default_budget() if self.target.kind == "none" else self.target.value * self.tuner.plain
        choices = self._search(budget)
        if choices is None:
            raise CalibrationError(
                f"flops={self.target.value:g} cannot be reached: the least that this model can do is "
                f"{self._least_flops():.3f}"
            )
        return self._decision(choices)

    def _decision(self, choices: Choices) -> Decision:
        tuner, metric = self.tuner, self.survey.metric
        flops, seconds = round(tuner.flops(choices), 4), self.seconds or ()
        plain, reduced = sum(model.plain for model in seconds), sum(model.total(choices) for model in seconds)
        predicted = Figures(
            error=finite(metric.error(sum(tuner.predictor.contributions(choices)))),
            flops=flops,
            speedup=round(plain / reduced, 3) if reduced else None,
        )
        measured = Figures(
            error=finite(metric.error(tuner.measure(choices).loss)),
            flops=flops,
            speedup=round(self.speed_of(choices), 3),
        )
        return Decision(choices, predicted, measured)

    # ---- targets -----------------------------------------------------------------------------------------------------

    def _default_budget(self) -> float:
        """The cost of the schedule without calibration: the default ratio, spread evenly."""
        trial = self.survey.trial
        wanted = {
            site.id: r
            for members in trial.streams()
            for site, r in zip(members, spread(members[0].tokens, DEFAULT_RATIO, len(members)), strict=True)
        }
        removed = trial.limited(wanted)
        return self.tuner.cost({site.id: Choice(*first_kind(site), removed[site.id]) for site in trial.sites})

    def _meet_speedup(self) -> Decision:
        tuner, wanted = self.tuner, self.target.value
        plain = tuner.plain
        budget, fastest = plain / wanted, 0.0
        if budget < tuner.cheapest():
            self.notes.append("by the cost model no plan is that fast; the fastest was measured")
            budget = tuner.cheapest() * (1 + 1e-6)
        for attempt in range(ATTEMPTS):
            choices = self._search(budget)
            if choices is None:
                break
            decision = self._decision(choices)
            assert decision.measured.speedup is not None
            if decision.measured.speedup >= NEAR * wanted:
                return decision
            fastest = max(fastest, decision.measured.speedup)
            self.notes.append(
                f"attempt {attempt + 1} was measured at {decision.measured.speedup:.2f}x, not {wanted:g}x: planned "
                "again with less time"
            )
            self.survey.bar.say(self.notes[-1])
            budget = max(budget * 0.99 * decision.measured.speedup / wanted, tuner.cheapest() * (1 + 1e-6))
        raise CalibrationError(
            f"speedup={wanted:g} cannot be reached: the best that was measured is {fastest:.2f}x, at "
            f"{self._least_flops():.2f} of the operations at least"
        )

    def _meet_error(self) -> Decision:
        """The cheapest measured plan within the error."""
        tuner, metric = self.tuner, self.survey.metric
        limit = self.target.value**metric.power
        self.survey.bar.phase("plans", PASSES)
        wanted = tuner.within_loss(limit)
        if wanted:
            self._choose_kinds(tuner.cost(wanted))
        # Between a plan that is too coarse and one that is fine, the corrected prediction or else the middle is next.
        coarse, fine = tuner.cheapest(), tuner.cost({})
        for _ in range(ROUNDS):
            choices = tuner.within_loss(limit)
            if not choices or not coarse < tuner.cost(choices) < fine:
                choices = tuner.within_cost((coarse + fine) / 2)
            if not choices or tuner.key(choices) in tuner.measured:
                break
            if tuner.measure(choices).loss > limit:
                coarse = max(coarse, tuner.cost(choices))
            else:
                fine = min(fine, tuner.cost(choices))
            tuner.refit()
        fitting = [found for found in tuner.measured.values() if found.choices and found.loss <= limit]
        if not fitting:
            tried = [loss for found in self.survey.sensitivity.values() for loss in found.measured.values()]
            tried += [found.loss for found in tuner.measured.values() if found.choices]
            raise CalibrationError(
                f"error={self.target.value:g} ({metric.name}) cannot be met: the least error of all reductions that "
                f"were tried is {metric.error(min(tried)):.3g}"
            )
        return self._decision(min(fitting, key=lambda found: tuner.cost(found.choices)).choices)

    def _least_flops(self) -> float:
        front = self.tuner.front()
        return self.tuner.flops(self.tuner.choices(front.removed[int(front.cost.argmin())]))

    # ---- the search --------------------------------------------------------------------------------------------------

    def _search(self, budget: float) -> Choices | None:
        """The best plan found within a cost; None where there is none. Others are measured beside it."""
        tuner, metric = self.tuner, self.survey.metric
        self.survey.bar.phase("plans", PASSES)
        if self.threshold is None:
            self._choose_kinds(budget)
        if tuner.within_cost(budget) is None:
            return None
        first = tuner.within_cost(budget)
        if first is not None:
            tuner.measure(first)
        schedules = {name: uniform(tuner.trial, tuner.cost, budget, kind_of) for name, kind_of in UNIFORM.items()}
        compared = {name: tuner.measure(choices) for name, choices in schedules.items() if choices is not None}
        self.compared = {
            name: Figures(error=finite(metric.error(found.loss)), flops=round(tuner.flops(found.choices), 4))
            for name, found in compared.items()
        }
        tuner.refit()
        tuner.refine(budget, ROUNDS)
        best = tuner.best(budget)
        if best is None:
            raise CalibrationError(
                "every plan that was tried gave outputs (or errors) that are no numbers, although the plain model's are"
            )
        return best.choices

    def _multiple(self) -> int:
        """Token counts that this device's kernels like; any where there are few tokens."""
        survey = self.survey
        most = max(site.tokens for site in survey.trial.sites)
        wanted = 8 if device_of(survey.trial.model, survey.batches).type == "cuda" else 4
        return wanted if most >= 16 * wanted else 1

    # ---- prune or merge --------------------------------------------------------------------------------------------

    def _choose_kinds(self, budget: float) -> None:
        """Give each site its kind: by sensitivity, one everywhere, or by linearity with the best threshold.

        Each way to choose has a plan of its own within the budget: kinds differ in what their matching costs.
        """
        survey, tuner = self.survey, self.tuner
        entries = survey.trial.rehearsed()
        ways = [tuner.kinds]
        ways += [dict.fromkeys(survey.sensitivity, kind) for kind in kinds(entries[0])[:-1]]
        ways = [way for way in ways if all(way[entry.site.id] in kinds(entry) for entry in entries)]
        thresholds = [by_linearity(survey, share) for share in PRUNED_SHARES]
        losses = [self._loss_of(way, budget) for way in ways]
        linear = [self._loss_of(way, budget) for way, _ in thresholds]
        place, linear_place = losses.index(min(losses)), linear.index(min(linear))
        self.threshold = thresholds[linear_place][1]
        better = linear[linear_place] < losses[place]
        self.notes.append(
            f"prune or merge by linearity (threshold {self.threshold:.3f}): error "
            f"{survey.metric.error(linear[linear_place]):.4g}, by measured sensitivity "
            f"{survey.metric.error(losses[place]):.4g}, at the same cost, on {survey.samples_of(survey.few)} samples"
        )
        linearity = self.policy == "linearity" or (self.policy == "auto" and better)
        self.chosen_by = "linearity" if linearity else "sensitivity"
        tuner.kinds = thresholds[linear_place][0] if linearity else ways[place]
        tuner.predictor = replace(tuner.predictor, curves=curves_of(survey, tuner.kinds))
        if any(match == "fisher" for _, match in tuner.kinds.values()):
            self._choose_columns(budget)

    def _choose_columns(self, budget: float) -> None:
        """Give the matrices of "fisher" the number of columns with which the best plan has the least error."""
        survey = self.survey
        losses = {}
        for columns in COLUMNS:
            survey.trial.project({name: matrix[:, :columns] for name, matrix in survey.information.items()})
            losses[columns] = self._loss_of(self.tuner.kinds, budget)
        best = min(losses, key=lambda columns: losses[columns])
        survey.trial.project({name: matrix[:, :best] for name, matrix in survey.information.items()})
        told = ", ".join(f"{survey.metric.error(loss):.4g} with {columns}" for columns, loss in losses.items())
        self.notes.append(f"columns of the matrices by which tokens are compared: {best} (error {told})")

    def _loss_of(self, way: dict[str, Kind], budget: float) -> float:
        """The loss of the plan that is the best with these kinds, on the samples of the survey."""
        predictor = replace(self.tuner.predictor, curves=curves_of(self.survey, way))
        plan = replace(self.tuner, kinds=way, predictor=predictor).within_cost(budget)
        return math.inf if plan is None else self.tuner.loss(plan, self.survey.few)

    def reason(self, name: str, choice: Choice) -> str:
        """Why a site got what it got, in words."""
        curves = self.survey.sensitivity[name].curves()
        if not curves:
            return "every candidate gave outputs that are no numbers"
        if not choice.r:
            return "tokens are cheaper to remove elsewhere"
        lowest = [
            min((c.errors[-1] for kind, c in curves.items() if (kind[0] == "prune") == prune), default=math.nan)
            for prune in (False, True)
        ]
        merged, pruned = (self.survey.metric.error(error) for error in lowest)
        said = f"alone, half of its tokens merged cost {merged:.3g}, pruned {pruned:.3g}"
        score = self.survey.score(name)
        if self.chosen_by == "sensitivity" or score is None:
            return said
        side = "below" if choice.strategy == "prune" else "not below"
        return f"linearity {score.mean:.3f} is {side} {self.threshold:.3f}; {said}"


def finite(value: float) -> float | None:
    """JSON has no infinity: what is no number is not known."""
    return value if math.isfinite(value) else None
