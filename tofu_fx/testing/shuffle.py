"""A reducer for the proofs: no token goes, all change places, which must change nothing but the order of additions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch.fx import Node

from tofu_fx.axes.atoms import Atom
from tofu_fx.rewrite.layout import Count, Emitter
from tofu_fx.rewrite.reducer import Reducer
from tofu_fx.sites.site import Planned


class Shuffler(Reducer):
    """Shuffles the tokens at every planned site."""

    everywhere: ClassVar[bool] = True

    def fuse(
        self,
        emit: Emitter,
        site: Planned,
        run: Atom,
        x: Node,
        match: Node,
        size: Node,
        gone: Count,
        seed: int,
        other: Callable[[str], Node],
    ) -> Node:
        """Append the operator that shuffles, see `tofu::permute_tokens`."""
        new: Node = emit.call(torch.ops.tofu.permute_tokens.default, x, size, seed, run.lead, run.tail)
        return new

    def strategy(self, site: Planned) -> str:
        """Features follow their tokens: none is merged."""
        return "prune"
