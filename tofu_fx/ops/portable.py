"""The operators as functional ATen that any runtime has: no shape depends on data, nothing is written by index.

`matching`, `ward` and `merging` say what is computed. Here it is computed without scatters (wrong in some runtimes,
missing or slow in others), without a sort whose order of equals matters, and without counting: comparisons, cumulative
sums, gathers, a sort of numbers that are all different, and one product with a small matrix of ones and zeros. So an
exported graph runs where tofu_fx is not installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .matching import CANDIDATE_TILE, PARTNER_TILE, Grid, padded_shape, partners_of, product, similarity
from .merging import CANCELLED, NEARLY_LARGEST
from .restore import gather_tokens, restore_in_aten
from .separate import separate_in_aten
from .ward import links_of, rounds, squared_distances, ward_costs

#: numbers for each sample, about, that distances are summed from at a time
_DIFFERENCES = 2**22


def fuse_tokens(  # noqa: PLR0913 - the arguments of the operator
    x: Tensor,
    metric: Tensor,
    size: Tensor,
    r: int,
    strategy: str,
    num_prefix: int,
    num_suffix: int,
    grid: Sequence[int] | None = None,
    grouping: str = "bipartite",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fuse.fuse_tokens`, whose arguments and results these are."""
    tokens = x.shape[1]
    place = torch.arange(tokens, device=x.device)
    if r == 0:
        whole = place.expand(x.shape[0], tokens)
        dense = torch.contiguous_format
        return x.clone(memory_format=dense), size.clone(memory_format=dense), whole.clone(), whole.clone()
    if grouping == "ward" and not grid:
        joins = _by_ward(metric, size, r, num_prefix, num_suffix)
    else:
        joins = _by_sides(metric, size, r, num_prefix, num_suffix, tuple(grid or ()), grouping)
    stays = joins == place
    assignment = (stays.long().cumsum(1) - 1).gather(1, joins)
    kept = _first(stays, place, tokens - r)
    new_x, new_size = merge_groups(x, size, assignment, kept, strategy)
    return new_x, new_size, assignment, kept


