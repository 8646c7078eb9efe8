"""From sensitivities to a plan: search, measure, correct the prediction, search again.

Works in the power of the error in which the sites' errors add up (`OutputError.power`); "loss" stands for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from tofu_fx.calibration.cost import CostModel, share_of_operations
from tofu_fx.calibration.pareto import Front, Stage, combine, search
from tofu_fx.calibration.rehearsal import Choice, Choices
from tofu_fx.calibration.sensitivity import Kind, Predictor
from tofu_fx.calibration.survey import Survey
from tofu_fx.calibration.trial import Trial
from tofu_fx.sites.site import Planned

#: plans that are within this share of the least predicted loss are equal: the one with fewer token counts is taken
EQUAL = 0.005


@dataclass(frozen=True)
class Candidate:
    """A plan that was measured on the calibration inputs."""

    choices: Choices
    loss: float


@dataclass
class Tuner:
    """The search for a plan on one model: what is known of it, and the plans measured so far."""

    survey: Survey
    costs: Sequence[CostModel]
    predictor: Predictor
    kinds: dict[str, Kind]
    multiple: int
    measured: dict[tuple[Any, ...], Candidate] = field(default_factory=dict)

    @property
    def trial(self) -> Trial:
        """The model."""
        return self.survey.trial

    # ---- measuring -------------------------------------------------------------------------------------------------

    def measure(self, choices: Choices) -> Candidate:
        """Run all inputs under some choices (once for each choices)."""
        key = self.key(choices)
        if key not in self.measured:
            self.measured[key] = Candidate(dict(choices), self.loss(choices, range(len(self.survey.batches))))
        return self.measured[key]

    def loss(self, choices: Choices, numbers: Sequence[int]) -> float:
        """The loss over some of the batches; infinite where an output is not a number."""
        survey, errors = self.survey, list[float]()
        for number in numbers:
            outputs = self.trial.reduced(survey.batches[number], choices)
            errors.extend(survey.errors(outputs, number))
        survey.passes += survey.samples_of(numbers) / survey.samples
        survey.bar.advance(1)
        return survey.metric.loss(errors)

    def key(self, choices: Choices) -> tuple[Any, ...]:
        """Equal for choices that do the same."""
        chosen = ((site.id, choices.get(site.id)) for site in self.trial.sites)
        return tuple((name, choice) for name, choice in chosen if choice is not None and choice.r)

    # ---- costs -----------------------------------------------------------------------------------------------------

    def cost(self, choices: Choices) -> float:
        """The cost of a plan by the cost model."""
        return sum(model.total(choices) for model in self.costs)

    @property
    def plain(self) -> float:
        """The cost of the plain model."""
        return sum(model.plain for model in self.costs)

    def flops(self, choices: Choices) -> float:
        """The operations of a plan, as a share of the plain model's."""
        return share_of_operations(self.costs, choices)

    # ---- searching -------------------------------------------------------------------------------------------------

    def front(self, penalty: float = 0.0) -> Front:
        """The plans that no other is predicted to beat in both cost and loss; costs are without what is fixed."""
        fronts = []
        for members in self.trial.streams():
            stages = [self._stage(site, penalty) for site in members]
            fronts.append(search(stages, members[0].tokens, self.multiple))
        return combine(fronts)

    @property
    def fixed(self) -> float:
        """The cost that no plan changes."""
        return sum(model.fixed for model in self.costs)

    def cheapest(self) -> float:
        """The cost of the cheapest plan there is."""
        return self.fixed + float(self.front().cost.min())

    def within_cost(self, budget: float) -> Choices | None:
        """The plan of least predicted loss that costs no more than the budget; None where none is that cheap."""
        limit = budget - self.fixed
        front = self.front()
        for _ in range(5):
            best = front.within_cost(limit)
            if best is None:
                return None
            # Of plans that are as good, one with fewer token counts: a reduction costs its share of what is equal.
            fewer = self.front(penalty=EQUAL * float(front.error[best]) / len(self.trial.sites))
            chosen = fewer.within_cost(limit)
            choices = self.choices(fewer.removed[best if chosen is None else chosen])
            over = self.cost(choices) - budget
            if over <= 1e-9 * budget:
                return choices
            limit -= over  # what depends on several counts was attributed to one of them
        return None

    def within_loss(self, budget: float) -> Choices | None:
        """The cheapest plan whose predicted loss is within the budget."""
        front = self.front()
        best = front.within_error(budget)
        return None if best is None else self.choices(front.removed[best])

    def choices(self, removed: Sequence[int]) -> dict[str, Choice]:
        """Choices that remove these tokens, in the order of the front's sites, each site in its kind."""
        sites = [site for members in self.trial.streams() for site in members]
        return {s.id: Choice(*self.kinds[s.id], r) for s, r in zip(sites, removed, strict=True) if r}

    def _stage(self, site: Planned, penalty: float) -> Stage:
        graph = self.trial.graph_of[site.id]
        rehearsal, model, match = self.trial.rehearsals[graph], self.costs[graph], self.kinds[site.id][1]
        place = [entry.site.id for entry in rehearsal.sites].index(site.id)

        def loss(arriving: int, gone: Any) -> Any:
            return self.predictor.contribution(site, arriving, gone) + numpy.where(
                numpy.asarray(gone) > 0, penalty, 0.0
            )

        return Stage(
            lambda counts: model.segment(place, counts), loss, site.cap, lambda n: model.reduction(place, match, n)
        )

    # ---- correcting the prediction -----------------------------------------------------------------------------------

    def refit(self) -> None:
        """Correct the prediction by all plans measured so far."""
        plans = [(candidate.choices, candidate.loss) for candidate in self.measured.values() if candidate.choices]
        if plans:
            self.predictor = self.predictor.fitted(plans)

    def refine(self, budget: float, rounds: int) -> None:
        """Search, measure and correct for some rounds; where the search repeats itself it is pushed aside a little."""
        for _ in range(rounds):
            choices = self.within_cost(budget)
            for push in range(4):
                if choices is None or self.key(choices) not in self.measured:
                    break
                choices = self._pushed(0.1 * (push + 1)).within_cost(budget)
            if choices is None or self.key(choices) in self.measured:
                self.survey.bar.advance(1)
                continue
            self.measure(choices)
            self.refit()

    def best(self, budget: float) -> Candidate | None:
        """The measured plan of least loss within a cost."""
        finite = [candidate for candidate in self.measured.values() if math.isfinite(candidate.loss)]
        fitting = [candidate for candidate in finite if self.cost(candidate.choices) <= budget * (1 + 1e-9)]
        return min(fitting, key=lambda candidate: candidate.loss, default=None)

    def _pushed(self, by: float) -> Tuner:
        weights = {name: w * math.exp(self.survey.random.gauss(0, by)) for name, w in self.predictor.weights.items()}
        return replace(self, predictor=replace(self.predictor, weights=weights))
