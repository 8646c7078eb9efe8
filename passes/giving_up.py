"""Sites that are given up while the graph is rewritten: not a pass, but what two of them do where a stream is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import networkx as nx
from torch.fx import Node

from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.compilation import Scheduled
from tofu_fx.fx.nodes import tensor_inputs, value_graph
from tofu_fx.sites.site import Decline, Declined, Planned, Site


def given_up(graph: Scheduled, reason: str, note: Callable[[Decline], str] | None = None) -> tuple[Site, ...]:
    """The graph's sites, without those of the streams that meet at ``graph.at``, or lead to it; where none does, all.

    ``note`` makes a warning of the reason.
    """
    at = graph.at.node
    assert isinstance(at, Node)
    tracer = graph.axes
    streams = {atom.base.stream for value in (at, *tensor_inputs(at)) for atom in tracer.tokens(value)}
    lost = [site for site in graph.reducing if _streams(site, tracer) & streams]
    if not lost:
        ahead = nx.ancestors(value_graph(graph.gm.graph), at)
        lost = [site for site in graph.reducing if site.reduce_at in ahead] or graph.reducing
    decline = Decline(reason, at)
    notes = () if note is None else (note(decline),)
    declined = {site.id: Declined(replace(site, notes=(*site.notes, *notes)), decline) for site in lost}
    return tuple(declined.get(site.id, site) for site in graph.sites)


def one_given_up(graph: Scheduled, lost: Planned, reason: str) -> tuple[Site, ...]:
    """The graph's sites, one of them declined; those after it take as many tokens as planned, from more."""
    gone, sites, passed = lost.tokens_in - lost.tokens_out, list[Site](), False
    for site in graph.sites:
        if site.id == lost.id:
            passed = True
            sites.append(Declined(lost, Decline(reason, lost.reduce_at)))
        elif passed and isinstance(site, Planned) and site.stream == lost.stream:
            sites.append(replace(site, tokens_in=site.tokens_in + gone, tokens_out=site.tokens_out + gone))
        else:
            sites.append(site)
    return tuple(sites)


def _streams(site: Planned, tracer: AxisTracer) -> set[int]:
    """The numbers of the streams that a site reduces: one, or that of each of its branches."""
    enters = [branch.enter for branch in site.branches]
    return {site.stream, *(atom.base.stream for enter in enters for atom in tracer.tokens(enter))}
