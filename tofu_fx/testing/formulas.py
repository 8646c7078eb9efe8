"""The formulas of token reduction (arXiv 2210.09461, sec. 3; arXiv 2312.01026, sec. 3), written from the papers.

In float64, on tokens that all keep their place: a group is told by ``chief`` ``[B, N]``, which names for each token the
one that stands for it, and every member of a group holds the group's features. So a token that stands for three is
there three times, and no formula needs a size.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Two float32 computations of one cosine differ by about 1e-6. A decision that is closer could fall either way.
CLEAR = 1e-5
#: similarities of padding, beyond those of any two tokens
_ALIKE, _APART = 2.0, -2.0


class Undecided(Exception):
    """A decision is too close to rounding for two float32 computations of it to be compared."""


def groups_of(chief: Tensor) -> Tensor:
    """Which tokens are of one group, ``[B, N, N]`` bool."""
    return chief.unsqueeze(2) == chief.unsqueeze(1)


def merge(x: Tensor, before: Tensor, chief: Tensor, strategy: str) -> Tensor:
    """Give each member of a new group what the group becomes.

    Args:
        x: ``[B, N, F]``, equal within the groups of ``before``.
        before: ``[B, N]``, the groups so far.
        chief: ``[B, N]``, the groups from now on, each a union of earlier ones.
        strategy: "prune": the chief's features. "mean": the mean m over all members. "mlerp": m / |m| times the largest
            norm of a member. What is not floating point is the chief's.

    Raises:
        Undecided: members that cancel up to rounding.
    """
    pruned = x.gather(1, chief.unsqueeze(-1).expand_as(x))
    if strategy == "prune" or not x.is_floating_point():
        return pruned
    same = groups_of(chief)
    new = same.sum(2) != groups_of(before).sum(2)
    mean = same.double() @ x.double() / same.sum(2, keepdim=True)
    if strategy == "mlerp":
        largest = torch.where(same, x.double().norm(dim=-1).unsqueeze(1), 0).amax(2)
        length = mean.norm(dim=-1)
        if bool((new & (length < CLEAR * largest)).any()):
            raise Undecided("the members of a group cancel")
        mean = mean * (largest / length.clamp_min(torch.finfo(torch.float64).tiny)).unsqueeze(-1)
    return torch.where(new.unsqueeze(-1), mean.to(x.dtype), x)


def similarity(metric: Tensor, valid: Tensor | None) -> Tensor:
    """Cosine similarity of tokens ``[N, M]``; where ``valid`` ``[N]`` is false, it is padding, kept to itself."""
    length = metric.double().norm(dim=-1, keepdim=True)
    unit = torch.where(length > 0, metric.double() / length, 0)
    cosine = unit @ unit.T
    if valid is None:
        return cosine
    cosine = torch.where(valid.unsqueeze(1) ^ valid, _APART, cosine)
    return torch.where(valid.unsqueeze(1) | valid, cosine, _ALIKE)


def choose(score: Tensor, r: int, partner: Tensor) -> list[tuple[int, int]]:
    """Bipartite soft matching among free tokens: r pairs of who goes and whom it joins.

    Each token that is no partner looks at its most similar partner (the first of equals); the r of them with the
    highest similarity go (the first of equals).

    Args:
        score: ``[n, n]``, the similarity of the free tokens.
        r: how many go.
        partner: ``[n]`` bool, who may be joined.

    Raises:
        Undecided: another choice is as good, up to rounding.
    """
    candidates, partners = (~partner).nonzero().flatten(), partner.nonzero().flatten()
    score = score[candidates][:, partners]
    rows = score.tolist()
    best = [max(row) for row in rows]
    place = [row.index(top) for row, top in zip(rows, best, strict=True)]
    ranked = sorted(range(len(best)), key=lambda i: (-best[i], i))
    for i in ranked[:r]:
        if any(_close(best[i], other) for k, other in enumerate(rows[i]) if k != place[i]):
            raise Undecided("two partners are equally similar")
    if r < len(ranked) and _close(best[ranked[r - 1]], best[ranked[r]]):
        raise Undecided("two tokens are equally similar to their partners")
    return [(int(candidates[i]), int(partners[place[i]])) for i in ranked[:r]]


def _close(a: float, b: float) -> bool:
    exact = a in (_ALIKE, _APART) and a == b  # padding is alike by definition, not by rounding
    return abs(a - b) < CLEAR and not exact


def partners_of(free: int, grid: tuple[int, ...]) -> Tensor:
    """Who may be joined of the free tokens, bool: every second; of a grid the first place of each cell.

    ``grid`` is (frames, height, width, side of a cell, seed), the last one 0.
    """
    place = torch.arange(free)
    if not grid:
        return place % 2 == 1
    _, height, width, cell, _ = grid
    row, column = place // width % height, place % width
    return (row % cell == 0) & (column % cell == 0)


def join(chief: Tensor, score: list[Tensor], r: int, prefix: int, suffix: int, grid: tuple[int, ...]) -> Tensor:
    """One reduction: the groups ``[B, N]`` that result from groups ``[B, N]``.

    Args:
        chief: the groups so far.
        score: for each sample ``[N, N]``, the similarity of all tokens.
        r: how many of the tokens that stand for others or themselves go.
        prefix: tokens at the start that take no part.
        suffix: tokens at the end that take no part.
        grid: see ``partners_of``.
    """
    joined = chief.clone()
    for b, groups in enumerate(chief):
        alive = groups.unique()  # ascending: survivors keep the order of the stream
        free = alive[prefix : len(alive) - suffix]
        for goes, stays in choose(score[b][free][:, free], r, partners_of(len(free), grid)):
            joined[b, groups == free[goes]] = free[stays]
    return joined


def join_by_ward(
    chief: Tensor, metric: Tensor, valid: Tensor | None, r: int, prefix: int, suffix: int, grid: tuple[int, ...]
) -> Tensor:
    """As ``join``, for groups by Ward's criterion on ``metric`` ``[B, N, k]``; ``valid`` ``[B, N]`` are no padding."""
    joined = chief.clone()
    for b, groups in enumerate(chief):
        alive = groups.unique()
        free = alive[prefix : len(alive) - suffix]
        rows = metric[b, free].double()
        if valid is not None:
            rows = torch.where(valid[b, free].unsqueeze(1), rows, 0)
            away = 1e6 * (1 + metric[b][valid[b]].double().norm(dim=1).max()) if bool(valid[b].any()) else 1e6
            rows = torch.cat([rows, torch.where(valid[b, free].unsqueeze(1), 0.0, away)], 1)
        sizes = (groups == free.unsqueeze(1)).sum(1).double()
        partner = partners_of(len(free), grid)
        for goes, stays in _nearest_partners(rows, sizes, r, partner) if grid else ward(rows, sizes, r):
            joined[b, groups == free[goes]] = free[stays]
    return joined


