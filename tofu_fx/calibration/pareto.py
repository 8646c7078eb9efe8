"""The search: for each site how many tokens go, with the least predicted error at a cost or the least cost at an error.

Errors of several sites add up, each a function of the share of the arriving tokens that goes there; costs are functions
of the tokens after each site. So the best plans are shortest paths through (site, tokens), with two lengths: dynamic
programming over the sites keeps, for each number of tokens, every (cost, error) that no other one beats in both.

(Measured on a DINOv2 ViT-S with 60 random plans: errors predicted this way and measured ones have a rank correlation of
0.97; with errors as functions of the tokens that are left it is 0.86.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

Array = numpy.ndarray[Any, Any]

#: (cost, error) pairs kept for each number of tokens; more than this are thinned out evenly over the cost
MOST_LABELS = 600


@dataclass(frozen=True)
class Stage:
    """One site as the search sees it.

    ``cost`` maps an array of token counts to what is computed on them after the site, ``error`` maps arriving tokens
    and an array of removed ones to predicted errors (of 0 removed: 0), ``cap`` maps arriving tokens to the most that
    can go. ``reduction`` maps arriving tokens to the cost of reducing at all.
    """

    cost: Callable[[Array], Array]
    error: Callable[[int, Array], Array]
    cap: Callable[[int], int]
    reduction: Callable[[int], float] = lambda arriving: 0.0


@dataclass(frozen=True)
class Front:
    """The plans of one or more streams that no other beats in both cost and error, by rising cost.

    ``removed[i]`` are the tokens that plan i removes at each site.
    """

    cost: Array
    error: Array
    removed: list[tuple[int, ...]]

    def within_cost(self, budget: float) -> int | None:
        """The plan of least error that costs no more; None where none is that cheap."""
        fits = numpy.flatnonzero(self.cost <= budget)
        return int(fits[self.error[fits].argmin()]) if len(fits) else None

    def within_error(self, budget: float) -> int | None:
        """The cheapest plan with no more error."""
        fits = numpy.flatnonzero(self.error <= budget)
        return int(fits[self.cost[fits].argmin()]) if len(fits) else None


@dataclass
class _Labels:
    """The plans that arrive with one number of tokens; ``came`` are the tokens and the label that each came from."""

    cost: Array
    error: Array
    came: list[tuple[int, int]] = field(default_factory=list)


def search(stages: Sequence[Stage], tokens: int, multiple: int = 1, most_labels: int = MOST_LABELS) -> Front:
    """The best plans of one stream.

    Args:
        stages: the stream's sites in order.
        tokens: how many arrive at the first.
        multiple: token counts after a reduction are multiples of this.
        most_labels: see ``MOST_LABELS``; the search is exact as long as it is not reached.
    """
    reached: list[dict[int, _Labels]] = [{tokens: _Labels(numpy.zeros(1), numpy.zeros(1), [(tokens, 0)])}]
    for stage in stages:
        gathered: dict[int, list[tuple[int, Array, Array]]] = {}
        for before, labels in reached[-1].items():
            counts = _counts(before, stage.cap(before), multiple)
            reduces = numpy.asarray(counts) < before
            costs = stage.cost(numpy.asarray(counts)) + numpy.where(reduces, stage.reduction(before), 0.0)
            errors = stage.error(before, before - numpy.asarray(counts))
            for count, cost, error in zip(counts, costs, errors, strict=True):
                gathered.setdefault(count, []).append((before, labels.cost + cost, labels.error + error))
        reached.append({count: _pruned(parts, most_labels) for count, parts in sorted(gathered.items())})
    ends = [(count, i) for count, labels in reached[-1].items() for i in range(len(labels.cost))]
    cost = numpy.concatenate([labels.cost for labels in reached[-1].values()])
    error = numpy.concatenate([labels.error for labels in reached[-1].values()])
    best = _pareto(cost, error)
    return Front(cost[best], error[best], [_path(reached, *ends[i]) for i in best])


def combine(fronts: Sequence[Front], most_labels: int = MOST_LABELS) -> Front:
    """The best plans of several streams together, their sites one after another."""
    total = fronts[0]
    for front in fronts[1:]:
        cost = (total.cost[:, None] + front.cost[None, :]).ravel()
        error = (total.error[:, None] + front.error[None, :]).ravel()
        best = _thin(_pareto(cost, error), cost, most_labels)
        removed = [total.removed[i // len(front.cost)] + front.removed[i % len(front.cost)] for i in best]
        total = Front(cost[best], error[best], removed)
    return total


def _counts(before: int, cap: int, multiple: int) -> list[int]:
    lowest = before - cap
    return [count for count in range(lowest, before) if count % multiple == 0] + [before]


def _pruned(parts: Sequence[tuple[int, Array, Array]], most: int) -> _Labels:
    cost = numpy.concatenate([part[1] for part in parts])
    error = numpy.concatenate([part[2] for part in parts])
    came = numpy.concatenate([numpy.full(len(part[1]), part[0]) for part in parts])
    place = numpy.concatenate([numpy.arange(len(part[1])) for part in parts])
    best = _thin(_pareto(cost, error), cost, most)
    pairs = [(int(came[i]), int(place[i])) for i in best]
    return _Labels(cost[best], error[best], pairs)


def _pareto(cost: Array, error: Array) -> Array:
    """The places that no other beats in both, by rising cost (of equals the first)."""
    order = numpy.lexsort((error, cost))
    least = numpy.minimum.accumulate(error[order])
    better = numpy.ones(len(order), dtype=bool)
    better[1:] = error[order][1:] < least[:-1]
    return order[better]


def _thin(best: Array, cost: Array, most: int) -> Array:
    """At most ``most`` places of a front, evenly over the cost, the ends among them."""
    if len(best) <= most:
        return best
    values = cost[best]
    wanted = numpy.linspace(values[0], values[-1], most)
    # The dearest that is no dearer: of a front it has the least error there.
    return best[numpy.unique(numpy.searchsorted(values, wanted, side="right") - 1)]


def _path(reached: Sequence[dict[int, _Labels]], count: int, label: int) -> tuple[int, ...]:
    removed = []
    for depth in range(len(reached) - 1, 0, -1):
        before, previous = reached[depth][count].came[label]
        removed.append(before - count)
        count, label = before, previous
    return tuple(reversed(removed))
