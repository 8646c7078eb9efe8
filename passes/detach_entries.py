"""Give each branch an entry that nobody else reads: ``aten.alias`` where the residual stream or another branch does.

Before: ``%n = layer_norm(%x)``, read by the attention and by the residual add of a post-norm block
After:  ``%a = alias(%n)``, read by the attention alone

What becomes fewer at the entry then is what the branch reads, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch.fx import Node

from tofu_fx.compilation import Analysed
from tofu_fx.sites.entries import detach
from tofu_fx.sites.site import Placed, Site


def detach_entries(graph: Analysed, sites: Sequence[Site], attentions: Collection[Node]) -> list[Site]:
    """The sites with entries of their own for their branches; ``attentions`` are those of all sites over tokens."""
    detached: list[Site] = []
    for site in sites:
        graph.at.node = site.attention.node
        branches = isinstance(site, Placed) and site.placement == "branch"
        detached.append(detach(site, graph.plain, attentions) if branches else site)  # type: ignore[arg-type]
    graph.gm.recompile()
    return detached
