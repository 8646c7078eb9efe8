"""Tensors of tokens in any layout, tokens that are copies of each other, and what is left when these are one."""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
from torch import Tensor

#: All sizes differ, so that no axis is taken for another by its size.
SIZES = {"b": 6, "n": 16, "h": 2, "d": 4, "c": 8}
B, N, H, D, C = SIZES.values()
PAIRS = 2


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def constant(*shape: int) -> Tensor:
    """A weight or table, the same for the same shape."""
    return torch.randn(shape, generator=generator(sum(shape) + len(shape))) / 2


def _pairs() -> list[list[tuple[int, int]]]:
    """For each sample the tokens that are copies of each other, other ones in each; none is near an end."""
    evens = itertools.combinations((4, 6, 8, 10), PAIRS)
    odds = itertools.combinations((11, 9, 7, 5), PAIRS)
    return [list(zip(a, b, strict=True)) for a, b in zip(evens, odds, strict=True)]


def survivors(choice: tuple[int, ...] = (0,) * PAIRS) -> Tensor:
    """The places of the tokens that are left of each sample, ``[B, M]``; ``choice`` says which of each pair."""
    gone = [{pair[1 - kept] for pair, kept in zip(pairs, choice, strict=True)} for pairs in _pairs()]
    return torch.tensor([[i for i in range(N) if i not in out] for out in gone])


def sizes(rows: Tensor) -> Tensor:
    """How many tokens each survivor stands for, ``[B, M]``."""
    paired = [{i for pair in pairs for i in pair} for pairs in _pairs()]
    return torch.tensor([[2.0 if int(i) in two else 1.0 for i in row] for row, two in zip(rows, paired, strict=True)])


def copies(x: Tensor) -> Tensor:
    """Tokens ``[B, N, C]`` of which the pairs are made equal."""
    x = x.clone()
    for sample, pairs in zip(x, _pairs(), strict=True):
        for first, second in pairs:
            sample[second] = sample[first]
    return x


def dims_of(layout: str) -> list[list[str]]:
    """``"(b n) c"`` -> ``[["b", "n"], ["c"]]``."""
    dims: list[list[str]] = []
    inside = False
    for word in layout.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            dims += [[]] if inside else []
        elif inside:
            dims[-1].append(word)
        else:
            dims.append([word])
    return dims


def arrange(x: Tensor, layout: str) -> Tensor:
    """``[B, N, C]`` in another layout."""
    dims = dims_of(layout)
    flat = [name for dim in dims for name in dim]
    own = ["b", "n", "h", "d"] if "h" in flat else ["b", "n", "c"]
    if "h" in flat:
        x = x.view(B, N, H, D)
    x = x.permute([own.index(name) for name in flat]) if flat != own else x
    shape = [math.prod(x.shape[flat.index(name)] for name in dim) for dim in dims]
    return x.reshape(shape) if len(dims) != len(flat) else x


def split(x: Tensor, layout: str) -> tuple[Tensor, list[str]]:
    """A tensor with one dim for each axis of its layout, and their names; one axis of each dim may be of any size."""
    names = []
    for i, dim in enumerate(reversed(dims_of(layout)), start=1):
        if len(dim) > 1:
            x = x.unflatten(-i if not names else x.dim() - len(names) - 1, [SIZES.get(name, -1) for name in dim])
        names[:0] = dim
    return x, names


def reduced(x: Tensor, layout: str, rows: Tensor) -> list[Tensor]:
    """The surviving tokens of a tensor. Where it has no samples: by the survivors of each sample in turn."""
    shape = list(x.shape)
    x, names = split(x, layout)
    if "n" not in names:
        return [x.reshape(shape)]
    place = names.index("n")
    if "b" not in names:
        several = [x.index_select(place, row) for row in rows]
    else:
        x = x.movedim((names.index("b"), place), (0, 1))
        picked = torch.stack([sample[row] for sample, row in zip(x, rows, strict=True)])
        several = [picked.movedim((0, 1), (names.index("b"), place))]
    dims = [(len(dim), "n" in dim) for dim in dims_of(layout)]
    shape = [size // N * rows.shape[1] if tokens else size for size, (_, tokens) in zip(shape, dims, strict=True)]
    return [part.reshape(shape) for part in several]


def pooled(x: Tensor, layout: str, size: Tensor | None = None) -> Tensor:
    """The mean of a result over its tokens, each as often as its size; the result itself where it has none."""
    names = [name for dim in dims_of(layout) for name in dim]
    if "n" not in names:
        return x
    x = x if x.is_floating_point() else x.float()
    if len(names) != x.dim():
        x, _ = split(x, layout)
    if size is None:
        return x.mean(names.index("n"))
    shape = [1] * x.dim()
    if "b" not in names:
        raise AssertionError(f"the sizes of which sample, in a result of {layout}?")
    shape[names.index("b")], shape[names.index("n")] = size.shape
    weights = (size if names.index("b") < names.index("n") else size.T).reshape(shape)
    return (x * weights).sum(names.index("n")) / N


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree, to the rounding of float32: sums of at most 6 * 16 terms of size 1, in any order."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-4, atol=2e-5)
