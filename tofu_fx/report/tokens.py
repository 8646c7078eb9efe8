"""``tofu_fx.token_groups``: which original tokens ended up in which token, for a picture or a check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Interpreter, Node

from tofu_fx.backend import rewrite, run_once
from tofu_fx.plan.options import Options


class _Watched(Interpreter):
    """Runs a rewritten graph and keeps the assignment of every reduction, per stream."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.groups: list[torch.Tensor] = []
        self._follows: dict[Node, int] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.target is torch.ops.tofu.fuse_tokens.default:
            size, assignment = n.args[2], value[2]
            # A reduction whose sizes come from an earlier one continues that one's stream.
            source = size.args[0] if isinstance(size, Node) and size.args else None
            stream = self._follows.get(source) if isinstance(source, Node) else None
            if stream is None:
                stream = len(self.groups)
                self.groups.append(assignment)
            else:
                self.groups[stream] = torch.gather(assignment, 1, self.groups[stream])
            self._follows[n] = stream
        return value


def token_groups(
    model: Any, *example_inputs: Any, options: Options | Mapping[str, Any] | None = None, **example_kwargs: Any
) -> list[torch.Tensor]:
    """Run the reduced model once, eagerly, and return where each original token went.

    Returns:
        One int64 tensor ``[B, N]`` for each stream: for every original token (prefix tokens included) the index of the
        token that it belongs to after the last reduction. Two tokens with the same number were fused; a pruned token
        has the number of the token that it was pruned in favour of.
    """
    parsed = Options.parse(options)
    groups: list[torch.Tensor] = []

    def watch(gm: torch.fx.GraphModule, _: Any) -> Any:
        compilation = rewrite(gm, parsed).compilation
        if compilation is None or not compilation.reducing:
            return gm.forward

        def run(*args: Any) -> Any:
            watched = _Watched(compilation.gm)
            outputs = watched.run(*args)
            groups.extend(watched.groups)
            return outputs

        return run

    run_once(model, watch, example_inputs, example_kwargs)
    return groups
