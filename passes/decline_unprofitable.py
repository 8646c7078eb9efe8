"""Decline the sites whose reduction would cost more time than it saves; changes nothing in the graph.

Before: a site is planned. After: it is planned, or declined; those after it in the stream get the tokens that stay. Not
asked of a plan, which was measured or written by hand, nor where ``profitable_only`` is False.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tofu_fx.compilation import Scheduled
from tofu_fx.plan.counts import walk
from tofu_fx.plan.profit import unprofitable
from tofu_fx.sites.site import Decline, Declined, Planned, Site


def decline_unprofitable(graph: Scheduled) -> Scheduled:
    """Decline the sites that do not pay."""
    options = graph.options
    if not options.profitable_only or options.plan is not None or graph.reducer.any_plan:
        return graph
    decided: dict[str, Site] = {}
    for stream in {site.stream for site in graph.reducing}:
        decided.update(_judged([site for site in graph.planned if site.stream == stream], graph))
    return replace(graph, sites=tuple(decided.get(site.id, site) for site in graph.sites))


def _judged(sites: Sequence[Planned], graph: Scheduled) -> dict[str, Site]:
    """The sites of one stream by their ids."""
    losing = {site.id for site in unprofitable(sites, graph.axes, graph.gm.graph)}

    def removes(site: Planned, count: int) -> int:
        return 0 if site.id in losing else min(site.r, site.cap(count))

    judged: dict[str, Site] = {}
    for site, passage in walk(sites, removes):
        into, out = passage.arriving, passage.leaving
        now = replace(site, r=passage.removed, tokens_in=into, tokens_out=out)
        reason = f"removing {site.r} of {into} tokens would cost more time than it saves"
        judged[site.id] = Declined(now, Decline(reason, site.reduce_at)) if site.id in losing else now
    return judged
