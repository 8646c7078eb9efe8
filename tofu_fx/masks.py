"""What an attention's mask hides, judged by its values.

Merging moves what a token sees: behind a causal mask a token would see what later ones were merged into an earlier one.
Nobody can tell from the ops of a mask what it hides, so the part of the graph that makes it is run: once on the inputs
that the graph was traced with, and once with every input that holds a number for each token (padding, positions,
document numbers) replaced by random zeros and ones, for the calls that are to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from tofu_fx.graphs import is_op
from tofu_fx.planning.site import Attention, Mask
from tofu_fx.tokens import hint

#: ordered: nothing is hidden; tokens are hidden from all alike (padding); some from some; later ones from earlier ones
Hides = Literal["nothing", "keys", "pairs", "later", "unseen"]
_ORDER: tuple[Hides, ...] = ("nothing", "keys", "pairs", "later", "unseen")

HIDDEN = -100.0  # an additive mask hides from here on: models use -100 (Swin) to -inf; learnt biases stay far above
_NEAR = 400  # nodes of a mask's making that are followed
_WORK = ("linear", "matmul", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "conv2d", "conv1d")
_SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")


class _Unknown(Exception):
    """The mask's values cannot be computed here."""


@dataclass
class Masks:
    """Judges the masks of one graph; each is judged once, however many layers share it."""

    gm: GraphModule
    model_state: frozenset[Node]
    depends: set[Node]
    example_inputs: Sequence[Any] | None
    _judged: dict[Any, Hides] = field(default_factory=dict)

    def judge(self, attention: Attention, mask: Mask, tokens: int) -> Hides:
        """What a mask hides from attention over so many tokens."""
        key = (mask.value, mask.kind, *_dims(attention, mask))
        if key not in self._judged:
            self._judged[key] = self._judge(attention, mask, tokens)
        return self._judged[key]

    def _judge(self, attention: Attention, mask: Mask, tokens: int) -> Hides:
        if mask.value.meta["val"].numel() == 1:
            return "nothing"
        making = self._making(mask.value)
        if len(making) > _NEAR:
            return "unseen"
        inputs = [node for node in making if node.op == "placeholder" and node not in self.model_state]
        tensors = [node for node in inputs if isinstance(node.meta.get("val"), Tensor)]
        if any(sum(hint(size) == tokens for size in node.meta["val"].shape) > 1 for node in tensors):
            return "unseen"
        try:
            found = [_hides(self._value(mask.value, making, {}), attention, mask, tokens)]
        except _Unknown:
            learnt = any(isinstance(node.meta.get("example_value"), torch.nn.Parameter) for node in making)
            return "nothing" if learnt else "unseen"
        generator = torch.Generator().manual_seed(0)
        try:
            changed = {node: _zeros_and_ones(self._example(node), generator) for node in tensors}
            found.append(_hides(self._value(mask.value, making, changed), attention, mask, tokens))
        except (_Unknown, RuntimeError, IndexError, ValueError):
            pass  # these inputs cannot be replaced freely; what was traced counts
        return max(found, key=_ORDER.index)

    def _making(self, mask: Node) -> list[Node]:
        """The nodes that a mask's values are computed from, in graph order; behind a size there is nothing.

        Nor is there behind a product of features: what the model computes is a bias, around which a mask may be added.
        """
        seen, todo = {mask}, [mask]
        while todo and len(seen) <= _NEAR:
            node = todo.pop()
            if not is_op(node, "sym_size", *_SHAPE_ONLY) and not self._is_bias(node):
                new = [value for value in node.all_input_nodes if value not in seen]
                seen.update(new)
                todo += new
        return [node for node in mask.graph.nodes if node in seen]

    def _is_bias(self, node: Node) -> bool:
        return is_op(node, *_WORK) and node in self.depends

    def _example(self, node: Node) -> Any:
        if self.example_inputs is None:
            raise _Unknown
        places = {n: i for i, n in enumerate(self.gm.graph.find_nodes(op="placeholder"))}
        value = self.example_inputs[places[node]]
        if isinstance(value, torch._subclasses.FakeTensor):
            raise _Unknown
        return hint(value) if isinstance(value, torch.SymInt) else value

    @torch.no_grad()
    def _value(self, mask: Node, making: list[Node], changed: dict[Node, Tensor]) -> Tensor:
        values: dict[Node, Any] = dict(changed)
        for node in making:
            if node in values:
                continue
            if node.op == "placeholder":
                values[node] = self._example(node)
            elif node.op == "get_attr":
                values[node] = _attribute(self.gm, str(node.target))
            elif is_op(node, "sym_size"):
                values[node] = hint(node.meta["val"])
            elif self._is_bias(node):
                values[node] = _blank(node).zero_()
            elif not _is_safe(node):
                raise _Unknown
            else:
                blank = is_op(node, *_SHAPE_ONLY)
                args, kwargs = map_arg((node.args, node.kwargs), _blank if blank else values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        value: Tensor = values[mask]
        if isinstance(value, torch._subclasses.FakeTensor):
            raise _Unknown
        return value


def _is_safe(node: Node) -> bool:
    """Whether an op may be run while compiling: it changes no input and draws no random numbers."""
    schema = getattr(node.target, "_schema", None)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not random and not getattr(schema, "is_mutable", False)


def _attribute(gm: GraphModule, name: str) -> Any:
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _blank(node: Node) -> Any:
    """A tensor of the right shape, for an op that looks at nothing else."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return hint(value)
    return torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device=value.device)


def _zeros_and_ones(value: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, value.shape, generator=generator).to(value)


def _dims(attention: Attention, mask: Mask) -> tuple[int, int]:
    """The dims of queries and keys in the scores, counted from the end."""
    key = attention.softmax_dim if attention.softmax is not None else -1
    return attention.softmax_query_dim if attention.softmax is not None else -2, key


def allowed(mask: Tensor, kind: str) -> Tensor:
    """Where a mask lets a query see a key."""
    if kind == "bias":
        return mask > HIDDEN
    return mask != 0 if kind == "keep" else mask == 0


def _hides(value: Tensor, attention: Attention, mask: Mask, tokens: int) -> Hides:
    query, key = _dims(attention, mask)
    sees = allowed(value, mask.kind)
    sees = sees.reshape((1,) * (max(-query, -key) - sees.dim()) + tuple(sees.shape)).movedim((query, key), (-2, -1))
    sees = sees.expand(*sees.shape[:-2], tokens, tokens)
    if bool(sees.all()):
        return "nothing"
    # A key that nobody sees is padding; what padding sees does not matter.
    there = sees.any(-2)
    hidden = ~sees & there.unsqueeze(-1) & there.unsqueeze(-2)
    if not bool(hidden.any()):
        return "keys"
    return "later" if bool((hidden & sees.transpose(-2, -1)).any()) else "pairs"
