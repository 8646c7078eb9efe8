"""How many tokens arrive at each site and are left after it: the one place where tokens are counted.

The sites of one stream follow each other: what one of them leaves arrives at the next. In branches the residual stream
keeps every token, so each site starts from all of its own, whether it has a match of its own or shares another's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar


class Counted(Protocol):
    """What is counted at: a site of a graph, or the row of a plan that stands for one."""

    @property
    def tokens(self) -> int:
        """Tokens there in the untouched graph."""

    @property
    def placement(self) -> Literal["stream", "branch"]:
        """Where tokens are reduced."""


@dataclass(frozen=True)
class Passage:
    """Token counts at one site: how many arrive, how many go there, and how many stay."""

    arriving: int
    removed: int

    @property
    def leaving(self) -> int:
        """Tokens that stay."""
        return self.arriving - self.removed


S = TypeVar("S", bound=Counted)


def stream_of(site: Counted, place: int) -> Hashable:
    """What a site's stream is known by: its graph and the stream's number there; in branches each site is alone.

    Args:
        site: a Site, or a PlanRow. A row that was written by hand names no stream: then the rows of one graph that
            start with equally many tokens are taken for one.
        place: where the site stands among those that are counted.
    """
    if site.placement == "branch":
        return "branch", place
    stream = getattr(site, "stream", None)
    return getattr(site, "graph", 0), ("tokens", site.tokens) if stream is None else stream


def streams(sites: Sequence[S], stream: Callable[[S, int], Hashable] = stream_of) -> list[list[S]]:
    """The sites of each stream, in order; each site in a branch is one of its own."""
    found: dict[Hashable, list[S]] = {}
    for place, site in enumerate(sites):
        found.setdefault(stream(site, place), []).append(site)
    return list(found.values())


def walk(
    sites: Sequence[S],
    removes: Callable[[S, int], int],
    *,
    stream: Callable[[S, int], Hashable] = stream_of,
    tokens: Callable[[S], int] = lambda site: site.tokens,
) -> Iterator[tuple[S, Passage]]:
    """Go through sites in the order of the graph, and count.

    Args:
        sites: sites, or rows of a plan.
        removes: how many tokens go at a site, from the site and the number that arrives there.
        stream: see :func:`stream_of`; for sites of several graphs, whose streams have equal numbers.
        tokens: how many there are where a stream starts, if not ``site.tokens``.
    """
    left: dict[Hashable, int] = {}
    for place, site in enumerate(sites):
        key = stream(site, place)
        arriving = left.get(key, tokens(site))
        passage = Passage(arriving, removes(site, arriving))
        left[key] = passage.leaving
        yield site, passage
