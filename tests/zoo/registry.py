"""What a model of the zoo comes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.harness import randomise


@dataclass(frozen=True)
class Entry:
    """One model: how it is made, what it is called with, and what the compiler must find in it.

    ``sites`` are the attentions at which tokens can be reduced, ``declined`` a word of the reason for each other one.
    ``tokens`` and ``protected`` are those of every site; ``whole`` says that the outputs hold all tokens.
    """

    make: Callable[[], torch.nn.Module]
    shape: tuple[int, ...]
    sites: int
    tokens: int
    protected: tuple[int, int] = (1, 0)
    declined: tuple[str, ...] = ()
    whole: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)

    def model(self) -> torch.nn.Module:
        """The model in eval mode with randomised parameters."""
        torch.manual_seed(0)
        return randomise(self.make())

    def inputs(self, batch: int = 2) -> torch.Tensor:
        """A batch of inputs."""
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(1))
