"""What an attention's masks hide, judged by their values.

Merging moves what a token sees: under a causal mask a token would see what later ones were merged into an earlier one.
Nobody can tell from the ops of a mask what it hides. So what the model does to the scores on their way to the softmax
and to the weights after it is done to blank ones: first with the inputs that the graph was traced with, then with
others (zeros, ones, random flags, running numbers) for the calls that are to come.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tofu_fx.axes.atoms import Barrier, hint
from tofu_fx.fx.nodes import argument, is_alias, is_mutable, is_op, is_parameter, tensor_inputs
from tofu_fx.fx.op_families import REGROUPINGS, SHAPE_ONLY, TURNS, WORK
from tofu_fx.sites.guards import Guard
from tofu_fx.sites.mask_values import (
    ORDER,
    REPLACEMENTS,
    Held,
    Hides,
    Unknown,
    along,
    attribute,
    blank_of,
    hides_in,
    is_alike,
    is_tensor,
    run,
    visible,
)
from tofu_fx.sites.site import Attention

#: nodes of a mask's making that are followed
MOST_OF_A_MASK = 400
_WORK = WORK | {"conv2d", "conv1d"}
_MOVES = REGROUPINGS | TURNS | {"linear"}


def sides(attention: Attention) -> list[Node]:
    """What joins the scores or the weights of an attention from aside."""
    if attention.mask is not None:
        return [attention.mask]
    found = list(tensor_inputs(attention.way[0])[:1]) if _adds(attention.way) else []
    return list(dict.fromkeys([*found, *_joined(attention.way), *_joined(attention.after)]))


def is_masked_by_itself(attention: Attention) -> bool:
    """Whether the scores of an attention decide what is hidden (those below 0, say): then any query may see no key."""
    if attention.scores is None:
        return False
    aside, todo, seen = set(sides(attention)), [attention.scores], {attention.scores}
    while todo:
        for user in todo.pop().users:
            if user in aside:
                return True
            if user is not attention.softmax and user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def _joined(way: Sequence[Node]) -> list[Node]:
    return [value for node in way[1:] for value in tensor_inputs(node) if value not in way]


def _adds(way: Sequence[Node]) -> bool:
    return bool(way) and is_op(way[0], "baddbmm")


@dataclass
class Masks:
    """Judges the masks of one graph; each is judged once, however many layers share it."""

    gm: GraphModule
    model_state: frozenset[Node]
    depends: set[Node]
    example_inputs: Sequence[Any] | None
    _judged: dict[Any, Hides] = field(default_factory=dict)
    _guards: dict[Any, Guard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._place = {node: i for i, node in enumerate(self.gm.graph.nodes)}
        self._inputs = {node: i for i, node in enumerate(self.gm.graph.find_nodes(op="placeholder"))}
        mutable = [node for node in self._place if is_mutable(node)]
        self._writes = [(node, set(_aliases(node))) for node in mutable]

    def judge(self, attention: Attention, tokens: int, ahead: int = 0) -> Hides:
        """What the masks of an attention over so many tokens hide; ``ahead`` of them the keys have null tokens."""
        ways_on = {*attention.way, *attention.after}
        if any(written & ways_on and node not in ways_on for node, written in self._writes):
            return "unseen"  # something is written into the scores or the weights themselves
        joining = [value for value in sides(attention) if value.meta["val"].numel() != 1]
        if not joining:
            return "nothing"
        ways = tuple((node.target, str(node.args[1:])) for node in (*attention.way[1:], *attention.after[1:]))
        key = (tuple(sides(attention)), ways, tokens, ahead, _keys(attention))
        if key not in self._judged:
            self._judged[key] = self._judge(attention, tokens, ahead)
        return self._judged[key]

    def _judge(self, attention: Attention, tokens: int, ahead: int) -> Hides:
        making = self._making(attention)
        inputs = [n for n in making if n in self._inputs and n not in self.model_state and is_tensor(n)]
        if len(making) > MOST_OF_A_MASK:
            return "far"
        try:
            found = [hides_in(self._sees(attention, tokens, making, {}), ahead)]
            examples = {node: self._example(node) for node in inputs}
        except Unknown:
            return "unseen"
        for replace in REPLACEMENTS if inputs else ():
            generator = torch.Generator().manual_seed(0)
            others = {node: replace(example, generator).to(example) for node, example in examples.items()}
            try:
                hides = hides_in(self._sees(attention, tokens, making, others), ahead)
            except Unknown:
                continue  # not a value that this input can take
            found.append("unseen" if hides == "later" else hides)
        return max(found, key=ORDER.index)

    def guard(self, attention: Attention, tokens: int, ahead: int = 0) -> Guard | None:
        """A condition on each call under which a mask given as an input, ``[.., N, N]``, hides keys from all alike.

        None where it does not hold in the first call, or where this could not be checked from the arguments of a call:
        only a mask that comes whole, and joins scores that keep their dims, is seen to have equal rows.
        """
        making, dim = self._making(attention), attention.softmax_query_dim
        joining = [value for value in sides(attention) if value.meta["val"].numel() != 1]
        inputs = [node for node in making if node in self._inputs]
        whole = all(_is_pairs(node, tokens, _keys(attention)) for node in inputs)
        moved = any(is_op(node, *_MOVES) for node in (*attention.way[1:], *attention.after[1:]))
        sized = any(not is_tensor(value) for node in making for value in node.all_input_nodes)
        if not inputs or not whole or moved or sized or any(self._is_bias(node) for node in making):
            return None
        key = ("guard", tuple(joining), dim, ahead)
        if key not in self._guards:

            def holds(args: Sequence[Any]) -> bool:
                try:
                    values = self._values(making, {node: args[self._inputs[node]] for node in inputs})
                except (Unknown, RuntimeError):
                    return False
                return all(is_alike(values[value], dim) for value in joining)

            names = ", ".join(str(node.target) for node in inputs)
            self._guards[key] = Guard(f"the mask {names} hides the same keys from all queries", holds)
        guard = self._guards[key]
        return guard if self.example_inputs is not None and guard.holds(self.example_inputs) else None

    def state_guard(self, attention: Attention, tokens: int, ahead: int = 0) -> Guard | None:
        """A condition on each call: that what the model itself holds (a buffer, a parameter) still hides no more.

        A mask in a buffer may be filled by ``load_state_dict`` or in place after the graph was compiled. It is judged
        again only when a tensor is another one or its version counter has moved. None where nothing of the model's is
        in the masks.
        """
        joining = [value for value in sides(attention) if value.meta["val"].numel() != 1]
        making = self._making(attention) if joining else []
        held = [n for n in making if n.op == "get_attr" or (n in self.model_state and n in self._inputs)]
        if not held:
            return None
        key = ("state", tuple(sides(attention)), tokens, ahead, attention.node)
        if key not in self._guards:
            hides = self.judge(attention, tokens, ahead)
            noted = [Held.of(self._held(node, self.example_inputs)) for node in held]

            def holds(args: Sequence[Any]) -> bool:
                now = [self._held(node, args) for node in held]
                if all(before.is_still(tensor) for before, tensor in zip(noted, now, strict=True)):
                    return True
                again = copy.copy(self)
                again.example_inputs, again._judged = args, {}  # noqa: SLF001 - a copy of itself
                if ORDER.index(again.judge(attention, tokens, ahead)) > ORDER.index(hides):
                    return False
                noted[:] = map(Held.of, now)
                return True

            names = ", ".join(str(node.target) for node in held)
            what = f"the mask made of the model's {names} hides no more than it did at first"
            self._guards[key] = Guard(what, holds, of_state=True)
        return self._guards[key]

    def _held(self, node: Node, args: Sequence[Any] | None) -> Any:
        if node.op == "get_attr":
            return attribute(self.gm, str(node.target))
        return None if args is None else args[self._inputs[node]]

    def _making(self, attention: Attention) -> list[Node]:
        """The nodes that the masks' values are computed from, in graph order.

        It ends at sizes, and at products of features: what the model computes is a bias, around which a mask may be
        added. What is written into a mask, through a view of it too, belongs to its making.
        """
        last = self._place[attention.node]
        seen: set[Node] = set()
        todo = sides(attention)
        while todo and len(seen) <= MOST_OF_A_MASK:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if not is_op(node, "sym_size", *SHAPE_ONLY) and not self._is_bias(node):
                todo += [value for value in node.all_input_nodes if is_tensor(value)]
            if not todo:
                todo = [w for w, written in self._writes if self._place[w] < last and w not in seen and written & seen]
        return sorted(seen, key=self._place.__getitem__)

    def _is_bias(self, node: Node) -> bool:
        """Whether a product is one of features, with weights of the model in it, or too many nodes make it to tell."""
        if not is_op(node, *_WORK) or node not in self.depends:
            return False
        seen, todo = {node}, [node]
        while todo and len(seen) < MOST_OF_A_MASK:
            for value in todo.pop().all_input_nodes:
                if is_parameter(value):
                    return True
                if value not in seen:
                    seen.add(value)
                    todo.append(value)
        return len(seen) >= MOST_OF_A_MASK

    def _example(self, node: Node) -> Any:
        value = None if self.example_inputs is None else self.example_inputs[self._inputs[node]]
        if not isinstance(value, Tensor) or isinstance(value, torch._subclasses.FakeTensor):
            raise Unknown
        return value

    @torch.no_grad()
    def _sees(self, attention: Attention, tokens: int, making: list[Node], others: dict[Node, Tensor]) -> Tensor:
        """Which keys each query sees, ``[.., N, N]`` bool."""
        try:
            values = self._values(making, others)
            if attention.mask is not None:
                mask = values[attention.mask]
                logits = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
                return visible(logits.double()).expand(*mask.shape[:-2], tokens, _keys(attention))
            first, dims = attention.way[0], (attention.softmax_query_dim, attention.softmax_dim)
            logits = blank_of(first).zero_()
            if _adds(attention.way):
                logits = logits + values[tensor_inputs(first)[0]]
            logits = along(attention.way, logits, values)
            sees = visible(logits.double().movedim(dims, (-2, -1)))
            if not _joined(attention.after):
                return sees
            assert attention.softmax is not None
            weights = along(attention.after, blank_of(attention.softmax).fill_(1.0), values)
            if weights.shape != logits.shape:
                raise ValueError("the weights were rearranged after the softmax")
            return sees & (weights.movedim(dims, (-2, -1)) != 0)
        except (Barrier, RuntimeError, IndexError, ValueError, TypeError, KeyError) as error:
            raise Unknown from error

    def _values(self, making: list[Node], others: dict[Node, Tensor]) -> dict[Node, Any]:
        values: dict[Node, Any] = {}
        writes = any(is_mutable(node) for node in making)
        for node in making:
            if node.op == "placeholder":
                value = others[node] if node in others else self._example(node)
                values[node] = value.clone() if writes else value
            elif node.op == "get_attr":
                value = attribute(self.gm, str(node.target))
                values[node] = value.clone() if writes else value
            elif self._is_bias(node):
                values[node] = blank_of(node).zero_()
            else:
                values[node] = run(node, values)
        if any(isinstance(value, torch._subclasses.FakeTensor) for value in values.values()):
            raise Unknown
        return values


def _is_pairs(node: Node, queries: int, keys: int) -> bool:
    return is_tensor(node) and [hint(size) for size in node.meta["val"].shape[-2:]] == [queries, keys]


def _aliases(node: Node) -> Iterator[Node]:
    """What an op that writes in place writes to: its operand and what that is a view of."""
    target: Any = argument(node, "self", node.args[0] if node.args else None)
    while isinstance(target, Node):
        yield target
        if not is_mutable(target) and (target.op != "call_function" or not is_alias(target)):
            return
        inputs = tensor_inputs(target)
        target = inputs[0] if inputs else None


def _keys(attention: Attention) -> int:
    """The number of keys: the queries', and null tokens."""
    return hint(attention.key.meta["val"].shape[attention.key_tokens])
