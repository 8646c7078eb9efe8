"""Decline the sites whose reduction would cost more time than it saves; changes nothing in the graph.

Not asked of a saved plan, which was measured or written by hand, nor where ``profitable_only`` is False.
"""

from __future__ import annotations

from collections.abc import Sequence

from tofu_fx.compilation import Compilation
from tofu_fx.plan.counts import walk
from tofu_fx.plan.profit import unprofitable
from tofu_fx.sites.site import Decline, Site


def decline_unprofitable(compilation: Compilation) -> None:
    """Set ``decline`` of the sites that do not pay; those behind them get the tokens that stay."""
    options = compilation.options
    if not options.profitable_only or options.plan is not None or compilation.rehearsed is not None:
        return
    for stream in {site.stream for site in compilation.reducing}:
        sites = [site for site in compilation.sites if site.matched and site.stream == stream]
        losing = unprofitable(sites, compilation.traced, compilation.gm.graph)

        def again(site: Site, count: int, losing: Sequence[Site] = losing) -> int:
            if site in losing:
                assert site.reduce_at is not None
                reason = f"removing {site.r} of {count} tokens would cost more time than it saves"
                site.decline = Decline(reason, site.reduce_at)
            site.r = 0 if site in losing else min(site.r, site.cap(count))
            return site.r

        for site, passage in walk(sites, again):
            site.tokens_in, site.tokens_out = passage.arriving, passage.leaving
