"""What the interpreter is told of a rewritten graph: plain numbers, and names of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tofu_fx.testing.axis import Axis


@dataclass(frozen=True)
class Span:
    """An axis in a dimension: ``size`` positions, each of which has ``inner`` of the dimension's that follow.

    Position ``ahead`` is the stream's first token.
    """

    dim: int
    size: int
    inner: int = 1
    ahead: int = 0


@dataclass(frozen=True)
class Where:
    """Where a tensor has its tokens and its samples."""

    tokens: Span
    samples: tuple[Span, ...]

    def axis(self, shape: Sequence[int], stream: int, tokens: int) -> Axis:
        """The labels of a tensor of this shape, of a stream of so many tokens."""
        token = _positions(self.tokens, shape) - self.tokens.ahead
        sample = torch.zeros_like(token)
        for span in self.samples:
            sample = sample * span.size + _positions(span, shape)
        return Axis(stream, torch.where((token >= 0) & (token < tokens), token, -1), sample)


def _positions(span: Span, shape: Sequence[int]) -> Tensor:
    index = torch.arange(shape[span.dim]) // span.inner % span.size
    return index.view([-1 if dim == span.dim else 1 for dim in range(len(shape))]).expand(shape).contiguous()


@dataclass(frozen=True)
class Vectors:
    """Queries, keys or attention weights: the node, where their tokens are, and the dim of the features (or keys).

    ``fused`` weights have no node of their own: ``node`` is the fused attention.
    """

    node: str
    where: Where
    dim: int
    fused: bool = False


@dataclass(frozen=True)
class Entry:
    """A place where tokens become fewer: after ``node`` for all its later readers, or for ``readers`` only.

    ``owner`` names the choice of the tokens, which is made at the first entry of that name and used by the others.
    ``where`` is of the node's own value; ``grid`` is (frames, height, width, cell, seed) or empty.
    """

    site: str
    node: str
    readers: frozenset[str] | None
    stream: int
    placement: str
    owner: str
    strategy: str
    match: str
    r: int
    tokens: int
    prefix: int
    suffix: int
    grid: tuple[int, ...]
    masked: bool
    where: Where
    query: Vectors
    key: Vectors
    weights: Vectors
    #: of "fisher" what tokens are projected by, ``[C, k]``
    projection: Tensor | None = None


@dataclass(frozen=True)
class Facts:
    """All that the interpreter is told about a rewritten graph.

    ``barriers`` are the nodes that get whole tokens, ``ends`` those of them at which a branch joins the residual
    stream; ``attentions`` the softmaxes and products of attentions; ``inputs`` what the caller passes in.
    """

    entries: tuple[Entry, ...]
    barriers: frozenset[str]
    ends: frozenset[str]
    attentions: frozenset[str]
    inputs: frozenset[str]
    proportional: bool

    @property
    def frame(self) -> Any:
        """What the labels depend on: not the strategies, nor how many tokens go."""
        entries = tuple((e.node, e.readers, e.stream, e.tokens, e.where) for e in self.entries)
        return entries, self.barriers
