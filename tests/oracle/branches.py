"""Reduction in the branches of a block, from the formulas and in eager mode: what a reduced model must compute.

Nothing here comes from the package under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle.operators import SCORE_DECIMALS, reference_apply, reference_rebase, reference_restore
from tests.oracle.stream import CLEAR_MARGIN, Undecided

#: source -> destination, places in the sequence
Merges = dict[int, int]


def cells_of(frames: int, height: int, width: int, cell: int) -> list[list[int]]:
    """The places of each cell; those at the border are smaller where the cell does not divide the image."""
    found = []
    for frame in range(frames):
        for top in range(0, height, cell):
            for left in range(0, width, cell):
                rows = range(top, min(top + cell, height))
                columns = range(left, min(left + cell, width))
                found.append([(frame * height + row) * width + column for row in rows for column in columns])
    return found


def reference_grid_match(
    metric: Tensor, r: int, prefix: int, free: int, destinations: Sequence[int]
) -> tuple[list[Merges], float]:
    """Each of the other free places looks at its most similar destination; the r most similar go. Ties: the first.

    Args:
        metric: `[B, N, M]`; compared by cosine similarity in float64. Rows without a usable length are like no other.
        r: how many go.
        prefix: protected tokens ahead of the ``free`` ones.
        free: tokens that may take part.
        destinations: places among the free tokens, ascending.

    Returns:
        The merges of each sample, and the smallest gap between two different scores that decided one.
    """
    candidates = [place for place in range(free) if place not in destinations]
    merges, margin = [], math.inf
    for rows in metric[:, prefix : prefix + free].double():
        units = [row / row.norm() if 0 < float(row.norm()) < math.inf else torch.zeros_like(row) for row in rows]
        choices = []
        for candidate in candidates:
            scores = [round(float(units[candidate] @ units[place]), SCORE_DECIMALS) for place in destinations]
            best = max(scores)
            margin = min([margin, *(best - score for score in scores if score < best)])
            choices.append((-best, candidate, destinations[scores.index(best)]))
        choices.sort()
        if 0 < r < len(choices):
            ends = (choices[r - 1][0], choices[r][0])
            margin = min([margin, *(abs(choice[0] - end) for end in ends for choice in choices if choice[0] != end)])
        merges.append({prefix + source: prefix + place for _, source, place in choices[:r]})
    return merges, margin


@dataclass
class Step:
    """One reduction: what `tofu::fuse_tokens` gives beside the features."""

    size: Tensor
    assignment: Tensor
    kept: Tensor
    strategy: str

    @classmethod
    def of(cls, h: Tensor, r: int, prefix: int, side: int, strategy: str = "mean", cell: int = 2) -> Step:
        """Match what goes into a branch, `[B, prefix + side^2, C]`, by itself less the mean of its channels.

        Raises:
            Undecided: a decision so close that two float32 computations may differ.
        """
        h = h.detach()
        destinations = sorted(places[0] for places in cells_of(1, side, side, cell))
        merges, margin = reference_grid_match(
            h - h.mean(-1, keepdim=True), r, prefix, h.shape[1] - prefix, destinations
        )
        if margin < CLEAR_MARGIN:
            raise Undecided
        return cls(*reference_apply(h, torch.ones(h.shape[:2]), merges, strategy)[1:], strategy)

    def merge(self, h: Tensor) -> Tensor:
        """Whole tokens -> merged ones."""
        return reference_rebase(h, torch.ones(h.shape[:2]), self.assignment, self.kept, self.strategy)

    def back(self, x: Tensor) -> Tensor:
        """Each token a copy of its group's."""
        return reference_restore(x, self.assignment)

    def rows_of(self, table: Tensor) -> Tensor:
        """A table over the tokens `[N, D]` -> `[B, 1, M, D]` of those that stay."""
        return table[self.kept].unsqueeze(1)
