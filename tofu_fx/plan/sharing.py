"""Which sites use one match: those whose tokens are the same places of one image, matched once instead of each time."""

from __future__ import annotations

from collections.abc import Sequence

from tofu_fx.plan.options import Reuse
from tofu_fx.sites.site import Site


def share_matches(sites: Sequence[Site], reuse: Reuse) -> None:
    """Set ``shares`` of each site that reduces a branch.

    With "resolution" it is the first site ahead of it with the same grid, protected tokens and number of tokens that
    go. Sites without a grid, and those that reduce the stream, have their own match: their tokens may be others.
    """
    first: dict[tuple[object, ...], Site] = {}
    for site in sites:
        site.shares = None
        if reuse == "resolution" and site.placement == "branch" and site.grid is not None:
            owner = first.setdefault((site.cells, site.lead, site.tail, site.r), site)
            site.shares = owner if owner is not site else None
