"""What was decided from the values of one call and must hold in every other: checked whenever the graph is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from tofu_fx.errors import TofuWarning


@dataclass(frozen=True)
class Guard:
    """A condition on a call.

    ``what`` says in words what must hold; ``holds`` tells whether it does, given the arguments of the traced graph in
    the order of its placeholders (parameters and buffers among them). ``of_state``: it asks about these alone.
    """

    what: str
    holds: Callable[[Sequence[Any]], bool]
    of_state: bool = False


def guarded(run: Callable[..., Any], gm: GraphModule, guards: Sequence[Guard]) -> Callable[..., Any]:
    """``run`` while all guards hold; in a call where one does not, the untouched graph, eagerly, said once."""
    said: set[str] = set()

    def call(*args: Any) -> Any:
        broken = next((guard.what for guard in guards if not guard.holds(args)), None)
        if broken is None:
            return run(*args)
        if broken not in said:
            said.add(broken)
            warnings.warn(
                f"tofu_fx: the graph was compiled for calls in which {broken}, and in this one that is not so: "
                "such calls run the untouched graph, eagerly; if they are many, call torch._dynamo.reset() first",
                TofuWarning,
                stacklevel=2,
            )
        return gm(*args)

    return call
