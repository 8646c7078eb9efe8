"""Makes the atoms of ``tofu_fx.axes.atoms``, and remembers how they were made: equal derivations are equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx

from tofu_fx.axes.atoms import Atom, Axes, Barrier, Base, Dim, Kind, dim_size, hint


@dataclass
class Space:
    """Makes atoms, and remembers how they were derived, so that equal derivations give equal atoms.

    ``aligned`` maps names of axes to the name of the one axis that they are: the batch of two inputs, say, which is
    known to be one batch only once the inputs have met.
    """

    aligned: dict[str, str] = field(default_factory=dict)
    #: nodes whose axes are never those of another tensor: what an op that moved samples gave has a batch of its own
    unaligned: set[str] = field(default_factory=set)
    _met: list[tuple[str, str]] = field(default_factory=list)
    _shared: dict[str, Dim] = field(default_factory=dict)
    _derived: dict[Any, Any] = field(default_factory=dict)
    _whole_of: dict[tuple[Atom, Atom], Atom] = field(default_factory=dict)
    _factors: dict[Base, Dim] = field(default_factory=dict)
    _split_from: dict[Base, Base] = field(default_factory=dict)
    _pieces: dict[Base, tuple[tuple[Atom | None, int], ...]] = field(default_factory=dict)

    def fresh(self, name: str, size: Any, kind: Kind = "plain") -> Dim:
        """A new axis of its own (or the one that this name is aligned with); nothing for a dimension of size 1."""
        value = hint(size)
        if value == 1:
            return ()
        name = self.aligned.get(name, name)
        if name in self._shared:
            return self._shared[name]
        dim = (Atom(Base(name, value, kind, symbolic=not isinstance(size, int)), 0, value),)
        if name in self.aligned.values():
            self._shared[name] = dim
        return dim

    def fresh_axes(self, name: str, shape: Sequence[Any], kind: Kind = "plain") -> Axes:
        """New axes for every dimension of a shape."""
        return tuple(self.fresh(f"{name}.{i}", size, kind) for i, size in enumerate(shape))

    def as_features(self, dim: Dim) -> Dim:
        """A dimension as features: what a contraction with a weight makes of it. The same one each time."""
        key = ("features", dim)
        if key not in self._derived:
            self._derived[key] = tuple(Atom(replace(atom.base, kind="feature"), atom.offset, atom.size) for atom in dim)
        features: Dim = self._derived[key]
        return features

    def meet(self, a: Dim, b: Dim) -> None:
        """Note that two dimensions of tensors that both depend on the input stood side by side: they are one axis."""
        if len(a) != 1 or len(b) != 1 or a[0].base is b[0].base or a[0].base.symbolic != b[0].base.symbolic:
            return
        if {atom.base.name.rpartition(".")[0] for atom in a + b} & self.unaligned:
            return
        if all(atom.base.kind == "plain" and (atom.offset, atom.size) == (0, atom.base.size) for atom in a + b):
            self._met.append((a[0].base.name, b[0].base.name))

    def alignment(self) -> dict[str, str]:
        """``aligned`` with all that has met since. Two axes of one tensor are never made one."""
        aligned = nx.utils.UnionFind([*self.aligned, *self.aligned.values()])
        for name, other in self.aligned.items():
            aligned.union(other, name)
        for a, b in self._met:
            together = [name for group in aligned.to_sets() if {a, b} & group for name in group] or [a, b]
            tensors = [name.rpartition(".")[0] for name in {*together, a, b}]
            if all("." in name for name in (a, b)) and len(set(tensors)) == len(tensors):
                aligned.union(a, b)
        return {name: min(group) for group in aligned.to_sets() if len(group) > 1 for name in group}

    def flat(self, dim: Dim) -> Atom | None:
        """A dimension as one atom: the same product always gives the same atom. None for a dimension of size 1."""
        if len(dim) <= 1:
            return dim[0] if dim else None
        if any(atom.is_token for atom in dim):
            raise Barrier("tokens are merged with another axis here")
        if dim not in self._derived:
            kind: Kind = "feature" if any(atom.base.kind == "feature" for atom in dim) else "plain"
            symbolic = any(atom.base.symbolic for atom in dim)
            base = Base("*".join(atom.base.name for atom in dim), dim_size(dim), kind, symbolic=symbolic)
            self._derived[dim] = Atom(base, 0, base.size)
            self._factors[base] = dim
        whole: Atom = self._derived[dim]
        return whole

    def factors(self, atom: Atom) -> tuple[int, ...]:
        """The sizes of the axes that were flattened into the base of an atom: height and width of an image's tokens."""
        return tuple(factor.size for factor in self._factors.get(atom.base, (Atom(atom.base, 0, atom.base.size),)))

    def flattened(self, atom: Atom) -> tuple[Atom, ...]:
        """The axes whose product an atom is, all of it; the atom itself if it is none."""
        whole = (atom.offset, atom.size) == (0, atom.base.size)
        return self._factors.get(atom.base, (atom,)) if whole else (atom,)

    def pieces(self, atom: Atom) -> tuple[tuple[Atom | None, int], ...]:
        """What was concatenated into the base of an atom (atom and size of each part); the atom itself if nothing was.

        Of a part of such a base, the pieces that it is made of, if it is made of whole ones.
        """
        if atom.base not in self._pieces:
            return ((atom, atom.size),)
        place, found = 0, []
        for piece in self._pieces[atom.base]:
            if atom.offset <= place and place + piece[1] <= atom.offset + atom.size:
                found.append(piece)
            place += piece[1]
        return tuple(found) if sum(size for _, size in found) == atom.size else ((atom, atom.size),)

    def split(self, atom: Atom, outer: int) -> tuple[Atom, Atom]:
        """An atom as ``outer x inner``. A token atom cannot be split: that is a barrier."""
        if atom.is_token:
            raise Barrier(f"the token axis ({atom.size}) is split into {outer} x {atom.size // outer}")
        key = (atom, outer)
        if key not in self._derived:
            name, inner = atom.base.name, atom.size // outer
            symbolic = atom.base.symbolic
            pair = tuple(
                Atom(Base(f"{name}{mark}", size, atom.base.kind, symbolic=symbolic), 0, size)
                for mark, size in (("/", outer), ("%", inner))
            )
            self._derived[key] = pair
            self._whole_of[pair] = atom  # type: ignore[index]
            self._split_from.update((part.base, atom.base) for part in pair)
        parts: tuple[Atom, Atom] = self._derived[key]
        return parts

    def join(self, dim: Sequence[Atom]) -> Dim:
        """Undo splits: where an outer and its inner part stand side by side they are the whole again."""
        joined: list[Atom] = []
        for atom in dim:
            joined.append(atom)
            while len(joined) > 1 and (joined[-2], joined[-1]) in self._whole_of:
                joined[-2:] = [self._whole_of[joined[-2], joined[-1]]]
        return tuple(joined)

    def is_part(self, atom: Atom, whole: Atom) -> bool:
        """Whether an atom has positions of ``whole``: is it, is cut from it, or is a factor that it was split into."""
        base = atom.base
        while base is not whole.base and base in self._split_from:
            base = self._split_from[base]
        return base is whole.base

    def has_all(self, axes: Axes, whole: Atom) -> bool:
        """Whether a tensor has each position of ``whole`` once and in order, as one axis or split into several."""
        return self.join([atom for dim in axes for atom in dim if self.is_part(atom, whole)]) == (whole,)

    def regroup(self, axes: Axes, shape: Sequence[Any]) -> Axes:
        """The axes after a view or reshape to ``shape``: factors keep their order, only their grouping changes."""
        sizes = [hint(size) for size in shape]
        if 0 in sizes or any(dim_size(dim) == 0 for dim in axes):
            raise Barrier("an empty tensor cannot be followed through a view")
        rest = [atom for dim in reversed(axes) for atom in reversed(dim) if atom.size != 1]
        result: list[Dim] = []
        for size in sizes:
            dim: list[Atom] = []
            while (left := size // dim_size(tuple(dim))) > 1:
                if not rest:
                    raise Barrier(f"a view to {sizes} does not follow the axes")
                atom = rest.pop()
                if left % atom.size:
                    common = math.gcd(left, atom.size)
                    if common != left:
                        raise Barrier(f"a view to {sizes} cuts across the axes")
                    atom, inner = self.split(atom, left)
                    rest.append(inner)
                dim.append(atom)
            result.append(self.join(dim))
        if rest:
            raise Barrier(f"a view to {sizes} does not follow the axes")
        return tuple(result)

    def cut(self, dim: Dim, start: int, stop: int, step: int = 1) -> Dim:
        """Positions ``start .. stop`` of a dimension. Cutting through the reducible tokens of a stream is a barrier."""
        if (start, stop, step) == (0, dim_size(dim), 1):
            return dim
        if stop - start == 1 and not any(atom.is_token for atom in dim):
            return ()
        atom = self.flat(dim)
        if atom is None:  # nothing of a dim of size 1
            return self.fresh("empty", stop - start)
        part = Atom(atom.base, atom.offset + start, stop - start)
        whole = self.pieces(part)
        if step == 1 and len(whole) == 1 and whole[0][0] is not None:
            part = whole[0][0]  # what was concatenated comes out again
        if not atom.is_token:
            return (part,) if step == 1 else self.fresh(f"{atom.base.name}::{step}", -(-(stop - start) // step))
        if part.prefix >= 0 and part.suffix >= 0 and step == 1:
            return (part,)
        if stop <= atom.prefix or start >= atom.size - atom.suffix:
            return self.fresh("protected", -(-(stop - start) // step))
        raise Barrier(f"positions {start}:{stop}:{step} of the {atom.size} tokens are taken")

    def concatenate(self, parts: Sequence[tuple[Dim, int, bool]], name: str) -> Dim:
        """The dimension of a concatenation, from (dimension, size, depends on the input) of each part.

        Runs of one base that follow each other join. Parts that do not depend on the input (class, register and
        distillation tokens) extend the run of the one that does: they become its prefix and suffix.
        """
        atoms = [self.flat(dim) for dim, _, _ in parts]
        runs = [i for i, atom in enumerate(atoms) if atom is not None and (atom.is_token or parts[i][2])]
        if any(atoms[i].is_token for i in runs):  # type: ignore[union-attr]
            runs = [i for i in runs if atoms[i].is_token]  # type: ignore[union-attr]
        bases = {atoms[i].base for i in runs}  # type: ignore[union-attr]
        key: tuple[Any, ...] = tuple(atom or size for atom, (_, size, _) in zip(atoms, parts, strict=True))
        total = sum(size for _, size, _ in parts)
        if len(bases) == 1:
            ahead = sum(size for _, size, _ in parts[: runs[0]])
            first = atoms[runs[0]]
            assert first is not None
            where = first.offset
            for i in range(runs[0], runs[-1] + 1):
                atom = atoms[i]
                if atom is None or atom.base is not first.base or atom.offset != where:
                    break
                where += atom.size
            else:
                return (Atom(first.base, first.offset - ahead, total),)
        dependent = [i for i, (_, size, depends) in enumerate(parts) if depends and size == 1]
        if not runs and len(dependent) == 1:  # a single token after prefix tokens
            ahead = sum(size for _, size, _ in parts[: dependent[0]])
            key = (*key, "one of", ahead)
            if key not in self._derived:
                self._derived[key] = Atom(Base(name, 1), -ahead, total)
            return (self._derived[key],)
        if any(atoms[i].is_token for i in runs):  # type: ignore[union-attr]
            raise Barrier("tokens are concatenated along their own axis with others")
        if key not in self._derived:
            self._derived[key] = joined = self.fresh(name, total)
            if joined:
                self._pieces[joined[0].base] = tuple(
                    (atom, size) for atom, (_, size, _) in zip(atoms, parts, strict=True)
                )
        known: Dim = self._derived[key]
        return known
