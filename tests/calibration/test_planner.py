"""The search finds what brute force finds, and the front is a front."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tofu_fx.calibration.pareto import Front, Stage, combine, search


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[Stage], int, int]:
    """Up to four sites over up to 14 tokens, with whole-numbered costs and errors so that sums are exact."""
    tokens = draw(st.integers(3, 14))
    multiple = draw(st.sampled_from([1, 2, 3]))
    stages = []
    for _ in range(draw(st.integers(1, 4))):
        costs = draw(st.lists(st.integers(0, 9), min_size=tokens + 1, max_size=tokens + 1))
        errors = draw(st.lists(st.integers(0, 9), min_size=tokens, max_size=tokens))
        lead = draw(st.integers(0, 2))
        stages.append(_stage(costs, errors, lead, draw(st.integers(0, 3))))
    return stages, tokens, multiple


def _stage(costs: list[int], errors: list[int], lead: int, reduction: int) -> Stage:
    # Costs rise with the tokens and errors with what goes, by arbitrary steps.
    cost, error = numpy.cumsum(costs).astype(float), numpy.cumsum([0, *errors]).astype(float)
    return Stage(
        lambda counts: cost[counts],
        lambda arriving, gone: error[gone] * arriving,
        lambda arriving: max(arriving - lead, 0) // 2,
        lambda arriving: float(reduction * arriving),
    )


def brute_force(stages: list[Stage], tokens: int, multiple: int) -> list[tuple[float, float, tuple[int, ...]]]:
    """Every plan: its cost, its error, the tokens that it removes."""
    plans: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for stage in stages:
        longer = []
        for cost, error, removed in plans:
            arriving = tokens - sum(removed)
            for gone in range(stage.cap(arriving) + 1):
                if gone and (arriving - gone) % multiple:
                    continue
                count = numpy.array([arriving - gone])
                more = float(stage.cost(count)[0]) + (stage.reduction(arriving) if gone else 0.0)
                off = float(stage.error(arriving, numpy.array([gone]))[0])
                longer.append((cost + more, error + off, (*removed, gone)))
        plans = longer
    return plans


@given(instances())
def test_search_equals_brute_force(instance: tuple[list[Stage], int, int]) -> None:
    stages, tokens, multiple = instance
    front, plans = search(stages, tokens, multiple), brute_force(*instance)
    by_removed = {removed: (cost, error) for cost, error, removed in plans}
    for cost, error, removed in zip(front.cost, front.error, front.removed, strict=True):
        assert by_removed[removed] == (cost, error)  # what is claimed of a plan is true of it
    for budget in sorted({cost for cost, _, _ in plans}):
        best = front.within_cost(budget)
        assert best is not None
        assert front.error[best] == min(error for cost, error, _ in plans if cost <= budget)
    for limit in sorted({error for _, error, _ in plans}):
        best = front.within_error(limit)
        assert best is not None
        assert front.cost[best] == min(cost for cost, error, _ in plans if error <= limit)


@given(instances(), instances())
def test_streams_are_combined_as_brute_force_would(
    first: tuple[list[Stage], int, int], second: tuple[list[Stage], int, int]
) -> None:
    front = combine([search(*first), search(*second)])
    pairs = list(itertools.product(brute_force(*first), brute_force(*second)))
    every = [(a[0] + b[0], a[1] + b[1]) for a, b in pairs]
    for budget in {cost for cost, _ in every}:
        best = front.within_cost(budget)
        assert best is not None
        assert front.error[best] == min(error for cost, error in every if cost <= budget)
    removed = {a[2] + b[2] for a, b in pairs}
    assert set(front.removed) <= removed


def test_budget_that_nothing_meets_is_none() -> None:
    front = Front(numpy.array([3.0]), numpy.array([1.0]), [(2,)])
    assert front.within_cost(2.9) is None
    assert front.within_error(0.9) is None


@pytest.mark.parametrize("most", [20, 60])
def test_thinned_search_is_near_the_exact_one(most: int) -> None:
    def stage(i: int) -> Stage:
        def error(arriving: int, gone: Any) -> Any:
            return (12 - i) * (gone / arriving) ** 1.4

        return Stage(lambda n: n * 7.3 + n * n * 0.01, error, lambda n: (n - 1) // 2, lambda n: 5.0)

    stages = [stage(i) for i in range(5)]
    exact, thin = search(stages, 40, 1, most_labels=100_000), search(stages, 40, 1, most_labels=most)
    budget = 0.6 * exact.cost.max()
    best, near = exact.within_cost(budget), thin.within_cost(budget)
    assert best is not None
    assert near is not None
    assert len(thin.cost) < len(exact.cost)
    assert exact.error[best] <= thin.error[near] <= 1.05 * exact.error[best]