def merge_groups(x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    """`rebase.merge_groups`, whose arguments and results these are."""
    tokens, left = x.shape[1], kept.shape[1]
    place = torch.arange(tokens, device=x.device)
    own, own_size = gather_tokens(x, kept), size.gather(1, kept)
    if left == tokens:
        return own, own_size
    leaves = kept.gather(1, assignment) != place
    sources = _first(leaves, place, tokens - left)
    joins = assignment.gather(1, sources).unsqueeze(1) == torch.arange(left, device=x.device).unsqueeze(1)
    source_size = size.gather(1, sources)
    new_size = own_size + torch.where(joins, source_size.unsqueeze(1), 0.0).sum(2)
    if strategy == "prune":
        return own, new_size
    wide = torch.promote_types(x.dtype, torch.float32)
    group = _Group(own.to(wide), own_size.to(wide), gather_tokens(x, sources).to(wide), source_size.to(wide), joins)
    mean = strategy == "mean"
    merged = group.summed() / new_size.to(wide).unsqueeze(2) if mean else group.mlerp(x, kept, sources)
    return torch.where(joins.any(2, keepdim=True), merged.to(x.dtype), own), new_size


class _Group:
    """Destinations `[B, M, C]`, sources `[B, K, C]`, their sizes, and which source joins which, `[B, M, K]`."""

    def __init__(self, own: Tensor, own_size: Tensor, source: Tensor, source_size: Tensor, joins: Tensor) -> None:
        self.own, self.own_size, self.source, self.source_size, self.joins = own, own_size, source, source_size, joins

    def summed(self) -> Tensor:
        """The sums by sizes, `[B, M, C]`."""
        weighted = self.source * self.source_size.unsqueeze(2)
        # What is not finite must not reach other groups by way of a zero in the product.
        finite = weighted.isfinite()
        ones = self.joins.to(weighted.dtype)
        found = self.own * self.own_size.unsqueeze(2) + product(ones, torch.where(finite, weighted, 0.0))
        lost = product(ones, (~finite).to(weighted.dtype))
        return torch.where(lost > 0, torch.nan, found)

    def largest(self, own: Tensor, source: Tensor) -> Tensor:
        """The largest of the members' values, `[B, M]` of `[B, M]` and `[B, K]`."""
        return torch.maximum(own, torch.where(self.joins, source.unsqueeze(1), -torch.inf).amax(2))

    def mlerp(self, x: Tensor, kept: Tensor, sources: Tensor) -> Tensor:
        """The mean's direction, as long as the longest member (`merging`)."""
        top = self.largest(self.own.abs().amax(2), self.source.abs().amax(2))
        usual = (top > 2.0**-40) & (top < 2.0**40) | ~top.isfinite() | (top == 0)
        scale = torch.where(usual, 1.0, 1 / top).to(top.dtype)
        of_source = torch.where(self.joins, scale.unsqueeze(2), 0.0).amax(1)  # each source joins one
        scaled = _Group(
            self.own * scale.unsqueeze(2), self.own_size, self.source * of_source.unsqueeze(2), self.source_size,
            self.joins,
        )  # fmt: skip
        own_norm, source_norm = (torch.linalg.vector_norm(t, dim=2) for t in (scaled.own, scaled.source))
        summed, largest = scaled.summed(), self.largest(own_norm, source_norm)
        length = torch.linalg.vector_norm(summed, dim=2)
        reach = self.own_size * own_norm
        reach = reach + torch.where(self.joins, (self.source_size * source_norm).unsqueeze(1), 0.0).sum(2)
        members = 1 + self.joins.to(reach.dtype).sum(2)
        cancelled = length <= members * (CANCELLED * torch.finfo(reach.dtype).eps / 2) * reach
        merged = summed * (largest / length).unsqueeze(2) / scale.unsqueeze(2)
        least, none = largest * NEARLY_LARGEST, x.shape[1]
        first = torch.where(self.joins & (source_norm.unsqueeze(1) >= least.unsqueeze(2)), sources.unsqueeze(1), none)
        chosen = torch.minimum(first.amin(2), torch.where(own_norm >= least, kept, none))
        chosen = torch.where(chosen == none, kept, chosen)
        return torch.where(cancelled.unsqueeze(2), gather_tokens(x, chosen).to(merged.dtype), merged)


def _by_sides(
    metric: Tensor, size: Tensor, r: int, prefix: int, suffix: int, grid: tuple[int, ...], grouping: str
) -> Tensor:
    """Which token each one joins, `[B, N]`, itself if it stays: `matching.match`, or Ward's cost for the similarity."""
    tokens = metric.shape[1]
    place = torch.arange(tokens, device=metric.device)
    candidates, partners = _sides(tokens - prefix - suffix, grid, metric.device)
    candidates, partners = candidates + prefix, partners + prefix
    rows, others = metric.index_select(1, candidates), metric.index_select(1, partners)
    if grouping == "ward":
        sizes, other_sizes = size.index_select(1, candidates), size.index_select(1, partners)
        score = -ward_costs(squared_distances(rows, others, _by_columns), sizes, other_sizes)
    else:
        pair = _unit(rows, CANDIDATE_TILE), _unit(others, PARTNER_TILE)
        score = similarity(*pair)[:, : rows.shape[1], : others.shape[1]]
    goes = torch.where(_best(score.amax(2), r), partners[score.argmax(2)], candidates)
    # Each token looks up where it goes among the candidates, and those that are none behind them.
    is_candidate = (candidates.unsqueeze(1) == place).any(0)
    slot = torch.where(is_candidate, is_candidate.long().cumsum(0) - 1, candidates.shape[0] + place)
    return torch.cat([goes, place.expand(metric.shape[0], tokens)], dim=1).index_select(1, slot)


def _by_ward(metric: Tensor, size: Tensor, r: int, prefix: int, suffix: int) -> Tensor:
    """Which token each one ends up with, `[B, N]`: `ward.match_by_ward`."""
    tokens = metric.shape[1]
    free, inside = tokens - prefix - suffix, slice(prefix, tokens - suffix)
    squared = squared_distances(metric[:, inside], metric[:, inside], _by_columns)
    links, costs, late = links_of(squared, size[:, inside], rounds(r, free))
    place = torch.arange(free, device=metric.device)
    here, there = (t.unsqueeze(2) for t in (costs, late)), (t.unsqueeze(1) for t in (costs, late))
    (cost, is_late), (other, is_other_late) = here, there
    earlier = (other < cost) | ((other == cost) & (place < place.unsqueeze(1)))
    before = (is_late & ~is_other_late) | ((is_late == is_other_late) & earlier)
    goes = torch.where(before.long().sum(2) < r, links, place)
    for _ in range(free.bit_length()):
        goes = goes.gather(1, goes)
    whole = torch.arange(tokens, device=metric.device).expand(metric.shape[0], tokens)
    return torch.cat([whole[:, :prefix], goes + prefix, whole[:, tokens - suffix :]], dim=1)


def _sides(free: int, grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """`matching.sides`, ascending."""
    place = torch.arange(free, device=device)
    if not grid:
        return place[::2], place[1::2]
    partners = torch.sort(partners_of(Grid(*grid), device)).values
    is_partner = (partners.unsqueeze(1) == place).any(0)
    return _first(~is_partner.unsqueeze(0), place, free - partners.shape[0]).squeeze(0), partners


def _by_columns(rows: Tensor, columns: Tensor) -> Tensor:
    """`ward.by_cdist`, as many features at a time as make a tensor of some millions of numbers for each sample."""
    features = rows.shape[2]
    step = max(1, min(features, _DIFFERENCES // (rows.shape[1] * columns.shape[1])))
    parts = [slice(start, min(start + step, features)) for start in range(0, features, step)]
    found = [(rows[:, :, part].unsqueeze(2) - columns[:, :, part].unsqueeze(1)).square().sum(3) for part in parts]
    return functools.reduce(torch.add, found)


def _unit(metric: Tensor, tile: int) -> Tensor:
    """`matching.unit_rows`: whole tiles, so that equal rows have equal products wherever they stand."""
    _, tokens, features = metric.shape
    metric = metric.float()
    unit = metric / torch.linalg.vector_norm(metric, dim=2, keepdim=True)
    height, width = padded_shape(tokens, features, tile)
    return pad(torch.where(unit.isfinite(), unit, 0.0), (0, width - features, 0, height - tokens))


def _best(score: Tensor, r: int) -> Tensor:
    """Which r of the scores `[B, c]` are the highest; of equal ones the first."""
    least = torch.sort(score, dim=1, descending=True).values[:, r - 1 : r]
    more, equal = score > least, score == least
    return more | (equal & (equal.long().cumsum(1) <= r - more.long().sum(1, keepdim=True)))


def _first(chosen: Tensor, place: Tensor, count: int) -> Tensor:
    """The places of the `count` that are true in each row, ascending."""
    return torch.sort(torch.where(chosen, place, place + place.shape[0]), dim=1).values[:, :count].contiguous()


def rebase(x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor, strategy: str) -> Tensor:
    """`rebase.rebase`, whose arguments and result these are."""
    return gather_tokens(x, kept) if strategy == "prune" else merge_groups(x, size, assignment, kept, strategy)[0]


#: operator -> what it is in a graph that leaves the process
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.tofu.fuse_tokens.default: fuse_tokens,
    torch.ops.tofu.merge_groups.default: merge_groups,
    torch.ops.tofu.rebase.default: rebase,
    torch.ops.tofu.restore_tokens.default: restore_in_aten,
    torch.ops.tofu.separate.default: separate_in_aten,
}
