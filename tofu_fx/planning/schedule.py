"""From options to numbers: how many tokens go at each site, and how (the fixed schedules, without calibration)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tofu_fx.errors import OptionError
from tofu_fx.ops import max_reduction
from tofu_fx.options import Options
from tofu_fx.planning.plan import Plan
from tofu_fx.planning.site import Site

DEFAULT_RATIO = 0.5


def schedule(sites: Sequence[Site], options: Options) -> None:
    """Decide ``strategy``, ``r``, ``tokens_in`` and ``tokens_out`` of the matched sites, in graph order.

    Raises:
        OptionError: when ``r`` lists another number of sites than the graph has.
        PlanError: when the plan is of another graph.
    """
    matched = [site for site in sites if site.matched]
    plan = Plan.load(options.plan) if options.plan is not None else None
    if plan is not None:
        plan.check_fits(matched)
    if isinstance(options.r, tuple) and len(options.r) != len(matched):
        raise OptionError(f"option 'r' lists {len(options.r)} layers, the graph has {len(matched)} attention sites")
    for stream in sorted({site.stream for site in matched}):
        members = [site for site in matched if site.stream == stream]
        wanted = _wanted(members, matched, options, plan)
        count = members[0].tokens
        for depth, (site, r) in enumerate(zip(members, wanted, strict=True)):
            row = plan.sites[matched.index(site)] if plan is not None else None
            site.strategy = row.strategy if row else _strategy(options, depth, len(members))
            # If every candidate must go, the one at the edge of the padding has to cross it.
            free = count - site.lead - site.tail
            cap = (free - 1) // 2 if site.padding else max_reduction(count, site.lead, site.tail)
            if r > cap:
                site.notes.append(f"r = {r} capped at {cap}: {count} tokens, {site.lead + site.tail} of them protected")
            site.r = min(r, cap)
            site.tokens_in, site.tokens_out = count, count - site.r
            count = site.tokens_out


def _wanted(members: Sequence[Site], matched: Sequence[Site], options: Options, plan: Plan | None) -> list[int]:
    if plan is not None:
        return [plan.sites[matched.index(site)].r for site in members]
    if isinstance(options.r, tuple):
        return [options.r[matched.index(site)] for site in members]
    if options.r is not None:
        return [options.r] * len(members)
    ratio = DEFAULT_RATIO if options.ratio is None else options.ratio
    return spread(members[0].tokens, ratio, len(members))


def spread(tokens: int, ratio: float, layers: int) -> list[int]:
    """Tokens to remove at each of ``layers`` so that ``round(ratio * tokens)`` are gone after the last, evenly."""
    gone = [round(ratio * tokens * depth / layers) for depth in range(layers + 1)]
    return [b - a for a, b in itertools.pairwise(gone)]


def _strategy(options: Options, depth: int, layers: int) -> str:
    """The paper's rule without calibration: prune in the first half of the layers, mlerp after (section 4.2)."""
    if options.strategy != "auto":
        return options.strategy
    return "prune" if depth < layers / 2 else "mlerp"
