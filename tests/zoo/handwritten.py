"""Transformers as people write them by hand: einops, einsum, nn.MultiheadAttention, nn.TransformerEncoder."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from tests.zoo.case import Case

DIM, HEADS, DEPTH = 32, 4, 3


def mlp(dim: int = DIM) -> nn.Sequential:
    """Two layers, row by row."""
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class EinopsAttention(nn.Module):
    """Attention in the style of vit-pytorch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=HEADS) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        scores = torch.matmul(q, k.transpose(-1, -2)) * (DIM // HEADS) ** -0.5
        return self.out(rearrange(torch.matmul(scores.softmax(dim=-1), v), "b h n d -> b n (h d)"))


class EinopsViT(nn.Module):
    """A ViT whose shapes all go through einops; class token, mean of all tokens or none as pooling."""

    def __init__(self, pool: str = "class") -> None:
        super().__init__()
        self.pool = pool
        self.embed = nn.Sequential(Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=8, q=8), nn.Linear(192, DIM))
        self.class_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.randn(1, 37, DIM))
        self.attentions = nn.ModuleList(EinopsAttention() for _ in range(DEPTH))
        self.mlps = nn.ModuleList(nn.Sequential(nn.LayerNorm(DIM), mlp()) for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        x = torch.cat((repeat(self.class_token, "1 1 d -> b 1 d", b=x.shape[0]), x), dim=1) + self.pos_embed
        for attention, feed_forward in zip(self.attentions, self.mlps, strict=True):
            x = attention(x) + x
            x = feed_forward(x) + x
        x = x.mean(dim=1) if self.pool == "mean" else x[:, 0]
        return self.head(self.norm(x))


class EinsumAttention(nn.Module):
    """Attention as two einsums over ``[B, N, H, D]``."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).view(*x.shape[:2], HEADS, -1) for proj in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div((DIM // HEADS) ** 0.5).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class GroupedQueryAttention(nn.Module):
    """Two query heads to a key head, which is repeated for them as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.k, self.v = nn.Linear(DIM, DIM // 2), nn.Linear(DIM, DIM // 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
        weights = (q @ k.transpose(-2, -1) * (DIM // HEADS) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class MultiheadAttention(nn.Module):
    """nn.MultiheadAttention asked for its weights, which are thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=True)[0]


class Plain(nn.Module):
    """Pre-norm blocks around any attention; tokens come in ready, and are averaged at the end."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attention() for _ in range(DEPTH))
        self.mlps = nn.ModuleList(mlp() for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * DEPTH))
        self.head = nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(DEPTH):
            x = x + self.attentions[i](self.norms[2 * i](x))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """nn.TransformerEncoder, batch first or tokens first, pre- or post-norm."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(
            DIM, HEADS, 2 * DIM, batch_first=batch_first, norm_first=norm_first, dropout=0.1
        )
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(self.encoder(x).mean(1 if self.batch_first else 0))


def _entry(make: Any, shape: tuple[int, ...] = (24, DIM), tokens: int = 24, prefix: int = 0) -> Case:
    return Case(make, shape, sites=DEPTH, tokens=tokens, protected=(prefix, 0))


HANDWRITTEN: dict[str, Case] = {
    "einops_class": _entry(lambda: EinopsViT("class"), (3, 48, 48), 37, 1),
    "einops_mean": _entry(lambda: EinopsViT("mean"), (3, 48, 48), 37, 1),
    "einsum": _entry(lambda: Plain(EinsumAttention)),
    "grouped_query": _entry(lambda: Plain(GroupedQueryAttention)),
    "multihead_weights": _entry(lambda: Plain(MultiheadAttention)),
    "encoder_batch_first": _entry(lambda: Encoder(batch_first=True, norm_first=False)),
    "encoder_tokens_first": _entry(lambda: Encoder(batch_first=False, norm_first=False)),
    "encoder_pre_norm": _entry(lambda: Encoder(batch_first=True, norm_first=True)),
}
