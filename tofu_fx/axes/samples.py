"""The samples of a batch, once a stream is reduced: each has tokens of its own left, so that none may meet another.

From the start of a stream the axes of its samples belong to its assignment, which has a row for each. They may only be
carried. Where an op does more with them the tokens must be whole, and so must be those that meet, token by token, what
it made: tokens that were merged because they are alike in one sample are not alike in what the others add to them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from tofu_fx.axes.atoms import Atom, Axes, Barrier, Dim, dim_size, token_atoms
from tofu_fx.axes.space import Space


class SamplesMixed(Barrier):
    """The barrier of an op that mixes, moves or leaves out samples, of which each has tokens of its own left."""


@dataclass
class Samples:
    """The axes of the samples of each stream, by the stream's number, and what was made across samples."""

    space: Space
    axes: dict[int, tuple[Atom, ...]] = field(default_factory=dict)
    #: the dimension that a stream's tokens were before it started, and how many protected ones it has in front
    tokens: dict[int, tuple[Dim, int]] = field(default_factory=dict)
    #: what was computed from a stream's tokens once they were whole again: the numbers of those streams
    whole: dict[Node, frozenset[int]] = field(default_factory=dict)
    #: what follows from an op that mixed samples, up to the start of a new stream
    across: set[Node] = field(default_factory=set)

    def has(self, dim: Dim) -> bool:
        """Whether a dimension has an axis of samples, or a part of one."""
        wholes = [whole for several in self.axes.values() for whole in several]
        return any(self.space.is_part(atom, whole) for atom in dim for whole in wholes)

    def check(self, part: Axes, mixed: Collection[Atom] = ()) -> None:
        """Hold an output to the invariant; ``mixed`` are the atoms along which the op computes a position from several.

        Raises:
            SamplesMixed: a tensor of tokens has not each sample once and in order, or an op ran along them.
        """
        if not all(self._has_each(part, mixed, atom.base.stream) for atom in token_atoms(part)):
            raise SamplesMixed("it mixes the samples of a batch, of which each has tokens of its own left")

    def _has_each(self, part: Axes, mixed: Collection[Atom], stream: int) -> bool:
        return all(
            self.space.has_all(part, whole) and not any(self.space.is_part(atom, whole) for atom in mixed)
            for whole in self.axes.get(stream, ())
        )

    def follow(self, node: Node, inputs: Sequence[Node], parts: Sequence[Axes], mixed: Collection[Atom] | None) -> None:
        """Note what an output without tokens has of whole ones, and whether it, or what it comes from, mixed samples.

        ``mixed`` is None where no rule says what the op does.
        """
        streams = self.whole.get(node, frozenset()).union(*(self.whole.get(value, ()) for value in inputs))
        if streams:
            self.whole[node] = streams
        apart = not streams or (
            mixed is not None and all(self._has_each(part, mixed, stream) for part in parts for stream in streams)
        )
        if not apart or any(value in self.across for value in inputs):
            self.across.add(node)

    def as_whole(self, axes: Axes) -> Axes | None:
        """The axes of a tensor of tokens once these are whole again: as before the stream. None where they are lost."""
        result = []
        for dim in axes:
            atoms: list[Atom] = []
            for atom in dim:
                before, prefix = self.tokens.get(atom.base.stream, ((), 0)) if atom.is_token else ((atom,), 0)
                if not atom.is_token or (dim_size(before), prefix) == (atom.size, atom.prefix):
                    atoms += before
                elif len(before) == 1:
                    atoms.append(Atom(before[0].base, before[0].offset + atom.offset + prefix, atom.size))
                else:
                    return None
            result.append(tuple(atoms))
        return tuple(result)

    def check_meeting(self, dims: Iterable[Dim]) -> None:
        """Hold dims that are broadcast together to the invariant: those of samples are the same one.

        Raises:
            SamplesMixed: samples would meet others.
        """
        # Other axes in the same dim may differ (the heads of keys and of values), not where the samples stand in it.
        held = {tuple((a, dim_size(dim[i + 1 :])) for i, a in enumerate(dim) if self.has((a,))) for dim in dims}
        if len(held - {()}) > 1:
            raise SamplesMixed("samples of a batch meet others of it, of which each has tokens of its own left")

    def check_inputs(self, inputs: Iterable[tuple[Node, list[Axes]]]) -> None:
        """Hold the operands of an op (each with the axes of its outputs) to the invariant.

        Raises:
            SamplesMixed: tokens meet what was made across samples and has a place for each token.
        """
        operands = list(inputs)
        counts = {atom.size for _, parts in operands for part in parts for atom in token_atoms(part)}
        for node, parts in operands:
            if node in self.across and any(dim_size(dim) in counts for part in parts for dim in part):
                raise SamplesMixed("tokens meet what was made, token by token, of several samples of the batch")
