"""What the compiler knows of an attention: how it was recognised, and whether and how tokens are reduced after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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


@dataclass
class Site:
    """An attention at which tokens may be reduced. Either ``decline`` is set, or ``reduce_at`` and what follows are.

    ``placement`` "stream" reduces the residual stream behind the attention's add (``reduce_at``); "branch" reduces the
    input of the attention (``reduce_at``), and of the other ``branches`` of its block with the same match. ``tokens``,
    ``lead`` and ``tail`` are counts in the untouched graph, ``dim`` the width of all heads together; ``grid`` is
    (frames, height, width) of the free tokens where they are an image's; ``r``, ``strategy`` and ``match`` are decided
    by the plan; ``tokens_in`` and ``tokens_out`` are what the rewritten graph has there.
    """

    id: str
    module_path: str
    attention: Attention
    tokens: int
    heads: int
    dim: int
    decline: Decline | None = None
    reduce_at: Node | None = None
    lead: int = 0
    tail: int = 0
    stream: int = -1
    placement: Literal["stream", "branch"] = "stream"
    branches: tuple[Branch, ...] = ()
    #: the kinds of branches that were asked for, whether the block has them or not
    kinds: tuple[str, ...] = ()
    grid: tuple[int, int, int] | None = None
    #: the ``grid`` as far as the graph itself shows it
    image: tuple[int, int, int] | None = None
    #: side of the grid's cells, each of which keeps a token, and the seed that picks it (0: the first one)
    cell: int = 2
    seed: int = 0
    #: the site whose match this one uses; None where it has its own
    shares: Site | None = None
    strategy: str = "prune"
    match: str = "keys"
    r: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    #: whether a mask hides tokens from all others alike: these must not be merged with the ones that are seen
    padding: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def matched(self) -> bool:
        """Whether tokens can be reduced here."""
        return self.decline is None

    @property
    def cells(self) -> tuple[int, ...]:
        """The ``grid`` argument of ``tofu::fuse_tokens``; empty where every other token is a partner."""
        return (*self.grid, self.cell, self.seed) if self.grid and self.placement == "branch" else ()

    def cap(self, tokens: int) -> int:
        """The most that can go at once when ``tokens`` arrive: half of those that are not protected.

        Of a grid all but one in each cell.
        """
        if self.cells and tokens == self.tokens:
            return max_reduction(tokens, self.lead, self.tail, self.cells)
        free = max(tokens - self.lead - self.tail, 0)
        # If every candidate must go, the one at the edge of the padding has to cross it.
        return max(free - 1, 0) // 2 if self.padding else free // 2

    @property
    def free(self) -> int:
        """Tokens that are not protected."""
        return self.tokens - self.lead - self.tail

    @property
    def planned(self) -> bool:
        """Whether the schedule decided about it; the rewriter may still have given it up afterwards."""
        return self.tokens_in > 0


@dataclass(frozen=True)
class Rehearsed:
    """One site in a graph that is rewritten for calibration.

    ``fuse`` is its operator, ``metrics`` the nodes that it could compare tokens by. ``branch`` is what the block's next
    branch adds to the stream, as ``[B, N, C]``, a function of the operator's first output ``[B, N, C]``; None where
    there is none.
    """

    site: Site
    fuse: Node
    metrics: Mapping[str, Node]
    branch: Node | None = None

    @property
    def merged(self) -> Node:
        """The operator's first output: the reduced stream."""
        return self.part(0)

    def part(self, place: int) -> Node:
        """One of the operator's outputs."""
        return next(user for user in self.fuse.users if user.args[1] == place)