def ward(rows: Tensor, sizes: Tensor, r: int) -> list[tuple[int, int]]:
    """Ward's criterion: r pairs of who goes and with whom it ends up.

    Copies join the first of them. Then, in 4 rounds (8 where more than an eighth of them go, 16 of a half), all groups
    join that are each other's nearest by ``n m / (n + m) |a - b|^2``. The r cheapest links count; if there are fewer,
    those of what is left to the nearest ahead of it besides.

    Raises:
        Undecided: another choice is as good, up to rounding.
    """
    count = len(rows)
    mean, size, alive = rows.clone(), sizes.clone(), torch.ones(count, dtype=torch.bool)
    links: list[tuple[float, int, int, bool]] = []

    def join(cost: float, stays: int, goes: int, clear: bool = True) -> None:
        links.append((cost, goes, stays, clear))
        mean[stays] = (size[stays] * mean[stays] + size[goes] * mean[goes]) / (size[stays] + size[goes])
        size[stays] += size[goes]
        alive[goes] = False

    for i in range(count):
        first = int((rows == rows[i]).all(1).nonzero()[0])
        if first < i:
            join(0.0, first, i)
    for _ in range(4 if 8 * r <= count else 8 if 2 * r <= count else 16):
        cost = _ward_costs(mean, size, alive)
        nearest = {i: _least(cost[i]) for i in alive.nonzero().flatten().tolist() if alive.sum() > 1}
        for i, (j, clear) in nearest.items():
            if i < j and nearest[j][0] == i:
                join(float(cost[i, j]), i, j, clear and nearest[j][1])
    links.sort()
    if len(links) < r:
        cost = _ward_costs(mean, size, alive)
        left = alive.nonzero().flatten().tolist()
        ahead = {j: _least(torch.where(torch.arange(count) < j, cost[j], torch.inf)) for j in left[1:]}
        links += sorted((float(cost[j, i]), j, i, clear) for j, (i, clear) in ahead.items())
    if r < len(links) and links[r - 1][0] > 0 and _near(links[r - 1][0], links[r][0]):
        raise Undecided("two groups cost the same")
    # Elsewhere it makes no difference: what is nearest to each other joins sooner or later.
    if not all(clear for *_, clear in links[:r]):
        raise Undecided("two groups are equally near")
    goes_to = {j: i for _, j, i, _ in links[:r]}
    ends = {}
    for j in goes_to:
        i = j
        while i in goes_to:
            i = goes_to[i]
        ends[j] = i
    return list(ends.items())


