"""From sensitivities to a plan: search, measure, correct the prediction, search again.

Works in the power of the error in which the sites' errors add up (`OutputError.power`); "loss" stands for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from tofu_fx.planning.cost import CostModel, share_of_operations
from tofu_fx.planning.planner import Front, Stage, combine, search
from tofu_fx.planning.rehearsal import Choice, Choices
from tofu_fx.planning.sensitivity import Kind, Predictor
from tofu_fx.planning.site import Site
from tofu_fx.planning.survey import Survey
from tofu_fx.planning.trial import Trial

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
            limit -= over  # what hangs on several counts was put down to one of them
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

    def _stage(self, site: Site, penalty: float) -> Stage:
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

    def polish(self, budget: float, tries: int, keep_strategies: bool = False) -> None:
        """Change the best plan a little, time and again: one site's kind, or some tokens from one site to another.

        The prediction takes the sites' errors as independent; what it misses for that is found here. A change is tried
        on the samples of the survey first, and on all inputs where it helps there.
        """
        few = self.survey.few
        best = self.best(budget)
        if best is None or not best.choices:
            return
        least = self.loss(best.choices, few)
        for _ in range(tries):
            changed = self._changed(best.choices, budget, keep_strategies)
            if changed is None:
                break
            loss = self.loss(changed, few)
            if loss < least and self.measure(changed).loss < best.loss:
                best, least = self.measured[self.key(changed)], loss

    def _changed(self, choices: Choices, budget: float, keep_strategies: bool) -> Choices | None:
        """A neighbour of a plan within a cost; None where none was found."""
        survey = self.survey
        used = [name for name, choice in choices.items() if choice.r]
        for _ in range(20):
            name = survey.random.choice(used)
            changed = dict(choices)
            own = choices[name].strategy, choices[name].match
            kinds = [kind for kind in survey.sensitivity[name].curves() if kind != own]
            kinds = [kind for kind in kinds if kind[0] == own[0] or not keep_strategies]
            if kinds and survey.random.random() < 0.5:
                changed[name] = Choice(*survey.random.choice(kinds), choices[name].r)
            else:
                other = survey.random.choice([site.id for site in self.trial.sites if site.id != name] or [name])
                step = self.multiple * survey.random.randint(1, 3)
                given = choices.get(other, Choice(*self.kinds[other], 0))
                changed[name] = replace(choices[name], r=max(choices[name].r - step, 0))
                changed[other] = replace(given, r=given.r + step)
            changed = {key: choice for key, choice in changed.items() if choice.r}
            new = changed and self._fits(changed) and self.key(changed) not in self.measured
            if new and self.cost(changed) <= budget:
                return changed
        return None

    def _fits(self, choices: Choices) -> bool:
        """Whether no site removes more than it can."""
        for members in self.trial.streams():
            count = members[0].tokens
            for site in members:
                r = choices[site.id].r if site.id in choices else 0
                if r > site.cap(count):
                    return False
                count -= r
        return True

    def best(self, budget: float) -> Candidate | None:
        """The measured plan of least loss within a cost."""
        finite = [candidate for candidate in self.measured.values() if math.isfinite(candidate.loss)]
        fitting = [candidate for candidate in finite if self.cost(candidate.choices) <= budget * (1 + 1e-9)]
        return min(fitting, key=lambda candidate: candidate.loss, default=None)

    def _pushed(self, by: float) -> Tuner:
        weights = {name: w * math.exp(self.survey.random.gauss(0, by)) for name, w in self.predictor.weights.items()}
        return replace(self, predictor=replace(self.predictor, weights=weights))
