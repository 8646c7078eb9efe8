"""What a group of tokens becomes: prune, mean or MLERP (arXiv 2312.01026, sec. 3.2), and the gradient of MLERP.

Only the groups that merge are touched; every other row is moved by one gather. Sums go over contiguous segments in a
fixed order (`embedding_bag`): the same bits on every run, for every batch, and no float atomics on any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .matching import Reduction

STRATEGIES = ("prune", "mean", "mlerp")


class Groups(NamedTuple):
    """The groups of a batch that merge: K sources and G destinations are L = K + G members.

    `member` `[L]` are rows of the flat stream, group after group, the destination first and then its sources in the
    order of the stream; `group` `[L]` names the group of each and `start` `[G]` where each group begins. `target` `[G]`
    are the destinations' rows; `joined` `[K]` are the places of the sources among the members.

    If `padded`, G is K: the groups past the last real one hold one stray member each and are never written.
    """

    member: Tensor
    group: Tensor
    start: Tensor
    target: Tensor
    joined: Tensor
    padded: bool

    @classmethod
    def of(cls, reduction: Reduction, padded: bool | None = None) -> Groups:
        """Find the runs of equal destinations.

        `padded` leaves the number of groups uncounted, so that no device has to be waited for: the default off CPU.
        """
        sources, destinations = reduction.sources, reduction.destinations
        padded = sources.device.type != "cpu" if padded is None else padded
        count = sources.shape[0]
        first = torch.ones_like(destinations, dtype=torch.bool)
        torch.ne(destinations[1:], destinations[:-1], out=first[1:])
        of_source = first.cumsum(0).sub_(1)
        if padded:
            lead = torch.nonzero_static(first, size=count, fill_value=count).squeeze(1)
            target = destinations.index_select(0, lead.clamp(max=count - 1))
        else:
            lead = first.nonzero().squeeze(1)
            target = destinations.index_select(0, lead)
        order = torch.arange(count, device=sources.device)
        number = order[: lead.shape[0]]
        start = lead + number
        joined = of_source + order
        joined += 1
        member = sources.new_empty(count + lead.shape[0])
        group = torch.empty_like(member)
        member.index_copy_(0, start, target).index_copy_(0, joined, sources)
        group.index_copy_(0, start, number).index_copy_(0, joined, of_source)
        return cls(member, group, start, target, joined, padded)

    def sum(self, table: Tensor, rows: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Sum `weights[l] * table[rows[l]]` over the members of each group: `[G, C]`; rows are 0..L-1 by default."""
        if rows is None:
            rows = torch.arange(table.shape[0], device=table.device)
        return torch.embedding_bag(table, rows, self.start, False, 0, False, weights)[0]

    def write(self, out: Tensor, place: Tensor, values: Tensor) -> None:
        """Write `values[g]` to `out[place[g]]`."""
        if self.padded:  # One write for each source: a group with several writes the same bits again.
            group = self.group.index_select(0, self.joined)
            place, values = place.index_select(0, group), values.index_select(0, group)
        out.index_copy_(0, place, values)

    def write_members(self, out: Tensor, values: Tensor) -> None:
        """Write `values[l]` to `out[member[l]]`."""
        if self.padded:
            self.write(out, self.target, values.index_select(0, self.start))
            out.index_copy_(0, self.member.index_select(0, self.joined), values.index_select(0, self.joined))
        else:
            out.index_copy_(0, self.member, values)


