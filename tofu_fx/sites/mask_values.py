"""What the values of a mask say: computing them ahead of a call, and reading what they hide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from tofu_fx.axes.atoms import hint
from tofu_fx.fx.nodes import is_op
from tofu_fx.fx.op_families import SHAPE_ONLY

#: ordered: nothing is hidden; tokens are hidden from all alike (padding); some from some; it cannot be seen; too many
#: nodes make the mask to follow them; later tokens are hidden from earlier ones
Hides = Literal["nothing", "keys", "pairs", "unseen", "far", "later"]
ORDER: tuple[Hides, ...] = ("nothing", "keys", "pairs", "unseen", "far", "later")

#: A key is hidden from a query if its logit is so far below the highest: exp(-46) = 1e-20 of the weight
FAR_BELOW = 46.0


class Unknown(Exception):
    """The mask's values cannot be computed here."""


def visible(logits: Tensor) -> Tensor:
    """Where logits ``[.., Q, K]`` of blank scores let a query see a key. What is not a number is not seen."""
    logits = torch.nan_to_num(logits, nan=-torch.inf, posinf=torch.finfo(logits.dtype).max, neginf=-torch.inf)
    # The difference: beside a highest logit of 1e18 the bound itself would be lost in rounding.
    return logits - logits.amax((-2, -1), keepdim=True) > -FAR_BELOW


def hides_in(sees: Tensor, ahead: int = 0) -> Hides:
    """What is hidden by flags ``[..., Q, K]``; the queries' own tokens are the keys from ``ahead`` on."""
    if bool(sees.all()):
        return "nothing"
    # Null tokens are never merged, but all queries must see the same of them.
    null = torch.cat([sees[..., :ahead], sees[..., ahead + sees.shape[-2] :]], -1)
    if bool((null != null[..., :1, :]).any()):
        return "pairs"
    sees = sees[..., ahead : ahead + sees.shape[-2]]
    # A key that nobody sees is padding; what padding sees does not matter.
    there = sees.any(-2)
    hidden = ~sees & there.unsqueeze(-1) & there.unsqueeze(-2)
    if bool((hidden & sees.transpose(-2, -1)).any()):
        return "later"
    return "pairs" if bool(hidden.any()) else "keys"


def along(way: Sequence[Node], start: Tensor, values: dict[Node, Any]) -> Tensor:
    """What becomes of a tensor on its way through the ops of the graph."""
    env = {**values, way[0]: start}
    for node in way[1:]:
        env[node] = run(node, env)
    result: Tensor = env[way[-1]]
    return result


def run(node: Node, values: dict[Node, Any]) -> Any:
    """The value of a node, from those of its inputs.

    Raises:
        Unknown: it is drawn at random.
    """
    if is_op(node, "sym_size"):
        return hint(node.meta["val"])
    if is_op(node, "dropout", "dropout_"):
        return values[node.args[0]]  # type: ignore[index]
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        raise Unknown
    blank = is_op(node, *SHAPE_ONLY)

    def value_of(n: Node) -> Any:
        if not is_tensor(n):
            return hint(n.meta["val"]) if isinstance(n.meta["val"], torch.SymInt) else n.meta["val"]
        return blank_of(n) if blank else values[n]

    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    return node.target(*args, **kwargs)  # type: ignore[operator]


@torch.no_grad()
def is_alike(side: Tensor, dim: int) -> bool:
    """Whether a tensor is the same at all places of a dim, counted from the end."""
    return side.dim() < -dim or bool((side == side.narrow(dim, 0, 1)).all())


def is_tensor(node: Node) -> bool:
    """Whether a node's value is a tensor, or several."""
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))


def attribute(gm: GraphModule, name: str) -> Any:
    """What a graph module holds under a name with dots."""
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value


def blank_of(node: Node) -> Tensor:
    """A tensor of the right shape and dtype."""
    value = node.meta["val"]
    return torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device=value.device)


@dataclass(frozen=True)
class Held:
    """A tensor that a model holds, and its version; of an inference tensor, which counts none, a copy."""

    tensor: Any
    version: int = 0
    copy: Tensor | None = None

    @classmethod
    def of(cls, tensor: Any) -> Held:
        """What it is now."""
        if not isinstance(tensor, Tensor):
            return cls(tensor)
        return cls(tensor, copy=tensor.clone()) if tensor.is_inference() else cls(tensor, tensor._version)

    def is_still(self, tensor: Any) -> bool:
        """Whether it has not changed."""
        if self.copy is not None:
            return isinstance(tensor, Tensor) and tensor.shape == self.copy.shape and torch.equal(tensor, self.copy)
        return tensor is self.tensor and (not isinstance(tensor, Tensor) or tensor._version == self.version)


def _flags(value: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, value.shape, generator=generator)


#: What inputs are replaced by. Numbers that are added may hide by being far below; flags may mean either.
REPLACEMENTS: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    lambda value, _: torch.zeros(value.shape),
    lambda value, _: torch.ones(value.shape),
    _flags,
    lambda value, _: torch.arange(value.numel()).view(value.shape),
    lambda value, _: 1000 * torch.arange(1, value.numel() + 1).view(value.shape),
    lambda value, generator: _flags(value, generator) * (-1e9 if value.is_floating_point() else 1),
)
