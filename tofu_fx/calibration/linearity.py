"""How linear the branch after a site is (Token Fusion, arXiv 2312.01026, section 3.1): chord over path.

    FL = |f(X1) - f(X0)| / sum_i |f(X(t_i+1)) - f(X(t_i))|,    X(t) = (1 - t) X0 + t X1,    t = 0, 1/N, .., 1

1 for a linear f, less the more f bends. Merging puts a token between others, so where f bends, what it makes of the
merged token is not the merge of what it made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tofu_fx.calibration.recording import Rehearsed
from tofu_fx.calibration.rehearsal import Choice, Rehearsal, Snapshot
from tofu_fx.plan.records import Spread
from tofu_fx.plan.schedule import default_match

#: N, the pieces that the way from X0 to X1 is cut into
STEPS = 10
#: of the tokens that could merge, the share whose merges the pair score looks at
PAIR_SHARE = 0.25


def fractional_linearity(f: Callable[[Tensor], Tensor], x0: Tensor, x1: Tensor, steps: int = STEPS) -> Tensor:
    """FL of each token.

    Args:
        f: maps ``[B, N, C]`` to ``[B, N, F]``.
        x0: ``[B, N, C]``.
        x1: ``[B, N, C]``.
        steps: N. The path is a polygon through N + 1 points: too few miss bends, which makes FL too large.

    Returns:
        ``[B, N]`` in (0, 1]; NaN where f does not move at all, so that nothing can be said.
    """
    first = last = f(x0).float()
    path = torch.zeros(first.shape[:2], device=first.device)
    for i in range(1, steps + 1):
        now = f(torch.lerp(x0, x1, i / steps) if i < steps else x1).float()
        path += torch.linalg.vector_norm(now - last, dim=-1)
        last = now
    chord = torch.linalg.vector_norm(last - first, dim=-1)
    return (chord / path).clamp(max=1.0)  # 0 / 0 is NaN; more than 1 is rounding


def site_linearity(
    rehearsal: Rehearsal, entry: Rehearsed, inputs: Sequence[Any], start: Snapshot, order: Tensor, steps: int = STEPS
) -> tuple[Tensor, Tensor] | None:
    """Linearity of the branch after a site: between samples, and between the tokens that would be merged there.

    Args:
        rehearsal: the graph.
        entry: the site.
        inputs: of the graph, a batch of B samples.
        start: the values ahead of the site.
        order: which sample each sample is paired with, int64 ``[B]``.
        steps: see ``fractional_linearity``.

    Returns:
        FL ``[B, N]`` between the tokens of paired samples (NaN for B = 1), and FL of each token that would be merged
        with what it would be merged into. None where there is no branch.
    """
    if entry.branch is None:
        return None
    branch = entry.branch

    def f(x: Tensor) -> Tensor:
        value: Tensor = rehearsal.evaluate(branch, inputs, start, {entry.merged: x})
        return value

    site = entry.site
    r = max(1, round(PAIR_SHARE * site.cap(site.tokens)))
    wanted = (entry.merged, entry.part(2), entry.part(3))
    x = start.values[entry.fuse.args[0]]  # type: ignore[index]
    _, kept = rehearsal.run(inputs, {site.id: Choice("prune", default_match(site), r)}, start, wanted)
    assignment, survivors = kept[entry.part(2)], kept[entry.part(3)]
    partner = survivors.gather(1, assignment)
    moved = partner != torch.arange(x.shape[1], device=x.device)
    pairs = fractional_linearity(f, x, x.gather(1, partner.unsqueeze(2).expand_as(x)), steps)[moved]
    return fractional_linearity(f, x, x.index_select(0, order), steps), pairs


def spread(values: Sequence[Tensor]) -> Spread | None:
    """Mean and standard deviation of what can be said; None where nothing can."""
    known = torch.cat([value.flatten() for value in values]) if values else torch.empty(0)
    known = known[known.isfinite()].double()
    if not known.numel():
        return None
    return Spread(mean=known.mean().item(), std=known.std(correction=0).item())
