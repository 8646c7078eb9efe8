"""What a rule may know of a node's operands: to look at, not to change."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from tofu_fx.axes.atoms import Atom, Axes, Barrier, Dim, dim_size, has_tokens, is_axes, token_atoms
from tofu_fx.axes.space import Space


@dataclass(frozen=True)
class Known:
    """The axes of all that was computed so far, and what the graph says of it.

    ``space`` makes atoms, derives atoms from others and notes which axes have met. Equal derivations are equal, so that
    to ask it twice is to ask it once.
    """

    space: Space
    #: node -> Axes, or a tuple of Axes for an op with several outputs
    axes: Mapping[Node, Any]
    #: what is computed from the inputs of the model
    depends: Set[Node]
    model_state: frozenset[Node]
    #: softmax nodes over keys and products with values that belong to a recognised attention
    attention_nodes: frozenset[Node]
    #: raises Barrier if samples of a batch would meet others of it in these dims
    check_meeting: Callable[[Iterable[Dim]], None]

    def of(self, value: Any) -> Axes:
        """Axes of a tensor-valued node; for a Python number, none."""
        return self.axes[value] if isinstance(value, Node) and value in self.axes else ()

    def outputs(self, node: Node) -> list[Axes]:
        """The axes of each output of a node."""
        return outputs(self.axes.get(node, ()))

    def tokens(self, node: Node) -> list[Atom]:
        """Token atoms of a node, of all its outputs together."""
        return [atom for part in self.outputs(node) for atom in token_atoms(part)]

    def supposing(self, axes: Mapping[Node, Any]) -> Known:
        """The same, but for the axes of some nodes."""
        return replace(self, axes=ChainMap(axes, self.axes))  # type: ignore[arg-type]  # it is only read

    def merge(self, dims: Iterable[tuple[Dim, bool]]) -> Dim:
        """The dimension that results from broadcasting dims (each with: depends on the input)."""
        present = [(dim, depends) for dim, depends in dims if dim_size(dim) != 1]
        tokens = [dim for dim, _ in present if has_tokens(dim)]
        if tokens:
            if any(dim != tokens[0] for dim in tokens):
                raise Barrier("tokens of different streams or of shifted positions meet")
            if len(tokens[0]) > 1 and len(tokens) != len(present):
                raise Barrier("tokens that are merged with another axis meet a tensor that is not")
            return tokens[0]
        moving = [dim for dim, depends in present if depends]
        for other in moving[1:]:
            self.space.meet(moving[0], other)
        self.check_meeting(moving)
        return moving[0] if moving else present[0][0] if present else ()

    def broadcast(self, operands: Iterable[Any], rank: int) -> Axes:
        """Axes of an elementwise op over operands (nodes; others are ignored), aligned from the right."""
        columns: list[list[tuple[Dim, bool]]] = [[] for _ in range(rank)]
        for value in operands:
            axes = self.of(value)
            for i, dim in enumerate(axes):
                columns[rank - len(axes) + i].append((dim, value in self.depends))
        return tuple(self.merge(column) for column in columns)


def outputs(axes: Any) -> list[Axes]:
    """The axes of each output, of one or of several."""
    return [axes] if is_axes(axes) else list(axes)
