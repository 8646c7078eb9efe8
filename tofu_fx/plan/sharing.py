"""Which sites use one match: those whose tokens are the same places of one image, matched once instead of each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tofu_fx.plan.words import Reuse
from tofu_fx.sites.site import Planned


def shared_matches(sites: Sequence[Planned], reuse: Reuse) -> Mapping[str, str]:
    """For each site that uses another's match, by their ids, that other one.

    With "resolution" it is the first site ahead of it with the same grid, protected tokens and number of tokens that
    go. Sites without a grid, and those that reduce the stream, have their own match: their tokens may be others.
    """
    first: dict[tuple[object, ...], str] = {}
    shares = {}
    for site in sites if reuse == "resolution" else ():
        if site.placement == "branch" and site.grid is not None:
            owner = first.setdefault((site.cells, site.prefix, site.suffix, site.r), site.id)
            if owner != site.id:
                shares[site.id] = owner
    return shares
