"""Who merges with whom: bipartite soft matching over the free tokens (arXiv 2210.09461, sec. 3; arXiv 2312.01026).

Batches are handled flat: a "row" is a place in `[B * N]`, so one index selects a token of a sample.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .hashing import scatter_bits

# Shapes of the similarity matrix are rounded up to these. BLAS computes the ragged edge of a matrix with other code
# than its inside: there, the same two rows give other bits, which would decide ties by position and make a sample
# depend on where it lies in its batch. Seen with MKL for ragged partners and features, not for candidates, whose tile
# only spares that question on the next CPU.
CANDIDATE_TILE = 8
PARTNER_TILE = 32
_FEATURE_TILE = 16

#: how it is decided who merges: this module, and `ward`
GROUPINGS = ("bipartite", "ward")


class Reduction(NamedTuple):
    """The merges of a batch: K = B * r rows leave, B * M rows stay.

    Row `sources[k]` joins row `destinations[k]`; ordered by destination, then by source. A source occurs once and is
    never a destination. `place` `[B * N]` is where each row goes in the flat reduced stream, `kept` `[B * M]` the rows
    that stay, ascending.
    """

    sources: Tensor
    destinations: Tensor
    place: Tensor
    kept: Tensor


class Grid(NamedTuple):
    """The free tokens as `frames` maps of `height` x `width` places, row by row: one partner in each cell.

    Cells have `cell` x `cell` places (fewer at the right and lower border). The partner is the cell's first place, or
    with `seed` > 0 one that the seed picks, the same on every run and device.
    """

    frames: int
    height: int
    width: int
    cell: int
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Places of all frames."""
        return self.frames * self.height * self.width

    @property
    def cells(self) -> int:
        """Cells of all frames: as many tokens stay at least."""
        return self.frames * -(-self.height // self.cell) * -(-self.width // self.cell)


def max_reduction(
    num_tokens: int, num_prefix: int = 0, num_suffix: int = 0, grid: Sequence[int] = (), grouping: str = "bipartite"
) -> int:
    """Return the largest r that `fuse_tokens` accepts: all free tokens but one in each cell.

    Without a grid it is half of them, with the grouping "ward" all but one.
    """
    if grid:
        return Grid(*grid).tokens - Grid(*grid).cells
    free = max(num_tokens - num_prefix - num_suffix, 0)
    return max(free - 1, 0) if grouping == "ward" else free // 2


def sides(free: int, grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the places of the candidates and of the partners among the free tokens, both ascending.

    They are made on the device each time: a tensor that is made while a CUDA graph is captured lives in the graph's own
    memory, so nobody may keep it. On CPU those of a grid, which take forty small calls, are remembered.
    """
    if not grid:
        return torch.arange(0, free, 2, device=device), torch.arange(1, free, 2, device=device)
    return _remembered_sides(grid) if device.type == "cpu" else _grid_sides(Grid(*grid), device)


@functools.lru_cache(maxsize=64)
def _remembered_sides(grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return _grid_sides(Grid(*grid), torch.device("cpu"))


def _grid_sides(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    is_partner = torch.zeros(grid.tokens, dtype=torch.bool, device=device)
    is_partner.index_fill_(0, partners_of(grid, device), True)
    return _true_places(~is_partner, grid.tokens - grid.cells), _true_places(is_partner, grid.cells)


def partners_of(grid: Grid, device: torch.device) -> Tensor:
    """Return the place of each cell's partner."""
    frame = torch.arange(grid.frames, device=device).view(-1, 1, 1)
    top = torch.arange(0, grid.height, grid.cell, device=device).view(1, -1, 1)
    left = torch.arange(0, grid.width, grid.cell, device=device).view(1, 1, -1)
    row, column = top.expand(grid.frames, -1, left.numel()), left.expand(grid.frames, top.numel(), -1)
    if grid.seed:
        bits = scatter_bits(torch.arange(1, grid.cells + 1, device=device), grid.seed).view(row.shape)
        row = row + bits % (grid.height - top).clamp(max=grid.cell)
        column = column + (bits >> 16) % (grid.width - left).clamp(max=grid.cell)
    return ((frame * grid.height + row) * grid.width + column).flatten()


def padded_shape(tokens: int, features: int, tile: int = 2 * PARTNER_TILE) -> tuple[int, int]:
    """Round the shape `[tokens, features]` of a sample's unit rows up to whole tiles."""
    return round_up(tokens, tile), round_up(features, _FEATURE_TILE)


def unit_rows(metric: Tensor, tile: int = 2 * PARTNER_TILE) -> Tensor:
    """Scale the rows of `metric` `[B, N, M]` to length one, in float32, at the start of a zero-padded `[B, N', M']`.

    A row without a usable length (zero, NaN, or beyond float32's range) becomes zero: it is equally unlike every token
    and no NaN reaches the ordering.
    """
    batch, tokens, features = metric.shape
    metric = metric.float()
    padded = metric.new_zeros((batch, *padded_shape(tokens, features, tile)))
    inside = padded[:, :tokens, :features]
    torch.div(metric, torch.linalg.vector_norm(metric, dim=-1, keepdim=True), out=inside)
    inside.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return padded


def interleaved(rows: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Return the candidates (even rows) and the partners (odd rows) of padded unit rows, both padded."""
    return rows[:, : 2 * round_up(candidates, CANDIDATE_TILE) : 2], rows[:, 1::2]


def similarity(candidates: Tensor, partners: Tensor) -> Tensor:
    """Score unit rows `[B, c, M]` against `[B, p, M]`: `[B, c, p]` float32."""
    return product(candidates, partners.transpose(1, 2))


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of batches in their own dtype, whatever the caller's autocast says."""
    # Entering autocast costs as much as the product of a small batch.
    device = a.device.type
    full = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with full:
        return torch.bmm(a, b)


def match(metric: Tensor, r: int, num_prefix: int, num_suffix: int, grid: tuple[int, ...] = ()) -> Reduction:
    """Choose the r tokens of each sample to merge away, and where each goes.

    Args:
        metric: `[B, N, M]`, any float dtype; compared by cosine similarity in float32. B >= 1.
        r: number of sources, 1 <= r <= max_reduction(N, num_prefix, num_suffix, grid).
        num_prefix: tokens at the start that take no part.
        num_suffix: tokens at the end that take no part.
        grid: the fields of `Grid`, or empty.

    Of the free tokens one in each cell of the grid is a partner, the others are candidates; without a grid the even
    places are candidates and the odd ones partners. Each candidate looks at its
    most similar partner (ties: the first one); the r candidates with the highest similarity are the sources (ties: the
    first ones).
    """
    tokens = metric.shape[1]
    free = tokens - num_prefix - num_suffix
    candidates, partners = sides(free, grid, metric.device)
    inside = metric[:, num_prefix : num_prefix + free]
    if grid:
        pair = unit_rows(inside[:, candidates], CANDIDATE_TILE), unit_rows(inside[:, partners], PARTNER_TILE)
    else:
        pair = interleaved(unit_rows(inside), candidates.shape[0])
    return choose(similarity(*pair), r, tokens, num_prefix, candidates, partners)


def choose(score: Tensor, r: int, tokens: int, num_prefix: int, candidates: Tensor, partners: Tensor) -> Reduction:
    """Take the r candidates of each sample that have the highest score with a partner.

    Args:
        score: `[B, c', p']` float32, at its start the candidates by the partners; it is written to. p' is a multiple of
            PARTNER_TILE.
        r: how many.
        tokens: N, of which the first num_prefix are not free.
        num_prefix: see there.
        candidates: `[c]`, their places among the free tokens, ascending.
        partners: `[p]`, likewise.
    """
    batch, height, device = score.shape[0], score.shape[1], score.device
    score[:, :, partners.shape[0] :] = -torch.inf
    # A maximum with its place is scalar code on CPU. So find plain maxima of blocks first, and look for places only in
    # the r winning blocks. The first best block, and the first best inside it, are the first best of all.
    blocks = score.view(batch, height, -1, PARTNER_TILE).amax(dim=-1)
    ranked = torch.sort(blocks.amax(dim=-1)[:, : candidates.shape[0]], dim=-1, descending=True, stable=True).indices
    chosen = ranked[:, :r].sort(dim=-1).values
    sample = torch.arange(batch, device=device).unsqueeze(1)
    winner = (chosen + sample * height).flatten()
    block = blocks.view(-1, blocks.shape[2]).index_select(0, winner).argmax(dim=-1)
    inside = score.view(-1, PARTNER_TILE).index_select(0, winner * blocks.shape[2] + block).argmax(dim=-1)
    first = sample * tokens + num_prefix
    partner = (block * PARTNER_TILE + inside).view(chosen.shape)
    destinations, order = torch.sort(partners[partner] + first, dim=-1, stable=True)
    sources = (candidates[chosen] + first).gather(1, order).flatten()
    destinations = destinations.flatten()
    keep = torch.ones(batch * tokens, dtype=torch.bool, device=device).index_fill_(0, sources, False)
    place = keep.cumsum(0).sub_(1)
    place.index_copy_(0, sources, place.index_select(0, destinations))
    return Reduction(sources, destinations, place, _true_places(keep, batch * (tokens - r)))


def reduction_of(assignment: Tensor, kept: Tensor) -> Reduction:
    """Read the merges back from `assignment` `[B, N]` and `kept` `[B, M]`, B >= 1 and M < N."""
    batch, tokens = assignment.shape
    place, kept = flat_places(assignment, kept.shape[1]), flat_places(kept, tokens)
    representative = kept.index_select(0, place)
    moved = representative != torch.arange(batch * tokens, device=kept.device)
    sources = _true_places(moved, batch * tokens - kept.shape[0])
    destinations, order = torch.sort(representative.index_select(0, sources).view(batch, -1), dim=-1, stable=True)
    return Reduction(sources.view(batch, -1).gather(1, order).flatten(), destinations.flatten(), place, kept)


def flat_places(index: Tensor, length: int) -> Tensor:
    """Turn places `[B, K]` in sequences of `length` into rows `[B * K]` of the flat `[B * length]`."""
    sample = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
    return (index + sample * length).flatten()


def _true_places(mask: Tensor, count: int) -> Tensor:
    """Return the places of the `count` true elements; knowing the count, no device has to be waited for."""
    return torch.nonzero_static(mask, size=count).squeeze(1)


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple
