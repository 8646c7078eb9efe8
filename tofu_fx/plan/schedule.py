"""From options to numbers: how many tokens go at each site, and how (the fixed schedules, without calibration)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from tofu_fx.errors import OptionError
from tofu_fx.fx.stages import advanced
from tofu_fx.plan import projections
from tofu_fx.plan.counts import Passage, streams, walk
from tofu_fx.plan.fit import rows_for
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.plan.records import PlanRow
from tofu_fx.plan.sketch import folds
from tofu_fx.sites.site import Placed, Planned

DEFAULT_RATIO = 0.5

#: strategy, what tokens are compared by, tokens to remove
Decision = tuple[str, str, int]


def schedule(sites: Sequence[Placed], options: Options, unread: Mapping[str, int] | None = None) -> list[Planned]:
    """Decide of each site, in graph order, how many tokens go and how.

    Args:
        sites: those that are placed.
        options: parsed options.
        unread: attentions that would be sites if most of their tokens were not read by nobody afterwards, and where
            they would stand among the sites. What a plan or a list of ``r`` says of them comes to nothing.

    Raises:
        OptionError: when ``r`` lists another number of sites than the graph has.
        PlanError: when the plan is of another graph, or takes more tokens than it can.
    """
    cells = {} if options.plan is None else {row.id: row.cell for row in options.plan.sites}
    seed = 0 if options.seed is None else options.seed + 1
    whole = [
        advanced(
            Planned, site, cell=cells.get(site.id) or options.cell, seed=seed,
            tokens_in=site.tokens, tokens_out=site.tokens,
        )
        for site in sites
    ]  # fmt: skip
    decisions: list[Decision]
    if options.plan is not None:
        rows, notes = rows_for(options.plan, whole, unread or {})
        decisions = [(row.strategy, row.match, row.r) for row in rows]
    else:
        decisions, notes = _from_options(whole, _without(options, unread or {}, len(whole))), []
    if options.plan is not None:
        matrices = _matrices(options.plan, rows)
        whole = [replace(site, projection=matrix) for site, matrix in zip(whole, matrices, strict=True)]
    whole[:1] = [replace(site, notes=(*site.notes, *notes)) for site in whole[:1]]
    decided = {site.id: decision for site, decision in zip(whole, decisions, strict=True)}
    counted = walk(whole, lambda site, count: min(decided[site.id][2], site.cap(count)))
    return [_planned(site, decided[site.id], passage) for site, passage in counted]


def _matrices(plan: Plan, rows: Sequence[PlanRow]) -> list[torch.Tensor | None]:
    """The matrix of each row that needs one.

    Raises:
        PlanError: it has none.
    """
    projections.check(rows, plan.matrices, "the plan")
    return [plan.matrices[row.graph, row.id] if row.match == "fisher" else None for row in rows]


def _without(options: Options, unread: Mapping[str, int], sites: int) -> Options:
    """The options with what a list of ``r`` says of the sites that there are."""
    if not isinstance(options.r, tuple) or len(options.r) != sites + len(unread):
        return options
    left = tuple(r for place, r in enumerate(options.r) if place not in unread.values())
    return options.model_copy(update={"r": left})


def _planned(site: Planned, decision: Decision, passage: Passage) -> Planned:
    strategy, match, r = decision
    notes, count, cap = site.notes, passage.arriving, site.cap(passage.arriving)
    if r > cap and site.cells:
        free = count - site.prefix - site.suffix
        notes = (
            *notes,
            f"r = {r} capped at {cap}: of {free} tokens one in each cell of {site.cell} x {site.cell} stays, so a "
            f"ratio of {cap / free:.2f} is the most; a larger 'cell' allows more",
        )
    elif r > cap:
        notes = (*notes, f"r = {r} capped at {cap}: {count} tokens, {site.prefix + site.suffix} of them protected")
    return replace(
        site, strategy=strategy, match=match, r=passage.removed, notes=notes,
        tokens_in=count, tokens_out=passage.leaving,
    )  # fmt: skip


def _from_options(matched: Sequence[Planned], options: Options) -> list[Decision]:
    if isinstance(options.r, tuple) and len(options.r) != len(matched):
        raise OptionError(f"option 'r' lists {len(options.r)} layers, the graph has {len(matched)} attention sites")
    decided: dict[str, Decision] = {}
    for members in _groups(matched):
        wanted = _wanted(members, matched, options)
        for depth, (site, r) in enumerate(zip(members, wanted, strict=True)):
            match = default_match(site) if options.match == "auto" else options.match
            strategy = _strategy(options, depth, len(members), site.placement)
            decided[site.id] = (strategy, match, r)
    return [decided[site.id] for site in matched]


def _groups(matched: Sequence[Planned]) -> list[list[Planned]]:
    """The sites of each stream, and all those that reduce branches: each of these has all tokens again after it."""
    return streams(matched, lambda site, _: "branch" if site.placement == "branch" else site.stream)


def _wanted(members: Sequence[Planned], matched: Sequence[Planned], options: Options) -> list[int]:
    if isinstance(options.r, tuple):
        return [options.r[matched.index(site)] for site in members]
    if options.r is not None:
        return [options.r] * len(members)
    ratio = DEFAULT_RATIO if options.ratio is None else options.ratio
    if members[0].placement == "branch":
        return [round(ratio * (site.tokens - site.prefix - site.suffix)) for site in members]
    return spread(members[0].tokens, ratio, len(members))


def spread(tokens: int, ratio: float, layers: int) -> list[int]:
    """Tokens to remove at each of ``layers`` so that ``round(ratio * tokens)`` are gone after the last, evenly."""
    gone = [round(ratio * tokens * depth / layers) for depth in range(layers + 1)]
    return [b - a for a, b in itertools.pairwise(gone)]


def default_match(site: Planned) -> str:
    """What a site's tokens are compared by where nobody says: the keys; ahead of an attention there are none yet."""
    if site.placement == "stream":
        return "keys"
    return "sketch" if folds(site.width) > 1 else "features"


def _strategy(options: Options, depth: int, layers: int, placement: str) -> str:
    """The paper's rule without calibration: prune in the first half of the layers, mlerp after (section 4.2).

    A single site may be any layer of its model, which is then compiled block by block: it merges. What goes into an
    attention takes the mean: its keys and values are linear in it, so that with log(size) the mean of a group is to
    first order worth the group (measured: docs/dense.md).
    """
    if options.strategy != "auto":
        return options.strategy
    if placement == "branch":
        return "mean"
    return "prune" if depth < layers / 2 and layers > 1 else "mlerp"
