"""What is known of the image whose places the tokens are, held against what the user or a plan says of it."""

from __future__ import annotations

from collections.abc import Sequence

from tofu_fx.errors import OptionError, PlanError
from tofu_fx.plan.options import OF_BRANCHES, Options
from tofu_fx.sites.site import Placed
from tofu_fx.wording import shown

_FEW_SITES = 2  # in so few branches, that no image is known is not worth a warning

#: site id -> what is to be reported as a warning
Notes = dict[str, list[str]]


def check_grids(sites: Sequence[Placed], options: Options) -> Notes:
    """Refuse a grid that contradicts the graph, and say once where it could not be checked, or where none is known.

    Args:
        sites: those of one graph at which tokens can go.
        options: with the user's ``grid``, or a plan whose rows have grids.

    Raises:
        OptionError: the option contradicts the graph, or the plan. PlanError: a row contradicts the graph.
    """
    notes: Notes = {}
    unchecked = _check_option(sites, options)
    _check_rows(sites, options)
    if unchecked:
        notes.setdefault(unchecked[0], []).append(unchecked[1])
    without = [site for site in sites if site.placement == "branch" and site.grid is None]
    if len(without) > _FEW_SITES:
        notes.setdefault(without[0].id, []).append(
            f"no image is found whose places the tokens of {len(without)} sites are, so every other token may stay "
            "(ratios up to 0.5); if they are an image's, say so with options={'grid': (height, width)}"
        )
    for name, note in idle_options(sites, options):
        notes.setdefault(name, []).append(note)
    return notes


def _check_option(sites: Sequence[Placed], options: Options) -> tuple[str, str] | None:
    if options.grid is None or not sites:
        return None
    height, width = options.grid
    said = f"option 'grid': {height} x {width} is {height * width} tokens"
    images = list(dict.fromkeys(_words(site) for site in sites if site.image))
    fits = any(site.free == height * width or _agrees(site, options.grid) for site in sites)
    # On a stream text and image may be one run of tokens: their number alone contradicts nothing there.
    if not fits and (images or any(site.placement == "branch" for site in sites)):
        counts = ", ".join(map(str, sorted({site.free for site in sites})))
        found = f" (the graph shows images of {', '.join(images[:3])})" if images else ""
        raise OptionError(f"{said}, the sites have {counts}{found}: give height and width of the image in tokens")
    told = [site for site in sites if site.free == height * width and site.placement == "branch"]
    # Equally many tokens are taken for the same image: one site that shows it is evidence for all.
    known = [site for site in sites if site.free == height * width and site.image]
    wrong = next((site for site in known if not _agrees(site, options.grid)), None)
    if wrong is not None:
        raise OptionError(
            f"{said}, but the graph shows that the {wrong.free} tokens at {shown(wrong.id)} are an image of "
            f"{_words(wrong)}; leave the option out"
        )
    if told and not known:
        note = (
            f"option 'grid': {height} x {width} could not be checked, because the graph shows no image: only their "
            f"number, {told[0].free}, is known of the tokens of {len(told)} sites"
        )
        return told[0].id, note
    return None


def _check_rows(sites: Sequence[Placed], options: Options) -> None:
    rows = {} if options.plan is None else {row.id: row for row in options.plan.sites if row.grid}
    for site in sites:
        row = rows.get(site.id)
        if row is None or row.grid is None or row.placement == "stream":
            continue
        height, width = row.grid
        said = f"the plan's row {shown(row.id)} has 'grid' {height} x {width}"
        if options.grid is not None and options.grid != (height, width):
            raise OptionError(f"{said}, option 'grid' is {options.grid[0]} x {options.grid[1]}: leave the option out")
        if row.tokens != site.tokens:
            continue  # made for another size of image
        if site.image and not _agrees(site, (height, width)):
            raise PlanError(f"{said}, but the graph shows an image of {_words(site)} there; make the plan again")
        if height * width != site.free and not site.image:
            raise PlanError(f"{said}, which is {height * width} tokens, but {site.free} can go there; correct the row")


def idle_options(sites: Sequence[Placed], options: Options) -> list[tuple[str, str]]:
    """Say which of the options given decide nothing at any of a graph's sites: those of branches, where there are none.

    That a placement is chosen automatically, or by a plan, is known only here. It is no error, because another graph
    of the same model may use them.
    """
    given = [key for key in OF_BRANCHES if key in options.chosen]
    branches = [site for site in sites if site.placement == "branch"]
    if not given or not sites:
        return []
    if not branches:
        idle, why = given, "no site is reduced in the branches of its block here; take placement 'branch' for that"
    elif not any(site.grid for site in branches):
        idle = [key for key in given if key in ("cell", "seed", "max_downsample")]
        why = "no image is known whose places the tokens are"
    else:
        return []
    if idle:
        several = "options" if len(idle) > 1 else "option"
        decide = "decide" if len(idle) > 1 else "decides"
        return [(sites[0].id, f"{several} {', '.join(map(repr, idle))} {decide} nothing: {why}")]
    return []


def _agrees(site: Placed, grid: tuple[int, int]) -> bool:
    return site.image is not None and site.image[1:] == grid


def _words(site: Placed) -> str:
    """The image of a site, as "6 x 6" or "4 frames of 3 x 3"."""
    assert site.image is not None
    frames, height, width = site.image
    return (f"{frames} frames of " if frames > 1 else "") + f"{height} x {width}"
