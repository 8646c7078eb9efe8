"""The schedules that need no calibration, at any cost: the same number of tokens at each site (the paper's).

In branches, of the same share of the tokens at each site, compared by what they are compared by there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tofu_fx.calibration.batches import read_batches
from tofu_fx.calibration.cost import count_operations, share_of_operations
from tofu_fx.calibration.rehearsal import Choice, Choices
from tofu_fx.calibration.sensitivity import Kind, first_kind
from tofu_fx.calibration.trial import Trial
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.plan.records import PlanRow
from tofu_fx.plan.schedule import default_match

#: name -> the kind of reduction for a site's depth among so many layers
UNIFORM: Mapping[str, Callable[[int, int], Kind]] = {
    # The paper's rule without calibration: prune in the first half of the layers, MLERP after.
    "depth rule": lambda depth, layers: ("prune", "keys") if depth < layers / 2 else ("mlerp", "keys"),
    "uniform mlerp": lambda depth, layers: ("mlerp", "keys"),
    "uniform mean": lambda depth, layers: ("mean", "keys"),
    "uniform prune": lambda depth, layers: ("prune", "keys"),
}


def uniform_plans(model: Any, inputs: Any, flops: Sequence[float]) -> dict[tuple[str, float], Plan]:
    """Plans of equal r at every site, for each schedule of ``UNIFORM`` and each share of the plain model's operations.

    Args:
        model: as for ``tofu_fx.calibrate``.
        inputs: as for ``tofu_fx.calibrate``; the model is called once with the first batch.
        flops: shares; those that no schedule can reach are left out.

    Raises:
        CalibrationError: inputs or a model that cannot be used.
    """
    batch = read_batches(inputs, 16, model)[0]
    found = {}
    with Trial(model, Options()) as trial:
        trial.plain(batch)
        trial.require_sites()
        models = count_operations(trial.rehearsals, trial.beside)
        share = partial(share_of_operations, models)
        for budget in flops:
            for name, kind_of in UNIFORM.items():
                choices = uniform(trial, share, budget, kind_of)
                if choices is not None:
                    found[name, budget] = plan_of(trial, choices)
    return found


def uniform(
    trial: Trial, cost: Callable[[Choices], float], budget: float, kind_of: Callable[[int, int], Kind]
) -> dict[str, Choice] | None:
    """The same number of tokens at each site, the fewest with which the cost is within the budget; None: out of reach.

    The number need not be whole: then the sites of a stream differ by one token.
    """
    low, high = 0.0, float(max(site.tokens for site in trial.sites))
    if cost(_even(trial, high, kind_of)) > budget:
        return None
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(_even(trial, middle, kind_of)) > budget else (low, middle)
    return _even(trial, high, kind_of)


def rows_of(trial: Trial, choices: Choices) -> list[PlanRow]:
    """The rows of a plan that does what the choices say."""
    rows = []
    for site in trial.planned:
        choice = choices.get(site.id, Choice(*first_kind(site), 0))
        update: dict[str, Any] = {"strategy": choice.strategy, "match": choice.match, "r": choice.r}
        rows.append(PlanRow.of(site, trial.graph_of[site.id]).model_copy(update=update))
    return rows


def plan_of(trial: Trial, choices: Choices) -> Plan:
    """A plan that does what the choices say."""
    return with_matrices(trial, Plan(sites=rows_of(trial, choices)))


def with_matrices(trial: Trial, plan: Plan) -> Plan:
    """The plan with the matrices that its rows need."""
    if all(row.match != "fisher" for row in plan.sites):
        return plan
    matrices = trial.matrices or {}
    return plan.with_matrices({(row.graph, row.id): matrices[row.id] for row in plan.sites if row.match == "fisher"})


def _even(trial: Trial, each: float, kind_of: Callable[[int, int], Kind]) -> dict[str, Choice]:
    choices = {}
    branches = [site for site in trial.sites if site.placement == "branch"]
    for depth, site in enumerate(branches):
        r = min(math.floor(each * site.tokens / max(other.tokens for other in branches)), site.cap(site.tokens))
        if r:
            choices[site.id] = Choice(kind_of(depth, len(branches))[0], default_match(site), r)
    for members in trial.streams():
        if members[0].placement == "branch":
            continue
        depth_of = {site.id: depth for depth, site in enumerate(members)}
        gone = [math.floor(depth * each + 1e-9) for depth in range(len(members) + 1)]
        wanted = {name: gone[depth + 1] - gone[depth] for name, depth in depth_of.items()}
        for name, r in trial.limited(wanted, members).items():
            if r:
                choices[name] = Choice(*kind_of(depth_of[name], len(members)), r)
    return choices
