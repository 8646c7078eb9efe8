"""What a plan costs: operations and bytes from the graph, and seconds fitted to a few measured forward passes.

The rewritten graph's shapes are expressions of its token counts, so the cost of any plan is an expression too. A node
whose shapes depend on one count belongs to the segment after that site; hence the cost of a plan is (all but) a sum
over sites of functions of one count each, which is what the planner's search needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy
import sympy
import torch

from tofu_fx.calibration.rehearsal import Choices, Rehearsal
from tofu_fx.calibration.sensitivity import free_tokens
from tofu_fx.plan.flops import matching_flops, node_bytes, node_flops
from tofu_fx.plan.words import grouping_of

#: token counts after a site, or one of them
Counts = numpy.ndarray[Any, Any]


@dataclass(frozen=True)
class Expression:
    """A cost as a function of the token counts after each site of one graph."""

    symbols: tuple[sympy.Symbol, ...]
    parts: Mapping[frozenset[sympy.Symbol], sympy.Expr]

    @classmethod
    def of(cls, rehearsal: Rehearsal, count: Callable[..., Any]) -> Expression:
        """Add up ``count(node, size)`` over the nodes that a run's outputs need."""
        graph = rehearsal.gm.graph
        placeholders = graph.find_nodes(op="placeholder")[-len(rehearsal.sites) :]
        symbols = tuple(node.meta["val"].node.expr for node in placeholders)
        parts: dict[frozenset[sympy.Symbol], Any] = defaultdict(lambda: sympy.Integer(0))
        matching = {entry.fuse for entry in rehearsal.sites}  # depends on what is compared: see CostModel
        for node in rehearsal.needed():
            if node in matching:
                continue
            value = sympy.sympify(count(node, _size))
            parts[frozenset(value.free_symbols)] += value
        return cls(symbols, {key: sympy.expand(value) for key, value in parts.items()})

    @cached_property
    def fixed(self) -> float:
        """What does not depend on any count."""
        return float(self.parts.get(frozenset(), 0))

    def total(self, counts: Sequence[int]) -> float:
        """The cost at these counts, one for each site."""
        values = dict(zip(self.symbols, counts, strict=True))
        return self.fixed + sum(float(self._functions[key](*[values[s] for s in order])) for key, order in self._order)

    def segment(self, site: int, counts: Counts) -> Counts:
        """The cost after one site, for an array of counts there.

        What depends on several counts (which is rare) is attributed to the last of the sites, as if all had its count.
        """
        value = numpy.zeros(len(counts))
        for key, order in self._order:
            if max(self.symbols.index(symbol) for symbol in key) == site:
                value = value + self._functions[key](*[counts for _ in order])
        return value

    @cached_property
    def _order(self) -> list[tuple[frozenset[sympy.Symbol], list[sympy.Symbol]]]:
        return [(key, sorted(key, key=str)) for key in self.parts if key]

    @cached_property
    def _functions(self) -> dict[frozenset[sympy.Symbol], Callable[..., Any]]:
        return {key: sympy.lambdify(order, self.parts[key], "numpy") for key, order in self._order}


@dataclass(frozen=True)
class CostModel:
    """Seconds (or operations) of one graph: a weighted sum of operations, bytes, reductions and a constant."""

    rehearsal: Rehearsal
    flops: Expression
    bytes: Expression
    per_flop: float = 1.0
    per_byte: float = 0.0
    per_reduction: float = 0.0
    constant: float = 0.0
    #: operations of graphs that have no model of their own
    beside: int = 0

    @classmethod
    def of(cls, rehearsal: Rehearsal) -> CostModel:
        """The model that counts operations only."""
        return cls(rehearsal, Expression.of(rehearsal, node_flops), Expression.of(rehearsal, node_bytes))

    @property
    def unread(self) -> int:
        """The operations of the traced graph on rows that nobody reads, which no plan has."""
        return self.rehearsal.compilation.unread_flops

    @property
    def plain(self) -> float:
        """The cost of the graph as it was traced."""
        return self.total({}) + self.per_flop * self.unread

    @property
    def fixed(self) -> float:
        """What no plan changes."""
        return self.constant + self.per_flop * (self.beside + self.flops.fixed) + self.per_byte * self.bytes.fixed

    def features(self, choices: Choices) -> list[float]:
        """What the weights are of, for one plan: operations, bytes, reductions, one."""
        passages, matching, reductions = self.rehearsal.passages(choices), 0.0, 0
        counts = [passage.leaving for passage in passages]
        for place, (entry, passage) in enumerate(zip(self.rehearsal.sites, passages, strict=True)):
            if passage.removed:
                matching += self._matching(place, choices[entry.site.id].match, passage.arriving)
                reductions += 1
        flops = self.beside + self.flops.total(counts) + matching
        return [flops, self.bytes.total(counts), float(reductions), 1.0]

    def operations(self, choices: Choices) -> float:
        """The operations of a plan."""
        return self.features(choices)[0]

    def total(self, choices: Choices) -> float:
        """The cost of a plan."""
        weights = (self.per_flop, self.per_byte, self.per_reduction, self.constant)
        return sum(weight * value for weight, value in zip(weights, self.features(choices), strict=True))

    def segment(self, site: int, counts: Counts) -> Counts:
        """The cost after one site, for an array of counts there."""
        return self.per_flop * self.flops.segment(site, counts) + self.per_byte * self.bytes.segment(site, counts)

    def reduction(self, site: int, match: str, arriving: int) -> float:
        """What it costs to reduce at a site at all."""
        return self.per_reduction + self.per_flop * self._matching(site, match, arriving)

    def _matching(self, place: int, match: str, arriving: int) -> float:
        entry = self.rehearsal.sites[place]
        batch, _, features = entry.metrics[match].meta["val"].shape
        projected = 0
        if match == "fisher":
            columns, width = self.rehearsal.columns(entry), entry.fuse.args[0].meta["val"].shape[2]  # type: ignore[union-attr]
            features, projected = columns + entry.site.padding, 2 * batch * arriving * width * columns
        free = free_tokens(entry.site, arriving)
        return float(projected + matching_flops(batch, free, features, entry.site.cells, grouping_of(match)))


def count_operations(rehearsals: Sequence[Rehearsal], beside: int) -> list[CostModel]:
    """A cost model of each graph that counts operations, ``beside`` those of the graphs without sites."""
    first, *others = (CostModel.of(rehearsal) for rehearsal in rehearsals)
    return [replace(first, beside=beside), *others]


def share_of_operations(models: Sequence[CostModel], choices: Choices) -> float:
    """The operations of a plan over all graphs, as a share of the plain model's."""
    plain = sum(model.operations({}) + model.unread for model in models)
    return sum(model.operations(choices) for model in models) / plain


def fit_weights(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Weights >= 0 with ``rows @ weights`` as near to the seconds as can be, each measurement counted relatively.

    Non-negative least squares by leaving out, one after another, the column whose weight is the most negative.
    """
    table = numpy.asarray(rows, dtype=float) / numpy.asarray(seconds, dtype=float)[:, None]
    scale = numpy.abs(table).max(axis=0)
    scale[scale == 0] = 1.0
    columns = list(range(table.shape[1]))
    while columns:
        found, *_ = numpy.linalg.lstsq(table[:, columns] / scale[columns], numpy.ones(len(table)), rcond=None)
        if found.min() >= 0:
            break
        columns.pop(int(found.argmin()))
    weights = numpy.zeros(table.shape[1])
    if columns:
        weights[columns] = found / scale[columns]
    return [float(weight) for weight in weights]


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)
