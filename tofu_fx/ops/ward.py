"""Who merges with whom by Ward's criterion: the groups whose members are nearest to their mean.

Ward (Hierarchical grouping to optimize an objective function, 1963) joins, again and again, the two groups whose union
adds the least to the sum of squared distances from the groups' means: ``n m / (n + m) |a - b|^2`` for groups of sizes n
and m with means a and b. Two groups that are each other's nearest may be joined at any time, the tree stays the same
(Murtagh, A survey of recent advances in hierarchical clustering algorithms, 1983). So all such pairs are joined at
once, in a few rounds, and of what was joined the cheapest counts. That is parallel, and every shape is known before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .matching import CANDIDATE_TILE, PARTNER_TILE, Reduction, choose, reduction_of, round_up, sides

#: further apart than any two tokens: what is not finite; sums of a few of these are finite still
FAR = 1e30


def match_by_ward(
    metric: Tensor, size: Tensor, r: int, num_prefix: int, num_suffix: int, grid: tuple[int, ...] = ()
) -> Reduction:
    """Choose the r tokens of each sample to merge away, and where each goes.

    Args:
        metric: `[B, N, M]`, any float dtype; compared by Euclidean distance in float32. B >= 1.
        size: `[B, N]`, > 0.
        r: number of sources, 1 <= r < the free tokens.
        num_prefix: tokens at the start that take no part.
        num_suffix: tokens at the end that take no part.
        grid: the fields of `Grid`, or empty. With a grid there is one round, in which the tokens that are no cell's
            partner join one (`matching.match`, with Ward's cost for the similarity).

    First each token joins the first one that it equals. Then, in some `rounds`, all groups join that are each other's
    nearest (ties: the first one). The later group in the stream joins the earlier one: that is a link, of the cost that
    it had. The r cheapest links count (ties: those of earlier tokens). Where there are fewer than r, each group that is
    left is linked to the nearest one ahead of it, and the cheapest of these count besides. A row that is not finite is
    `FAR` from every other.
    """
    batch, tokens, _ = metric.shape
    free = tokens - num_prefix - num_suffix
    if grid:
        candidates, partners = sides(free, grid, metric.device)
        score = scores(metric, size, num_prefix, candidates, partners)
        return choose(score, r, tokens, num_prefix, candidates, partners)
    inside = slice(num_prefix, num_prefix + free)
    squared = squared_distances(metric[:, inside], metric[:, inside])
    links, costs, late = links_of(squared, size[:, inside], rounds(r, free))
    by_cost = torch.argsort(costs, dim=-1, stable=True)
    chosen = by_cost.gather(1, torch.argsort(late.gather(1, by_cost).int(), dim=-1, stable=True))[:, :r]
    place = torch.arange(free, device=metric.device).expand(batch, free)
    goes = place.scatter(1, chosen, links.gather(1, chosen))
    for _ in range(free.bit_length()):  # a link leads to an earlier token, which may have one itself
        goes = goes.gather(1, goes)
    whole = torch.arange(tokens, device=metric.device).repeat(batch, 1)
    whole[:, inside] = goes + num_prefix
    stays = whole == torch.arange(tokens, device=metric.device)
    kept = torch.nonzero_static(stays, size=batch * (tokens - r))[:, 1].view(batch, tokens - r)
    return reduction_of((stays.cumsum(1) - 1).gather(1, whole), kept)


def rounds(r: int, free: int) -> int:
    """How many rounds there are: as many as find what Ward's own order finds, in all but a few samples.

    About a third of all groups are in pairs of mutual nearest neighbours. (Of 16 samples of 98 to 256 normal points in
    8 to 64 dimensions, at each of these shares of r the groups of at most 2 were others.)
    """
    return 4 if 8 * r <= free else 8 if 2 * r <= free else 16


def ward_costs(squared: Tensor, size: Tensor, other: Tensor) -> Tensor:
    """What joining groups costs: squared distances `[B, n, m]` of their means, sizes `[B, n]` and `[B, m]`."""
    size, other = size.unsqueeze(2), other.unsqueeze(1)
    return squared * (size * other / (size + other))


def scores(metric: Tensor, size: Tensor, num_prefix: int, candidates: Tensor, partners: Tensor) -> Tensor:
    """Minus Ward's cost of each candidate with each partner, padded as `matching.choose` wants it."""
    rows, columns = metric[:, num_prefix + candidates], metric[:, num_prefix + partners]
    sizes, others = size[:, num_prefix + candidates], size[:, num_prefix + partners]
    cost = ward_costs(squared_distances(rows, columns), sizes, others)
    padded = round_up(len(candidates), CANDIDATE_TILE), round_up(len(partners), PARTNER_TILE)
    score = cost.new_full((len(metric), *padded), -torch.inf)
    score[:, : len(candidates), : len(partners)] = -cost
    return score


def by_cdist(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances, by differences: products of rows would lose what is small beside the rows."""
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist").square()


def squared_distances(rows: Tensor, columns: Tensor, measured: Callable[[Tensor, Tensor], Tensor] = by_cdist) -> Tensor:
    """`[B, n, M]`, `[B, m, M]` -> `[B, n, m]` float32; 0 for equal rows, `FAR` for those that are not finite."""
    finite = [t.isfinite().all(-1) for t in (rows, columns)]
    rows, columns = (torch.where(f.unsqueeze(-1), t.float(), 0.0) for t, f in zip((rows, columns), finite, strict=True))
    squared = measured(rows, columns)
    return torch.where(finite[0].unsqueeze(2) & finite[1].unsqueeze(1), squared, FAR).clamp(max=FAR)


def links_of(squared: Tensor, size: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each token the earlier one that it is linked to, what that costs, and whether it is last resort, `[B, F]`.

    That are the links of groups that no round has joined. A cost of infinity: there is none ahead.
    """
    free = size.shape[1]
    place = torch.arange(free, device=size.device)
    earlier, later = place.unsqueeze(0) < place.unsqueeze(1), place.unsqueeze(0) > place.unsqueeze(1)
    equal = (squared == 0) & earlier
    links = torch.where(equal.any(-1), equal.int().argmax(-1), -1)
    costs = torch.where(links >= 0, 0.0, torch.inf)
    size = size + torch.where(links.unsqueeze(1) == place.unsqueeze(1), size.unsqueeze(1), 0.0).sum(2)
    for _ in range(rounds):
        alive = links < 0
        cost = _among(ward_costs(squared, size, size), alive, place)
        nearest = cost.argmin(-1)
        least = cost.gather(2, nearest.unsqueeze(2)).squeeze(2)
        mutual = alive & (nearest.gather(1, nearest) == place) & (least < torch.inf)
        takes, gone = mutual & (nearest > place), mutual & (nearest < place)
        partner = torch.where(takes, nearest, place)
        squared = _joined(squared, size, takes, partner, later)
        links = torch.where(gone, nearest, links)
        costs = torch.where(gone, least, costs)
        size = torch.where(takes, size + size.gather(1, partner), size)
    alive = links < 0
    cost = torch.where(earlier, _among(ward_costs(squared, size, size), alive, place), torch.inf)
    nearest = cost.argmin(-1)
    least = cost.gather(2, nearest.unsqueeze(2)).squeeze(2)
    return torch.where(alive, nearest, links), torch.where(alive, least, costs), alive


def _among(cost: Tensor, alive: Tensor, place: Tensor) -> Tensor:
    """Costs between groups that are there, infinity elsewhere."""
    there = alive.unsqueeze(1) & alive.unsqueeze(2) & (place.unsqueeze(0) != place.unsqueeze(1))
    return torch.where(there, cost, torch.inf)


def _joined(squared: Tensor, size: Tensor, takes: Tensor, partner: Tensor, later: Tensor) -> Tensor:
    """The squared distances of the means, after each group that ``takes`` has its partner (others: itself) with it.

    Of groups of sizes n and m at the squared distance d, to a third one: (n d1 + m d2) / (n + m) - n m d / (n + m)^2.
    """
    other = size.gather(1, partner)
    share, rest = size / (size + other), other / (size + other)
    apart = squared.gather(2, partner.unsqueeze(2)).squeeze(2) * share * rest
    for dim, index in ((2, partner.unsqueeze(2).expand_as(squared)), (1, partner.unsqueeze(1).expand_as(squared))):
        ours, theirs, off, joins = (t.unsqueeze(dim) for t in (share, rest, apart, takes))
        new = (squared * ours + squared.gather(3 - dim, index) * theirs - off).clamp(0.0, FAR)
        squared = torch.where(joins, new, squared)
    return torch.where(later, squared, squared.mT)
