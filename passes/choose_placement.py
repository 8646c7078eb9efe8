"""Choose for each site where its tokens become fewer: on the residual stream, or in the branches of its block.

    x ----------------+            the residual add after an attention is where a stream may shrink;
    norm-attention-proj-(+) = y    everything computed from y then works on fewer tokens, up to a barrier

Before: a site is found. After: it is placed, or declined because it has no place, or shares it with another site.
Changes nothing in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import hint
from tofu_fx.compilation import Analysed, Followed
from tofu_fx.plan.options import Options
from tofu_fx.plan.words import BranchKind
from tofu_fx.sites.branches import place_branches
from tofu_fx.sites.residual import place_site
from tofu_fx.sites.site import Decline, Declined, Found, Placed, Site

FEW_SITES = 2  # after so few, merging all that must go at once loses more than merging in each block does


class Placement(NamedTuple):
    """Where one site's tokens are to be reduced and, if in branches, in which of them, and what image they are of."""

    kind: str
    branches: Sequence[BranchKind] = ()
    grid: tuple[int, int] | None = None


STREAM = Placement("stream")


def planned_placements(options: Options) -> dict[str, Placement]:
    """The placements of a plan's rows, by the ids of their sites."""
    rows = [] if options.plan is None else options.plan.sites
    grids = {row.id: options.grid or (tuple(row.grid) if row.grid else None) for row in rows}
    return {row.id: Placement(row.placement, row.branches, grids[row.id]) for row in rows}


def choose_placement(
    graph: Analysed, placements: Mapping[str, Placement], unwanted: Mapping[str, Declined]
) -> list[Site]:
    """Place every site that was found.

    Args:
        graph: the graph and its sites.
        placements: the placements of some sites by their ids; the others are placed on their streams.
        unwanted: sites that are not to be placed at all.
    """
    order = {node: i for i, node in enumerate(graph.gm.graph.nodes)}
    wanted = [site for site in graph.sites if isinstance(site, Found) and site.id not in unwanted]
    attentions = [site.attention.node for site in wanted]
    sites: list[Site] = []
    taken: dict[Node, Placed] = {}
    entered: set[Node] = set()  # the MLP after two attentions side by side is a branch of the first one
    for found in graph.sites:
        if not isinstance(found, Found) or found.id in unwanted:
            sites.append(unwanted.get(found.id, found))
            continue
        graph.at.node = found.attention.node
        placement = placements.get(found.id, STREAM)
        if placement.kind == "branch":
            site = place_branches(found, graph.plain, order, placement.branches, attentions, placement.grid)
        else:
            site = place_site(found, graph.plain, order)
        if isinstance(site, Placed):
            site = _alone(site, taken, entered)
        sites.append(site)
    return sites


def _alone(site: Placed, taken: dict[Node, Placed], entered: set[Node]) -> Placed | Declined:
    """The site with its place and its branches for itself; declined where another has taken the place."""
    first = taken.setdefault(site.reduce_at, site)
    if first is not site:
        reason = f"it ends at the same residual add as {first.id}, where tokens are reduced once"
        if site.placement == "branch":
            reason = f"it reads the same tokens as {first.id}, where they are reduced once for both"
        return Declined(site, Decline(reason, site.attention.node))
    if site.placement == "branch":
        attention, *others = site.branches
        own = tuple(branch for branch in others if branch.enter not in entered)
        entered.update(branch.enter for branch in others)
        return replace(site, branches=(attention, *own))
    return site


def prefers_branch(site: Site, graph: Followed) -> bool:
    """Whether a site, placed on its stream, should reduce the branches of its block instead.

    Measured (docs/dense.md): a stream that many layers reduce a little each, and that is restored once, loses less than
    branches do at the same operations, on a dense ViT; one that must be whole after one or two layers (between the
    convolutions of a UNet) loses far more. A model that gives back what it was given, as a denoiser does, needs
    the detail of every token, which only the residual stream has.
    """
    if isinstance(site, Declined):
        return not isinstance(site.site, Placed)  # no place on the stream was found for it
    assert isinstance(site, Placed)
    whole = {atom.base.stream for b in graph.barriers for v in b.values for atom in graph.axes.tokens(v)}
    if site.stream not in whole:
        return False
    members = [other for other in graph.placed if other.stream == site.stream]
    return len(members) <= FEW_SITES or _gives_back_its_input(site, graph)


def _gives_back_its_input(site: Placed, graph: Followed) -> bool:
    """Whether an output has the shape of an input that is not the residual stream itself.

    The channels may be twice as many: a denoiser may predict a variance, too.
    """
    width = hint(site.reduce_at.meta["val"].shape[-1])
    nodes = graph.gm.graph.find_nodes(op="placeholder")
    given = [node.meta.get("val") for node in nodes if node not in graph.model_state]
    places = [_apart(value) for value in given if _is_features(value)]
    for made in map(_apart, filter(_is_features, graph.traced_outputs)):
        for rest, channels in places:
            is_stream = len(rest) == 2 and channels == width
            if made[0] == rest and made[1] in (channels, 2 * channels) and not is_stream:
                return True
    return False


def _is_features(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and value.is_floating_point()


def _apart(value: torch.Tensor) -> tuple[list[int], int]:
    """Batch and places of ``[B, N, C]`` or ``[B, C, H, W]``, and the channels."""
    shape = [hint(size) for size in value.shape]
    channels = shape.pop(1 if len(shape) > 3 else 2)
    return shape, channels
