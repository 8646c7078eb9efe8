"""Attention with extra keys that no query stands for, padded or not: the stream's tokens are still its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.harness import NIGHTLY, prove
from tests.zoo.handwritten import DIM, HEADS, mlp
from tofu_fx.testing import randomise

N, DEPTH = 18, 2


class NullAttention(nn.Module):
    """Attention whose keys have learnt tokens in front of and after the queries' own."""

    def __init__(self, front: int, back: int, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), fused
        self.null_tokens = nn.Parameter(torch.randn(2, 2, HEADS, front + back, DIM // HEADS))
        self.front = front

    def forward(self, x: Tensor, there: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        nulls = self.null_tokens[:, :1].expand(-1, len(x), -1, -1, -1)
        k, v = (
            torch.cat([null[:, :, : self.front], own, null[:, :, self.front :]], 2)
            for null, own in zip(nulls, (k, v), strict=True)
        )
        mask = None
        if there is not None:
            back = k.shape[2] - self.front - there.shape[1]
            mask = F.pad(there, (self.front, back), value=True)[:, None, None]
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.transpose(-2, -1)
            scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
            mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class MultiheadNull(nn.Module):
    """PyTorch's own null tokens."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True, **kwargs)

    def forward(self, x: Tensor, there: Tensor | None) -> Tensor:
        hidden = None if there is None else ~there
        return self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]


class Model(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(make() for _ in range(DEPTH))
        self.mlps = nn.ModuleList(mlp() for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * DEPTH))
        self.head = nn.Linear(DIM, 10)

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        for i in range(DEPTH):
            x = x + self.attentions[i](self.norms[2 * i](x), there)
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


KINDS: dict[str, Any] = {
    "one in front, fused": lambda: NullAttention(1, 0, fused=True),
    "two after, written": lambda: NullAttention(0, 2, fused=False),
    "both ends, fused": lambda: NullAttention(1, 2, fused=True),
    "add_bias_kv": lambda: MultiheadNull(add_bias_kv=True),
    "add_zero_attn": lambda: MultiheadNull(add_zero_attn=True),
}


@pytest.mark.parametrize("match", ["keys", "queries_keys", *(["features"] if NIGHTLY else [])])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_site_is_reduced_and_proved(kind: str, padded: bool, match: str) -> None:
    torch.manual_seed(0)
    model = randomise(Model(KINDS[kind]))
    x = torch.randn(2, N, DIM, generator=torch.Generator().manual_seed(1))
    there = torch.arange(N)[None] < torch.tensor([[N - 5], [N - 2]])
    proofs = prove(model, x, *([there] if padded else []), options={"match": match})
    assert not proofs.failures
    assert len(proofs.matched) == DEPTH, [str(site.decline) for site in proofs.sites]