def reduce_rows(
    x: Tensor, size: Tensor, reduction: Reduction, strategy: str, padded: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Apply a matching to a flat batch.

    Args:
        x: `[B * N, C]`; computed in float32, or in float64 if x is that.
        size: `[B * N]` float32.
        reduction: who joins whom.
        strategy: one of STRATEGIES.
        padded: see `Groups.of`.

    Returns:
        The reduced features `[B * M, C]` and sizes `[B * M]`.
    """
    x, size = x.contiguous(), size.contiguous()
    groups = Groups.of(reduction, padded)
    weight, total = _weights(size, groups)
    place = reduction.place.index_select(0, groups.target)
    new_size = size.index_select(0, reduction.kept)
    groups.write(new_size, place, total)
    new_x = x.index_select(0, reduction.kept)
    if strategy == "mean":
        groups.write(new_x, place, _mean(x, weight, total, groups))
    elif strategy == "mlerp":
        groups.write(new_x, place, _mlerp(x, weight, groups))
    return new_x, new_size


def mlerp_gradient(grad: Tensor, x: Tensor, size: Tensor, reduction: Reduction, padded: bool | None = None) -> Tensor:
    """Return the gradient `[B * N, C]` of MLERP with respect to x, for `grad` `[B * M, C]`.

    With s the weighted sum, u = s/|s| and n = |x_k*| the largest member norm, y = n u. So a member k gets
    w_k n/|s| (g - (g.u) u), and the member k* which sets the norm gets (g.u) x_k*/n besides. Where |s| = 0, y = x_k*.
    """
    groups = Groups.of(reduction, padded)
    rows = x.index_select(0, groups.member).to(_wide(x.dtype))
    weight = size.index_select(0, groups.member).to(rows.dtype)
    summed = groups.sum(rows, weights=weight)
    norm, largest = _largest(rows, groups)
    chosen = _largest_member(norm, largest, groups)
    length = torch.linalg.vector_norm(summed, dim=1)
    zero = (length == 0).unsqueeze(1)
    spread = grad.index_select(0, reduction.place)
    g = spread.index_select(0, groups.target).to(rows.dtype)
    unit = summed / length.unsqueeze(1)
    along = (g * unit).sum(1, keepdim=True)
    by_sum = torch.where(zero, 0.0, (largest / length).unsqueeze(1) * (g - along * unit))
    by_norm = torch.where(zero, g, along * x.index_select(0, chosen) / largest.unsqueeze(1))
    sets_norm = (chosen.index_select(0, groups.group) == groups.member).unsqueeze(1)
    values = weight.unsqueeze(1) * by_sum.index_select(0, groups.group)
    values += torch.where(sets_norm, by_norm.index_select(0, groups.group), 0.0)
    groups.write_members(spread, values.to(grad.dtype))
    return spread


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _weights(size: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Return the size of each member `[L]` and of each group `[G]`."""
    weight = size.index_select(0, groups.member)
    return weight, groups.sum(weight.unsqueeze(1)).squeeze(1)


def _mean(x: Tensor, weight: Tensor, total: Tensor, groups: Groups) -> Tensor:
    dtype = _wide(x.dtype)
    if x.dtype == dtype:
        summed = groups.sum(x, groups.member, weight.to(dtype))
    else:
        summed = groups.sum(x.index_select(0, groups.member).to(dtype), weights=weight)
    return summed.div_(total.unsqueeze(1)).to(x.dtype)


def _mlerp(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    rows = x.index_select(0, groups.member).to(_wide(x.dtype))
    # The sum has the direction of the mean. Weights are whole numbers as a rule, so members that cancel do so exactly.
    summed = groups.sum(rows, weights=weight.to(rows.dtype))
    norm, largest = _largest(rows, groups)
    length = torch.linalg.vector_norm(summed, dim=1)
    values = summed.mul_((largest / length).unsqueeze(1)).to(x.dtype)
    zero = length == 0
    if groups.padded or zero.any():
        chosen = _largest_member(norm, largest, groups)
        values = torch.where(zero.unsqueeze(1), x.index_select(0, chosen), values)
    return values


def _largest(rows: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Return the norms `[L]` of rows `[L, C]`, and each group's largest `[G]`."""
    norm = torch.linalg.vector_norm(rows, dim=1)
    return norm, norm.index_select(0, groups.start).scatter_reduce_(0, groups.group, norm, "amax")


def _largest_member(norm: Tensor, largest: Tensor, groups: Groups) -> Tensor:
    """Return the member `[G]` of each group that has its largest norm (ties: first)."""
    # A NaN norm equals nothing and keeps the destination; the result is NaN whichever member it is.
    none = torch.iinfo(torch.int64).max
    candidate = torch.where(norm == largest.index_select(0, groups.group), groups.member, none)
    chosen = torch.full_like(groups.target, none).scatter_reduce_(0, groups.group, candidate, "amin")
    return torch.where(chosen == none, groups.target, chosen)
