"""From options to numbers: how many tokens go at each site, and how (the fixed schedules, without calibration)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tofu_fx.errors import OptionError
from tofu_fx.plan.counts import streams, walk
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.plan.sketch import folds
from tofu_fx.sites.site import Site

DEFAULT_RATIO = 0.5

#: strategy, what tokens are compared by, tokens to remove
Decision = tuple[str, str, int]


def schedule(sites: Sequence[Site], options: Options) -> None:
    """Decide ``strategy``, ``match``, ``r``, ``tokens_in`` and ``tokens_out`` of the matched sites, in graph order.

    Raises:
        OptionError: when ``r`` lists another number of sites than the graph has.
        PlanError: when the plan is of another graph, or takes more tokens than it can.
    """
    matched = [site for site in sites if site.matched]
    for site in matched:
        site.cell, site.seed = options.cell, 0 if options.seed is None else options.seed + 1
    if options.plan is not None:
        cells = {row.id: row.cell for row in Plan.load(options.plan).sites}
        for site in matched:
            site.cell = cells.get(site.id) or site.cell
    decisions = _from_plan(matched, options) if options.plan is not None else _from_options(matched, options)
    decided = {site.id: decision for site, decision in zip(matched, decisions, strict=True)}

    def decide(site: Site, count: int) -> int:
        strategy, match, r = decided[site.id]
        cap = site.cap(count)
        if r > cap and site.cells:
            free = count - site.lead - site.tail
            site.notes.append(
                f"r = {r} capped at {cap}: of {free} tokens one in each cell of {site.cell} x {site.cell} stays, so a "
                f"ratio of {cap / free:.2f} is the most; a larger 'cell' allows more"
            )
        elif r > cap:
            site.notes.append(f"r = {r} capped at {cap}: {count} tokens, {site.lead + site.tail} of them protected")
        site.strategy, site.match, site.r = strategy, match, min(r, cap)
        return site.r

    for site, passage in walk(matched, decide):
        site.tokens_in, site.tokens_out = passage.arriving, passage.leaving


def _from_plan(matched: Sequence[Site], options: Options) -> list[Decision]:
    rows, notes = Plan.load(options.plan).rows_for(matched)
    if matched:
        matched[0].notes.extend(notes)
    return [(row.strategy, row.match, row.r) for row in rows]


def _from_options(matched: Sequence[Site], options: Options) -> list[Decision]:
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


def _groups(matched: Sequence[Site]) -> list[list[Site]]:
    """The sites of each stream, and all those that reduce branches: each of these has all tokens again behind it."""
    return streams(matched, lambda site, _: "branch" if site.placement == "branch" else site.stream)


def _wanted(members: Sequence[Site], matched: Sequence[Site], options: Options) -> list[int]:
    if isinstance(options.r, tuple):
        return [options.r[matched.index(site)] for site in members]
    if options.r is not None:
        return [options.r] * len(members)
    ratio = DEFAULT_RATIO if options.ratio is None else options.ratio
    if members[0].placement == "branch":
        return [round(ratio * (site.tokens - site.lead - site.tail)) for site in members]
    return spread(members[0].tokens, ratio, len(members))


def spread(tokens: int, ratio: float, layers: int) -> list[int]:
    """Tokens to remove at each of ``layers`` so that ``round(ratio * tokens)`` are gone after the last, evenly."""
    gone = [round(ratio * tokens * depth / layers) for depth in range(layers + 1)]
    return [b - a for a, b in itertools.pairwise(gone)]


def default_match(site: Site) -> str:
    """What a site's tokens are compared by where nobody says: the keys; ahead of an attention there are none yet."""
    if site.placement == "stream":
        return "keys"
    return "sketch" if folds(site.dim) > 1 else "features"


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
