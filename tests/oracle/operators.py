"""The oracle: token reduction written straight from the formulas, in float64 and plain loops.

Slow, obvious, and independent of `tofu_fx.ops` on purpose: no import from the package. Tests compare against it, and
use `decision_margin` and `merge_error` to know how closely float32 has to agree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

# Scores that agree to this many decimals are the same number computed twice: float64 sums of a few hundred products
# of numbers up to one carry errors near 1e-14.
SCORE_DECIMALS = 12


def reference_scores(metric: Tensor, num_prefix: int, num_suffix: int) -> Tensor:
    """Cosine similarity `[B, candidates, partners]` in float64; rows without a usable length score 0."""
    batch, tokens, _ = metric.shape
    free = metric[:, num_prefix : tokens - num_suffix].double()
    unit = torch.zeros_like(free)
    for b in range(batch):
        for i in range(free.shape[1]):
            length = math.sqrt(sum(v * v for v in free[b, i].tolist()))
            if 0 < length < math.inf:
                unit[b, i] = free[b, i] / length
    scores = torch.zeros(batch, len(range(0, free.shape[1], 2)), len(range(1, free.shape[1], 2)), dtype=torch.float64)
    for b in range(batch):
        for i in range(scores.shape[1]):
            for j in range(scores.shape[2]):
                scores[b, i, j] = (unit[b, 2 * i] * unit[b, 2 * j + 1]).sum()
    return scores.round(decimals=SCORE_DECIMALS)


def reference_match(metric: Tensor, r: int, num_prefix: int = 0, num_suffix: int = 0) -> list[dict[int, int]]:
    """For every sample: source -> destination, places in the stream."""
    result = []
    for scores in reference_scores(metric, num_prefix, num_suffix):
        choices = []
        for i, row in enumerate(scores.tolist()):
            if row:
                best = max(row)
                choices.append((-best, i, row.index(best)))
        choices.sort()
        result.append({num_prefix + 2 * i: num_prefix + 2 * j + 1 for _, i, j in choices[:r]})
    return result


def decision_margin(metric: Tensor, r: int, num_prefix: int = 0, num_suffix: int = 0) -> float:
    """How far the scores are from another matching: the smallest gap, other than an exact tie, that decides one.

    An implementation whose scores are off by less than half of this, and equal where the true ones are, must agree.
    """
    margin = math.inf
    for scores in reference_scores(metric, num_prefix, num_suffix):
        best = []
        for row in scores.tolist():
            if row:
                best.append(max(row))
                margin = min([margin, *(best[-1] - v for v in row if v < best[-1])])
        if 0 < r < len(best):
            best.sort(reverse=True)
            gaps = [abs(v - best[k]) for k in (r - 1, r) for v in best if v != best[k]]
            margin = min([margin, *gaps])
    return margin


def unit_roundoff(dtype: torch.dtype) -> float:
    """Of the arithmetic that merges a dtype: float64 in its own, all others in float32."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def length_of(row: Tensor) -> float:
    """The norm; `hypot` neither overflows on the way nor loses what is small."""
    return math.hypot(*row.tolist())


def cancellation(members: Tensor, weights: Tensor, unit: float) -> float:
    """|weighted mean| over what is rounding, 64 K u times the weighted mean of the norms: up to 1 they cancel."""
    share = (weights.double() / weights.double().sum()).tolist()
    mean = sum(w * x for w, x in zip(share, members, strict=True))
    allowed = 64 * len(members) * unit * sum(w * length_of(x) for w, x in zip(share, members, strict=True))
    return length_of(mean) / allowed if allowed else 0.0


def reference_merge(members: Tensor, weights: Tensor, strategy: str, unit: float = 2.0**-24) -> Tensor:
    """One group: members `[K, C]` float64 in the order of the stream, weights `[K]` -> `[C]` float64."""
    share = (weights.double() / weights.double().sum()).tolist()
    mean = sum(w * x for w, x in zip(share, members, strict=True))
    if strategy == "mean":
        return mean
    assert strategy == "mlerp"
    norms = [length_of(x) for x in members]
    if cancellation(members, weights, unit) <= 1:
        return next(x for x, norm in zip(members, norms, strict=True) if norm >= (1 - 2.0**-10) * max(norms))
    largest = math.nan if any(map(math.isnan, norms)) else max(norms)
    return mean / length_of(mean) * largest


