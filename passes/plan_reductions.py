"""Decide for every placed site how many tokens go, and how: from the options, or from a plan.

Before: a site is placed. After: it is planned. Changes nothing in the graph.
"""

from __future__ import annotations

from tofu_fx.compilation import Followed, Scheduled
from tofu_fx.fx.stages import advanced
from tofu_fx.plan.schedule import schedule


def plan_reductions(graph: Followed) -> Scheduled:
    """Plan the sites that are placed."""
    counted = [site for site in graph.sites if site.matched or site.attention.narrowed]
    unread = {site.id: place for place, site in enumerate(counted) if not site.matched}
    decided = {site.id: site for site in schedule(graph.placed, graph.options, unread)}
    return advanced(Scheduled, graph, sites=tuple(decided.get(site.id, site) for site in graph.sites))
