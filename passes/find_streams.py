"""Find where tokens can become fewer, and what works on fewer of them then; all once more where a site is lost.

Before: sites are found. After: they are placed, and their streams are followed to the places where tokens must be
whole. It is three steps, each in its file: choose_placement, detach_entries, follow_streams. The automatic placement
asks how far the residual streams go, so that they are followed first; and where a stream is not reduced any more,
others may be followed further. Each round starts from the sites as they were found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tofu_fx.passes.choose_placement import Placement, choose_placement, planned_placements, prefers_branch
from tofu_fx.passes.detach_entries import detach_entries
from tofu_fx.passes.follow_streams import Streams, follow_streams

from tofu_fx.compilation import Analysed, Followed
from tofu_fx.plan.images import check_grids
from tofu_fx.sites.site import Declined, Found, Site

#: what a round does, in order
STEPS = (choose_placement, detach_entries, follow_streams)


def find_streams(graph: Analysed) -> Followed:
    """Place the sites of a graph and follow their streams.

    Raises:
        OptionError, PlanError: a grid that contradicts what is known of the tokens.
    """
    followed = _find(graph)
    return _with_notes(followed, check_grids(followed.placed, graph.options))


def _with_notes(graph: Followed, notes: Mapping[str, Sequence[str]]) -> Followed:
    """The graph with further notes on its sites, by their ids; what is noted already is noted once."""

    def noted(site: Site) -> Site:
        if not isinstance(site, Found) or site.id not in notes:
            return site
        return replace(site, notes=tuple(dict.fromkeys((*site.notes, *notes[site.id]))))

    return replace(graph, sites=tuple(map(noted, graph.sites)))


def _find(graph: Analysed) -> Followed:
    options, names = graph.options, [site.id for site in graph.sites if site.matched]
    branch = Placement("branch", options.branches, options.grid)
    if options.placement == "branch" and options.plan is None:
        return _round(graph, dict.fromkeys(names, branch), {}, {}).graph
    streams = _round(graph, {}, {}, {}).graph
    planned = planned_placements(options)
    kept = {site.id: site for site in streams.sites if isinstance(site, Declined) and site.id in names}
    if any(placement.kind == "branch" for placement in planned.values()):
        # A site that the plan does not know was declined when it was made, on its stream or else in its branch.
        chosen = {name: planned.get(name, branch) for name in names if name not in kept or name in planned}
    elif options.placement == "auto" and options.plan is None:
        wanted = [site.id for site in streams.sites if site.id in names and prefers_branch(site, streams)]
        chosen = dict.fromkeys(wanted, branch)
    else:
        return streams
    lost, found = list(chosen), streams
    while lost:
        unwanted = {name: site for name, site in kept.items() if name not in chosen}
        found, spared = _round(graph, chosen, unwanted, kept)
        # What can be served on its stream and not in its branch is served there, unless it is left alone on purpose.
        lost = [site.id for site in found.sites if site.id in chosen and not site.matched and site.id not in kept]
        lost = [name for name in lost if name not in spared]
        if options.plan is not None:
            break
        for name in lost:
            del chosen[name]
    # A size that was symbolic in the first round, and was said to be, is a number in all later ones.
    return _with_notes(found, {site.id: site.notes for site in streams.sites})


def _round(
    graph: Analysed,
    placements: Mapping[str, Placement],
    unwanted: Mapping[str, Declined],
    kept: Mapping[str, Declined],
) -> Streams:
    sites = choose_placement(graph, placements, unwanted)
    # What has no place in its branch says why it has none on its stream, if it has none there either.
    sites = [kept.get(site.id, site) if isinstance(site, Declined) else site for site in sites]
    wanted = [site.attention.node for site in graph.sites if site.matched and site.id not in unwanted]
    return follow_streams(graph, detach_entries(graph, sites, wanted))