def reference_apply(
    x: Tensor, size: Tensor, merges: list[dict[int, int]], strategy: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Carry out given merges: x', size', assignment, kept."""
    batch, tokens, _ = x.shape
    left = tokens - (len(merges[0]) if merges else 0)
    new_x, new_size = x.new_empty(batch, left, x.shape[2]), size.new_empty(batch, left)
    assignment = torch.empty(batch, tokens, dtype=torch.int64)
    kept = torch.empty(batch, left, dtype=torch.int64)
    for b, joins in enumerate(merges):
        survivors = [i for i in range(tokens) if i not in joins]
        for place, survivor in enumerate(survivors):
            group = [i for i in range(tokens) if joins.get(i, i) == survivor]
            kept[b, place] = survivor
            assignment[b, group] = place
            new_size[b, place] = sum(size[b, i].item() for i in group)
            new_x[b, place] = x[b, survivor]
            if len(group) > 1 and strategy != "prune":
                members, unit = x[b, group].double(), unit_roundoff(x.dtype)
                new_x[b, place] = reference_merge(members, size[b, group], strategy, unit).to(x.dtype)
    return new_x, new_size, assignment, kept


def reference_fuse(
    x: Tensor, metric: Tensor, size: Tensor, r: int, strategy: str, num_prefix: int = 0, num_suffix: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `tofu::fuse_tokens` returns."""
    return reference_apply(x, size, reference_match(metric, r, num_prefix, num_suffix), strategy)


def reference_restore(
    x: Tensor, assignment: Tensor, before: Tensor | None = None, merged: Tensor | None = None
) -> Tensor:
    """What `tofu::restore_tokens` returns."""
    rows = []
    for b in range(assignment.shape[0]):
        for i, place in enumerate(assignment[b].tolist()):
            row = x[b, place]
            if before is not None and merged is not None:
                row = row + (before[b, i] - merged[b, place])
            rows.append(row)
    return torch.stack(rows).view(*assignment.shape, x.shape[2])


def reference_rebase(x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor, strategy: str) -> Tensor:
    """What `tofu::rebase` returns."""
    merges = []
    for b in range(assignment.shape[0]):
        survivor = [int(kept[b, place]) for place in assignment[b]]
        merges.append({i: s for i, s in enumerate(survivor) if s != i})
    return reference_apply(x, size, merges, strategy)[0]


def merge_error(x: Tensor, size: Tensor, assignment: Tensor, expected: Tensor, strategy: str) -> Tensor:
    """How far, element by element, a result computed in float32 and rounded once may lie from `expected` `[B, M, C]`.

    With u = 2^-24 (half of float32's eps) and K members whose largest norm is n:
    - K products and sums and one division put the mean off by at most (K + 2) u n;
    - a norm is a sum of C squares and a root, (C/2 + 2) u relative at most; two of them, a division and a product give
      (C + 6) u n, and the sum's own error is stretched by n/|m|;
    - where members cancel, one of them is copied. Whether they do is known but where the two sides of that decision are
      within 1/32 of each other (the sum is off by 1/64 there, the norms by less), and which one is but where a norm
      lies on the edge of what is nearly the largest: there either way is right;
    - all of this twice, for terms in u^2; then one rounding to x's dtype, where the two may fall on either side: one
      eps of the value, or the smallest subnormal.
    """
    unit = unit_roundoff(x.dtype)
    error = torch.zeros(expected.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        for place in range(expected.shape[1]):
            group = assignment[b] == place
            count = int(group.sum())
            if count < 2 or strategy == "prune":
                continue
            members, weights = x[b, group].double(), size[b, group].double()
            largest = max(length_of(row) for row in members)
            bound = (count + 2) * unit * largest
            if strategy == "mlerp":
                mean = length_of(((weights / weights.sum()).unsqueeze(1) * members).sum(0))
                excess = cancellation(members, weights, unit)
                stretch = largest / mean if excess > 1 else 0.0
                bound = bound * stretch + (x.shape[2] + 6) * unit * largest
                edge = min(abs(length_of(row) / largest - (1 - 2.0**-10)) for row in members) if largest else 1.0
                if abs(excess - 1) < 1 / 32 or (excess <= 1 and edge < (x.shape[2] + 6) * unit):
                    bound = math.inf
            info = torch.finfo(x.dtype)
            error[b, place] = 2 * bound + info.eps * expected[b, place].double().abs() + info.tiny * info.eps
    return error


def reference_separate(metric: Tensor, there: Tensor) -> Tensor:
    """What padded tokens are compared by: `[B, N, M]` and bool `[B, N]` -> `[B, N, M + 1]`."""
    rows = metric.new_zeros(*metric.shape[:2], metric.shape[2] + 1)
    for b, i in there.nonzero().tolist():
        rows[b, i, :-1] = 0.8 * torch.nn.functional.normalize(metric[b, i], dim=0)
        rows[b, i, -1] = 0.6
    rows[..., -1][~there] = -1.0
    return rows


def reference_ward(
    metric: Tensor, size: Tensor, r: int, num_prefix: int = 0, num_suffix: int = 0
) -> tuple[list[dict[int, int]], float]:
    """Who ends up with whom by Ward's criterion, for every sample, and how clear the least clear decision was.

    Groups are lists of tokens here, whose means are computed anew each time. The margin is the smallest difference
    between two costs that decided something, as a share of the larger one; exact ties are no decision.
    """
    found = [
        _WardGroups(rows, weights, range(num_prefix, len(rows) - num_suffix)).run(r)
        for rows, weights in zip(metric.double(), size.double(), strict=True)
    ]
    return [joins for joins, _ in found], min(margin for _, margin in found)


class _WardGroups:
    """One sample: its groups, by their first tokens, and the links between tokens so far (cost, later, earlier)."""

    def __init__(self, rows: Tensor, weights: Tensor, places: range) -> None:
        self.rows, self.weights, self.places = rows, weights, places
        self.groups = {i: [i] for i in places}
        self.links: list[tuple[float, int, int]] = []
        self.margin = math.inf

    def run(self, r: int) -> tuple[dict[int, int], float]:
        free = len(self.places)
        for i in self.places:
            self._join(0.0, next(j for j in self.places if torch.equal(self.rows[j], self.rows[i])), i)
        for _ in range(next(n for n, most in ((4, free / 8), (8, free / 2), (16, free)) if r <= most)):
            nearest = {a: self._least(a, self.groups) for a in self.groups if len(self.groups) > 1}
            for a, (cost, b) in nearest.items():
                if a < b and nearest[b][1] == a:
                    self._join(cost, a, b)
        links, last = sorted(self.links), []
        if len(links) < r:
            left = sorted(self.groups)
            nearest_ahead = [(b, *self._least(b, left[:place])) for place, b in enumerate(left) if place]
            last = sorted((cost, b, a) for b, cost, a in nearest_ahead)
        for part in (links, last):
            self.margin = min([self.margin, *(_gap(a[0], b[0]) for a, b in itertools.pairwise(part))])
        joins = {b: a for _, b, a in (links + last)[:r]}
        return {b: _end(joins, b) for b in joins}, self.margin

    def _join(self, cost: float, keeps: int, goes: int) -> None:
        if keeps != goes:
            self.links.append((cost, goes, keeps))
            self.groups[keeps] = self.groups[keeps] + self.groups.pop(goes)

    def _least(self, group: int, others: Iterable[int]) -> tuple[float, int]:
        costs = sorted((self._cost(group, other), other) for other in others if other != group)
        self.margin = min([self.margin, *(_gap(cost, costs[0][0]) for cost, _ in costs[1:])])
        return costs[0]

    def _cost(self, a: int, b: int) -> float:
        sizes = [float(self.weights[self.groups[g]].sum()) for g in (a, b)]
        means = [
            (self.weights[self.groups[g], None] * self.rows[self.groups[g]]).sum(0) / n
            for g, n in zip((a, b), sizes, strict=True)
        ]
        return round(sizes[0] * sizes[1] / sum(sizes) * float((means[0] - means[1]).square().sum()), SCORE_DECIMALS)


def _gap(a: float, b: float) -> float:
    """How far two costs are apart, as a share of the larger one; infinity for equal ones."""
    return abs(a - b) / max(a, b) if a != b else math.inf


def _end(joins: dict[int, int], token: int) -> int:
    while token in joins:
        token = joins[token]
    return token
