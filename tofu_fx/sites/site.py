"""What the compiler knows of an attention, in frozen stages: a pass returns the next stage and changes none.

Found ──> Placed ──> Planned        each has all that the one before it had
    └─────────┴──────────┴──> Declined  with the reason, and the stage that the site had reached
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from tofu_fx.fx.nodes import source_line
from tofu_fx.ops import max_reduction


@dataclass(frozen=True)
class Decline:
    """Why a site is left alone, and the node that is the reason."""

    reason: str
    node: Node

    def __str__(self) -> str:
        return f"{self.reason}{source_line(self.node)}"


@dataclass(frozen=True)
class Attention:
    """One attention in the graph.

    ``key`` has its tokens in dim ``key_tokens`` and the contracted features in dim ``key_features``, and ``query`` its
    own in ``query_tokens`` and ``query_features``. ``scores`` (the
    product of queries and keys) and ``softmax`` are None for the fused op. ``softmax_query_dim`` and ``softmax_dim``
    are the dims of queries and keys in the softmax, counted from the end. ``way`` are the nodes from the scores to the
    softmax's input, ``after`` those from the softmax to what the values are multiplied with, each with both ends.
    """

    node: Node
    query: Node
    query_tokens: int
    query_features: int
    key: Node
    key_tokens: int
    key_features: int
    scores: Node | None = None
    softmax: Node | None = None
    softmax_query_dim: int = -2
    softmax_dim: int = -1
    way: tuple[Node, ...] = ()
    after: tuple[Node, ...] = ()
    mask: Node | None = None
    causal: bool = False
    #: whether only some of what it gives is kept, because nobody reads the rest
    narrowed: bool = False
    #: why this is no attention as far as the compiler can tell, and the node that it did not recognise
    unrecognised: Decline | None = None


@dataclass(frozen=True)
class Branch:
    """A branch of a block that runs on fewer tokens while the residual stream keeps every one.

    It is entered at ``enter``, its normalised input, whose dim ``dim`` has the tokens (the atom ``place`` of it, -1:
    all of them); ``inside`` are the nodes from there to its attention, or to its end. It ends wherever it meets whole
    tokens: at its residual add.
    """

    kind: Literal["attention", "mlp", "cross"]
    enter: Node
    inside: frozenset[Node]
    dim: int
    place: int


@dataclass(frozen=True, eq=False)
class Found:
    """An attention over tokens (find_attention). ``width`` is that of all heads together."""

    id: str
    module_path: str
    attention: Attention
    #: how many there are in the untouched graph
    tokens: int
    heads: int
    width: int
    #: whether a mask hides tokens from all others alike: these must not be merged with the ones that are seen
    padding: bool = False
    #: what is to be reported as a warning, beside any decision
    notes: tuple[str, ...] = ()

    @property
    def matched(self) -> bool:
        """Whether tokens can be reduced here."""
        return True

    @property
    def decline(self) -> Decline | None:
        """Why no token can be."""
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class Placed(Found):
    """A site whose tokens can be reduced, and where (choose_placement, detach_entries, follow_streams).

    ``placement`` "stream" reduces the residual stream after the attention's add (``reduce_at``); "branch" reduces the
    input of the attention (``reduce_at``), and of the other ``branches`` of its block with the same match. ``prefix``
    and ``suffix`` count the protected tokens at either end; ``grid`` is (frames, height, width) of the free tokens
    where they are an image's.
    """

    reduce_at: Node
    prefix: int
    suffix: int
    placement: Literal["stream", "branch"] = "stream"
    stream: int = -1
    branches: tuple[Branch, ...] = ()
    #: the kinds of branches that were asked for, whether the block has them or not
    kinds: tuple[str, ...] = ()
    grid: tuple[int, int, int] | None = None
    #: the ``grid`` as far as the graph itself shows it
    image: tuple[int, int, int] | None = None

    @property
    def free(self) -> int:
        """Tokens that are not protected."""
        return self.tokens - self.prefix - self.suffix


@dataclass(frozen=True, eq=False, kw_only=True)
class Planned(Placed):
    """A placed site, and how many tokens go there and how (plan_reductions, decline_unprofitable).

    ``tokens_in`` and ``tokens_out`` are what the rewritten graph has there.
    """

    strategy: str = "prune"
    match: str = "keys"
    r: int = 0
    tokens_in: int
    tokens_out: int
    #: side of the grid's cells, each of which keeps a token, and the seed that picks it (0: the first one)
    cell: int = 2
    seed: int = 0
    #: of "fisher" the matrix ``[C, k]`` by which tokens are projected before they are compared
    projection: torch.Tensor | None = None
    #: the id of the site whose match this one uses; None where it has its own
    shares: str | None = None

    @property
    def cells(self) -> tuple[int, ...]:
        """The ``grid`` argument of ``tofu::fuse_tokens``; empty where every other token is a partner."""
        return (*self.grid, self.cell, self.seed) if self.grid and self.placement == "branch" else ()

    def cap(self, tokens: int) -> int:
        """The most that can go at once when ``tokens`` arrive: half of those that are not protected.

        Of a grid all but one in each cell.
        """
        if self.cells and tokens == self.tokens:
            return max_reduction(tokens, self.prefix, self.suffix, self.cells)
        free = max(tokens - self.prefix - self.suffix, 0)
        # If every candidate must go, the one at the edge of the padding has to cross it.
        return max(free - 1, 0) // 2 if self.padding else free // 2


@dataclass(frozen=True, eq=False)
class Declined:
    """A site that is left alone: what was known of it by then, and why."""

    site: Found
    decline: Decline

    @property
    def matched(self) -> bool:
        """Whether tokens can be reduced here."""
        return False

    @property
    def id(self) -> str:
        """The site's name."""
        return self.site.id

    @property
    def module_path(self) -> str:
        """The module that the attention is of."""
        return self.site.module_path

    @property
    def attention(self) -> Attention:
        """The attention."""
        return self.site.attention

    @property
    def tokens(self) -> int:
        """How many there are in the untouched graph."""
        return self.site.tokens

    @property
    def heads(self) -> int:
        """The attention's heads."""
        return self.site.heads

    @property
    def width(self) -> int:
        """Width of all heads together."""
        return self.site.width

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be reported as a warning."""
        return self.site.notes


#: a site at whatever stage
Site = Found | Placed | Planned | Declined


def placed(sites: Iterable[Site]) -> list[Placed]:
    """The sites that have a place."""
    return [site for site in sites if isinstance(site, Placed)]


def planned(sites: Iterable[Site]) -> list[Planned]:
    """The sites of which the schedule has decided, and that were not given up."""
    return [site for site in sites if isinstance(site, Planned)]


def ever_planned(sites: Iterable[Site]) -> list[Planned]:
    """The sites of which the schedule has decided, those too that were given up afterwards."""
    return planned(site.site if isinstance(site, Declined) else site for site in sites)
