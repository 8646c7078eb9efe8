"""The token-axis algebra: every dimension of every tensor is a product of atoms.

An atom is a run of positions of a *base* axis: ``Atom(base, offset, size)`` covers the positions ``offset`` to
``offset + size`` of ``base``. Runs make prefix tokens fall out of the algebra instead of being searched for: the
patches of a ViT are ``Atom(patches, 0, 196)``, and ``cat([class_token, patches])`` is ``Atom(patches, -1, 197)``, so
that the tokens ahead of position 0 are the prefix, and slicing the prefix off gives the patches back.

A *token base* is the base of a stream whose length the compiler may change. Its position 0 is the first token that
may be reduced. Positions before it (the prefix) and after its ``size`` (the suffix) are protected. An atom of a token
base that covers all the reducible positions is *carried*; one that would cut through them is a barrier.

Sizes here are hints (plain ints) to look at: a symbolic size is never specialised by this module. Code that needs the
symbol takes it from the graph (``aten.sym_size``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["plain", "feature", "token"]


class Barrier(Exception):
    """Raised by a rule when token atoms cannot pass an op; the message is the reason that the user reads."""


@dataclass(frozen=True, eq=False)
class Base:
    """A source axis. Two bases are the same axis only if they are the same object.

    ``kind`` is ``"feature"`` for axes made by a contraction with a weight (so that channel attention, whose "tokens"
    are features, is distinguished), ``"token"`` for the axis of a stream, else ``"plain"``. ``symbolic`` says that the
    graph keeps the size as a symbol (a dynamic batch), so that it must not be written as a number.
    """

    name: str
    size: int
    kind: Kind = "plain"
    stream: int = -1
    symbolic: bool = False


@dataclass(frozen=True)
class Atom:
    """Positions ``offset .. offset + size`` of ``base``; offset may be negative where rows were added in front."""

    base: Base
    offset: int
    size: int

    @property
    def is_token(self) -> bool:
        """Whether the atom belongs to a stream whose length may change."""
        return self.base.kind == "token"

    @property
    def prefix(self) -> int:
        """Protected tokens ahead of the reducible ones."""
        return -self.offset

    @property
    def suffix(self) -> int:
        """Protected tokens after the reducible ones."""
        return self.offset + self.size - self.base.size

    def __repr__(self) -> str:
        shift = f"{self.offset:+d}" if self.offset else ""
        return f"{self.base.name}{shift}:{self.size}"


Dim = tuple[Atom, ...]
Axes = tuple[Dim, ...]


def hint(size: Any) -> int:
    """The value of an int or SymInt for looking at, without guarding on it. Unbacked symbols raise Barrier."""
    if isinstance(size, int):
        return size
    if isinstance(size, torch.SymInt):
        value = size.node.hint if size.node.has_hint() else None
        if value is not None:
            return int(value)
    raise Barrier(f"the size {size} is only known at run time")


def dim_size(dim: Dim) -> int:
    """Number of positions of a dimension (1 for the empty product)."""
    return math.prod(atom.size for atom in dim)


def atoms_of(*dims: Dim) -> Dim:
    """The atoms of several dimensions, in order."""
    return tuple(atom for dim in dims for atom in dim)


def is_axes(axes: Any) -> bool:
    """Whether this is the Axes of one tensor rather than a tuple of them (a dim holds atoms, an Axes holds dims)."""
    return all(isinstance(atom, Atom) for dim in axes or () for atom in dim)


def has_tokens(*dims: Dim) -> bool:
    """Whether any of these dimensions holds tokens."""
    return any(atom.is_token for dim in dims for atom in dim)


def token_atoms(axes: Axes) -> list[Atom]:
    """The token atoms of a tensor, in order, repeated where a tensor carries the tokens twice."""
    return [atom for dim in axes for atom in dim if atom.is_token]


def token_dim(axes: Axes) -> int:
    """The one dimension that carries tokens. Raises Barrier where there are none or several."""
    dims = [i for i, dim in enumerate(axes) if any(atom.is_token for atom in dim)]
    if len(dims) != 1 or len(token_atoms(axes)) != 1:
        raise Barrier(f"tokens stand in {len(token_atoms(axes))} places of one tensor")
    return dims[0]
