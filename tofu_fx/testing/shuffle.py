"""A reducer for the proofs: no token goes, all change places, which must change nothing but the order of additions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.fx import Node

from tofu_fx.rewriting.layout import Emitter
from tofu_fx.rewriting.reducer import Reducer, Step
from tofu_fx.sites.site import Planned


class Shuffler(Reducer):
    """Shuffles the tokens at every planned site."""

    everywhere: ClassVar[bool] = True

    def fuse(self, emit: Emitter, step: Step) -> Node:
        """Append the operator that shuffles, see `tofu::permute_tokens`."""
        ends = step.run.prefix, step.run.suffix
        new: Node = emit.call(torch.ops.tofu.permute_tokens.default, step.x, step.size, step.seed, *ends)
        return new

    def strategy(self, site: Planned) -> str:  # noqa: ARG002 - as it is asked
        """Features follow their tokens: none is merged."""
        return "prune"
