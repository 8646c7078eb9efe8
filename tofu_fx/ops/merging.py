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

#: K members whose weighted sum is at most this many times K u as long as the sum of their weighted norms cancel, with u
#: half of the dtype's eps. Rounding puts a sum of K terms off by up to K u of that: what is shorter has no direction
#: that is known, and one that is just longer is off by 1/64. Even random directions leave 1/sqrt(K), so that a float32
#: sum is cut off by mistake in groups of more than 4000 unlike tokens only.
CANCELLED = 64
#: Of members that cancel, the first whose norm is within a thousandth of the largest stays. Two opposite ones are as
#: long as each other but for rounding, which must not choose.
NEARLY_LARGEST = 1 - 2.0**-10


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

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest of `values` `[L]` in each group: `[G]`; NaN if there is one."""
        return values.index_select(0, self.start).scatter_reduce_(0, self.group, values, "amax")

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
    w_k n/|s| (g - (g.u) u), and the member k* which sets the norm gets (g.u) x_k*/n besides. Where members cancel,
    y = x_k*. All of it is the same if x is scaled.
    """
    groups = Groups.of(reduction, padded)
    blend = _Blend.of(x, size.index_select(0, groups.member), groups)
    chosen = _largest_member(blend, groups)
    spread = grad.index_select(0, reduction.place)
    g = spread.index_select(0, groups.target).to(blend.rows.dtype)
    unit = blend.summed / blend.length.unsqueeze(1)
    along = (g * unit).sum(1, keepdim=True)
    cancelled = blend.cancelled.unsqueeze(1)
    by_sum = torch.where(cancelled, 0.0, (blend.largest / blend.length).unsqueeze(1) * (g - along * unit))
    along = along.index_select(0, groups.group) / blend.largest.index_select(0, groups.group).unsqueeze(1)
    by_norm = torch.where(cancelled.index_select(0, groups.group), g.index_select(0, groups.group), along * blend.rows)
    sets_norm = (chosen.index_select(0, groups.group) == groups.member).unsqueeze(1)
    values = blend.weight.unsqueeze(1) * by_sum.index_select(0, groups.group)
    values += torch.where(sets_norm, by_norm, 0.0)
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


class _Blend(NamedTuple):
    """What MLERP and its gradient are made of, in at least float32. All but the weights are times `scale`.

    `rows` `[L, C]`, `weight` and `norm` `[L]` are the members'; `summed` `[G, C]` the weighted sums, which have the
    direction of the means; `length` and `largest` `[G]` the norm of the sum and the largest of a member; `cancelled`
    `[G]` where the sum is rounding and no more.
    """

    rows: Tensor
    weight: Tensor
    norm: Tensor
    summed: Tensor
    length: Tensor
    largest: Tensor
    cancelled: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, groups: Groups) -> _Blend:
        rows = x.index_select(0, groups.member).to(_wide(x.dtype))
        weight = weight.to(rows.dtype)
        scale = _scale(groups.largest(torch.linalg.vector_norm(rows, torch.inf, dim=1)))
        rows *= scale.index_select(0, groups.group).unsqueeze(1)
        summed = groups.sum(rows, weights=weight)
        norm, length = torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(summed, dim=1)
        reach, members = groups.sum(torch.stack([weight * norm, torch.ones_like(norm)], dim=1)).unbind(1)
        cancelled = length <= members * (CANCELLED * torch.finfo(rows.dtype).eps / 2) * reach
        return cls(rows, weight, norm, summed, length, groups.largest(norm), cancelled, scale)


def _scale(largest: Tensor) -> Tensor:
    """Return the powers of two that bring `largest` to where squares neither overflow nor vanish.

    They are 1 for all ordinary numbers, and the bits of a result are the same as without them.
    """
    usual = 40 if largest.dtype == torch.float32 else 400
    exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1.0)).exponent
    return torch.ldexp(torch.ones_like(largest), exponent.clamp(-usual, usual) - exponent)


def _mlerp(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    blend = _Blend.of(x, weight, groups)
    values = blend.summed.mul_((blend.largest / blend.length).unsqueeze(1)).div_(blend.scale.unsqueeze(1)).to(x.dtype)
    if groups.padded or blend.cancelled.any():
        chosen = _largest_member(blend, groups)
        values = torch.where(blend.cancelled.unsqueeze(1), x.index_select(0, chosen), values)
    return values


def _largest_member(blend: _Blend, groups: Groups) -> Tensor:
    """Return the member `[G]` of each group that has its largest norm, nearly where members cancel (ties: first)."""
    # A NaN norm is at least as large as nothing and keeps the destination; the result is NaN whichever member it is.
    none = torch.iinfo(torch.int64).max
    least = torch.where(blend.cancelled, blend.largest * NEARLY_LARGEST, blend.largest)
    candidate = torch.where(blend.norm >= least.index_select(0, groups.group), groups.member, none)
    chosen = torch.full_like(groups.target, none).scatter_reduce_(0, groups.group, candidate, "amin")
    return torch.where(chosen == none, groups.target, chosen)
