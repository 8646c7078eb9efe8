"""The tokens of a tensor: of which token, and of which sample, each of its elements is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: more than any tensor has tokens
MANY = 2**40


class Unfit(Exception):
    """The interpreter cannot follow this graph; the message says why."""


@dataclass(frozen=True, eq=False)
class Axis:
    """The tokens of one stream in a tensor: for each element its token and its sample, -1 where it is of none."""

    stream: int
    token: Tensor
    sample: Tensor

    @cached_property
    def tokens(self) -> Tensor:
        """The tokens that the tensor has, ascending."""
        return distinct(self.token)

    @property
    def is_single(self) -> bool:
        """Whether all its elements that are of a token are of one."""
        return not are_several(self.token)

    @cached_property
    def places(self) -> Tensor:
        """Where the elements of each token lie in the flat tensor, ``[B, tokens, F]``."""
        token, sample = self.token.flatten(), self.sample.flatten()
        inside = (token >= 0).nonzero().squeeze(1)
        if bool((sample[inside] < 0).any()):
            raise Unfit("an op mixes the samples of a stream")
        order = inside[(sample[inside] * MANY + token[inside]).argsort(stable=True)]
        samples = len(distinct(sample[inside]))
        if len(order) % (samples * len(self.tokens)):
            raise Unfit("tokens of one tensor have different numbers of elements")
        return order.view(samples, len(self.tokens), -1)

    def change(self, value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The tensor with ``change`` applied to its tokens ``[B, tokens, F]``; what is of none stays."""
        flat = value.flatten().clone()
        flat[self.places] = change(flat[self.places])
        return flat.view(value.shape)


def distinct(labels: Tensor) -> Tensor:
    """The labels that there are, ascending, without those of none: as ``unique``, which sorts all of them."""
    known = labels[labels >= 0]
    seen = torch.zeros(int(known.max()) + 1 if len(known) else 0, dtype=torch.bool)
    seen[known] = True
    return seen.nonzero().flatten()


def are_several(labels: Tensor) -> bool:
    """Whether there are two labels, or more, that differ."""
    highest = labels.max()
    return bool((torch.where(labels >= 0, labels, highest) != highest).any())
