"""A plan held against the sites of a graph: the rows that are theirs, or what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tofu_fx.errors import PlanError
from tofu_fx.plan.counts import walk
from tofu_fx.plan.plan import Plan
from tofu_fx.plan.records import PlanRow
from tofu_fx.sites.site import Planned
from tofu_fx.wording import shown


def rows_for(plan: Plan, sites: Sequence[Planned], unread: Collection[str] = ()) -> tuple[list[PlanRow], list[str]]:
    """The rows of the graph that has these sites, and what must be said about the fit.

    Where only the numbers of tokens differ (another image size), the plan's counts are taken as shares. Rows for
    ``unread`` (see `tofu_fx.plan.schedule.schedule`) are passed over.

    Raises:
        PlanError: naming the first site that differs between the plan and the graph, or a row that takes more
            tokens than it can.
    """
    if not sites:  # one of several graphs of a model, without attention
        return [], []
    graphs = sorted({row.graph for row in plan.sites}) or [0]
    options = [[row for row in plan.sites if row.graph == graph and row.id not in unread] for graph in graphs]
    names = [site.id for site in sites]
    rows = next((rows for rows in options if [row.id for row in rows] == names), options[0])
    _check_sites(rows, sites)
    if all(row.tokens == site.tokens for row, site in zip(rows, sites, strict=True)):
        _check_counts(rows, sites)
        return rows, []
    row, site = next((r, s) for r, s in zip(rows, sites, strict=True) if r.tokens != s.tokens)
    note = (
        f"the plan was made for {row.tokens} tokens at {site.id!r}, the graph has {site.tokens}: "
        "its counts are taken as shares of the tokens"
    )
    return _as_shares(rows, sites), [note]


def _check_sites(rows: Sequence[PlanRow], sites: Sequence[Planned]) -> None:
    counts = f"the plan has {len(rows)} sites, the graph {len(sites)}"
    for i in range(max(len(rows), len(sites))):
        if i >= len(sites):
            raise PlanError(f"{counts}: {shown(rows[i].id)} is not in it")
        if i >= len(rows):
            raise PlanError(
                f"{counts}: it says nothing of {shown(sites[i].id)}; a plan that was made with unread='drop' has no "
                "row for an attention of which nobody reads most tokens, and is for use with that option"
            )
        for key, attribute in (("id", "id"), ("heads", "heads"), ("dim", "width")):
            got, wanted = getattr(sites[i], attribute), getattr(rows[i], key)
            if got != wanted:
                raise PlanError(
                    f"the plan is of another model: site {i} has {key} {shown(got)} in the graph, "
                    f"{shown(wanted)} in the plan; make the plan again for this model"
                )


def _check_counts(rows: Sequence[PlanRow], sites: Sequence[Planned]) -> None:
    wanted = {site.id: row.r for row, site in zip(rows, sites, strict=True)}
    for site, passage in walk(sites, lambda site, _: wanted[site.id]):
        cap = site.cap(passage.arriving)
        if passage.removed > cap:
            raise PlanError(
                f"the plan takes {passage.removed} tokens at {shown(site.id)}, but of the {passage.arriving} that "
                f"arrive there (of which {site.prefix + site.suffix} are protected) at most {cap} can go at once"
            )


def _as_shares(rows: Sequence[PlanRow], sites: Sequence[Planned]) -> list[PlanRow]:
    """The rows for other numbers of tokens: after each site the same share of the free tokens is left."""
    row_of = {site.id: row for row, site in zip(rows, sites, strict=True)}
    planned = walk(sites, lambda site, _: row_of[site.id].r, tokens=lambda site: row_of[site.id].tokens)
    behind = {site.id: passage.leaving for site, passage in planned}

    def removes(site: Planned, arriving: int) -> int:
        protected = site.prefix + site.suffix
        share = (behind[site.id] - protected) / max(row_of[site.id].tokens - protected, 1)
        keep = protected + round(share * (site.tokens - protected))
        return max(0, min(arriving - keep, site.cap(arriving)))

    return [
        row_of[site.id].model_copy(update={"tokens": site.tokens, "r": passage.removed})
        for site, passage in walk(sites, removes)
    ]
