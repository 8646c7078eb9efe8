"""Masked transformers, in every spelling of masked attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tofu_fx
from tests.zoo.handwritten import DIM, HEADS, mlp

N, DEPTH, R = 24, 3, 4
#: q, k, v ``[B, H, N, D]`` and a mask -> the attention's output
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).masked_fill(~mask, -math.inf).softmax(-1) @ v


def _where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, q @ k.transpose(-2, -1), -1e9).softmax(-1) @ v


def _added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((1.0 - mask.float()) * torch.finfo(torch.float32).min + q @ k.transpose(-2, -1)).softmax(-1) @ v


def _einsum_keys_ahead(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhkq", q, k) + (1.0 - mask.float()).transpose(-2, -1) * -1e4
    return torch.einsum("bhkq,bhkd->bhqd", scores.softmax(-2), v)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def _filled_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = _scores(q, k)
    scores.masked_fill_(~mask, -math.inf)
    return scores.softmax(-1) @ v


def filled_in_a_view(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A spelling in which the scores are written through a view."""
    scores = _scores(q, k)
    scores.view(scores.shape).masked_fill_(~mask, -math.inf)
    return scores.softmax(-1) @ v


def _behind_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (_scores(q, k).softmax(-1) * mask.float()) @ v


def _flattened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mask = mask.expand(*q.shape[:2], q.shape[2], -1).flatten(0, 1)
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).masked_fill(~mask, -math.inf)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, q.shape[:2])


ATTEND: dict[str, Attend] = {
    "fused": _fused,
    "masked_fill": _filled,
    "masked_fill in place": _filled_in_place,
    "where": _where,
    "added": _added,
    "keys ahead": _einsum_keys_ahead,
    "subtracted": lambda q, k, v, mask: (_scores(q, k) - 1e4 * (1 - mask.float())).softmax(-1) @ v,
    "added with alpha": lambda q, k, v, mask: torch.add(_scores(q, k), 1 - mask.float(), alpha=-1e9).softmax(-1) @ v,
    "scaled after it": lambda q, k, v, mask: ((_scores(q, k) + (mask.float() - 1) * 50) * 20).softmax(-1) @ v,
    "a logarithm": lambda q, k, v, mask: (_scores(q, k) + mask.float().clamp(1e-30).log()).softmax(-1) @ v,
    "the smaller of two": lambda q, k, v, mask: torch.minimum(_scores(q, k), mask * 2e9 - 1e9).softmax(-1) @ v,
    "after the softmax": _behind_softmax,
    "batch and heads in one": _flattened,
}


class Masked(nn.Module):
    """Pre-norm blocks under one mask: ``make(model, x, *inputs)`` gives it, true where a query sees a key."""

    def __init__(self, make: Callable[..., Tensor], attend: Attend = _fused) -> None:
        super().__init__()
        self.make, self.attend = make, attend
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(DEPTH))
        self.out = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(DEPTH))
        self.mlps = nn.ModuleList(mlp() for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * DEPTH))
        self.bias = nn.Parameter(torch.zeros(N, N))
        self.register_buffer("lower", torch.ones(1, 1, 64, 64).tril().bool())
        self.register_buffer("upper", torch.full((64, 64), -math.inf).triu(1))
        self.register_buffer("places", torch.arange(64)[None])

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        mask = self.make(self, x, *inputs)
        for i in range(DEPTH):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + self.out[i](self.attend(q, k, v, mask).transpose(1, 2).flatten(2))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return x


def sample(batch: int = 2, tokens: int = N, seed: int = 0) -> Tensor:
    """Tokens ``[batch, tokens, DIM]``."""
    return torch.randn(batch, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def reasons(model: nn.Module, *inputs: Tensor) -> set[str]:
    """Why sites are declined, without the source lines; the empty string for a site that is not."""
    return {row.reason.partition(" (/")[0] for row in tofu_fx.explain(model, *inputs, options={"r": R}).sites}


def are_there(lengths: list[int], tokens: int = N) -> Tensor:
    """Flags ``[B, tokens]`` for samples of these lengths, padded after."""
    return torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
