"""One model of the zoo: how it is made and called, and what the compiler must make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tofu_fx.testing import randomise


@dataclass(frozen=True)
class Case:
    """A model at small dims with random weights.

    Args:
        make: the model, from its config (nothing is downloaded).
        args: tensors that it is called with, from a seeded generator; or the shape of its one tensor, the batch aside.
        kwargs: further inputs.
        sites: attentions at which tokens can be reduced.
        declined: for each other attention a few words of the reason, in the order of the graph; ``("causal",) * 2``.
        reason: where the graph has no attention or cannot be rewritten at all: a few words of what the user is told.
        weights: what is done to the model's parameters; every parameter must matter to the outputs.
        tokens: how many each site has; 0 where nobody asks, or they differ.
        protected: how many of them at either end are no ordinary ones.
        whole: whether the outputs hold all tokens.
    """

    make: Callable[[], torch.nn.Module]
    args: Callable[[torch.Generator], tuple[Any, ...]] | tuple[int, ...]
    kwargs: Callable[[torch.Generator], dict[str, Any]] = field(default=lambda generator: {})
    sites: int = 0
    declined: tuple[str, ...] = ()
    reason: str = ""
    weights: Callable[[torch.nn.Module], torch.nn.Module] = randomise
    tokens: int = 0
    protected: tuple[int, int] = (1, 0)
    whole: bool = False

    def model(self) -> torch.nn.Module:
        """The model in eval mode; the same parameters on every call."""
        torch.manual_seed(0)
        return self.weights(self.make()).eval()

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword inputs; the same on every call."""
        generator = torch.Generator().manual_seed(1)
        args = (self.batch(),) if isinstance(self.args, tuple) else self.args(generator)
        return args, self.kwargs(generator)

    def batch(self, size: int = 2) -> torch.Tensor:
        """The one tensor of a model that has its shape for ``args``, for so many samples; the same on every call."""
        assert isinstance(self.args, tuple), "this model's inputs are more than a batch of one shape"
        return torch.randn(size, *self.args, generator=torch.Generator().manual_seed(1))


def images(size: int, batch: int = 2, channels: int = 3) -> Callable[[torch.Generator], tuple[Any, ...]]:
    """Square images ``[B, C, size, size]`` of unit variance."""
    return lambda generator: (torch.randn(batch, channels, size, size, generator=generator),)