def _ward_costs(mean: Tensor, size: Tensor, alive: Tensor) -> Tensor:
    apart = (mean.unsqueeze(1) - mean.unsqueeze(0)).square().sum(2)
    cost = apart * (size.unsqueeze(1) * size / (size.unsqueeze(1) + size))
    there = alive.unsqueeze(1) & alive & ~torch.eye(len(mean), dtype=torch.bool)
    return torch.where(there, cost, torch.inf)


def _least(costs: Tensor) -> tuple[int, bool]:
    """The place of the least cost, and whether no other one is as good up to rounding."""
    place = int(costs.argmin())
    others = torch.cat([costs[:place], costs[place + 1 :]])
    return place, not len(others) or not _near(float(costs[place]), float(others.min()))


def _near(a: float, b: float) -> bool:
    """Whether two costs are one up to rounding: squares of differences, each off by as much as a cosine."""
    return a != b and abs(a - b) <= 10 * CLEAR * max(a, b)


def _nearest_partners(rows: Tensor, sizes: Tensor, r: int, partner: Tensor) -> list[tuple[int, int]]:
    cost = _ward_costs(rows, sizes, torch.ones(len(rows), dtype=torch.bool))
    candidates, partners = (~partner).nonzero().flatten(), partner.nonzero().flatten()
    costs = cost[candidates][:, partners]
    best = sorted((float(row.min()), i) for i, row in enumerate(costs))
    if r < len(best) and _near(best[r - 1][0], best[r][0]):
        raise Undecided("two tokens are equally near to their partners")
    places = {i: _least(costs[i]) for _, i in best[:r]}
    if not all(clear for _, clear in places.values()):
        raise Undecided("two partners are equally near")
    return [(int(candidates[i]), int(partners[place])) for i, (place, _) in places.items()]


def metric_of(vectors: Tensor, match: str) -> Tensor:
    """What tokens are compared by, ``[B, N, M]``, from keys ``[B, N, D, heads]`` or features ``[B, N, C, 1]``."""
    vectors = vectors.double()
    if match == "keys":
        return vectors.mean(-1)
    if match not in ("features", "sketch"):
        return vectors.flatten(2)
    x = vectors.flatten(2)
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return _sketch(x) if match == "sketch" else x


def _sketch(x: Tensor) -> Tensor:
    """Runs of neighbouring channels summed with signs + - + -: at most 128 runs, none where they would be under 64."""
    channels = x.shape[-1]
    run = next(n for n in range(1, channels + 1) if channels % n == 0 and channels // n <= 128)
    if channels // run < 64:
        return x
    signs = 1 - 2 * (torch.arange(run) % 2)
    return (x.unflatten(-1, (-1, run)) * signs).sum(-1)
