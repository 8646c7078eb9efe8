"""Random small transformers assembled from the ways in which people write them, each with its own eager reference.

``Transformer(spec)(x)`` is the model that is compiled; ``Transformer(spec)(x, reducer)`` is the same module with a
`tests.eager_reference.Reducer` switched in behind every attention: the reference of what the compiled one must give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.eager_reference import Reducer

DIM, HEADS, WIDTH = 16, 2, 8


@dataclass(frozen=True)
class Spec:
    """How a transformer is written."""

    layout: str = "BNC"  # "BNC", "NBC", "merged"
    post_norm: bool = False
    fused_qkv: bool = True
    attention: str = "sdpa"  # "sdpa", "matmul", "einsum", "bmm"
    residual: str = "plain"  # "plain", "branch_scaled", "stream_scaled"
    layer_scale: bool = False
    dropout: bool = False
    qk_norm: bool = False
    mask: str = "none"  # "none", "additive" and "bool" (the last patches are padding), "relative"
    rotary: bool = False
    prefix: int = 1
    suffix: int = 0
    pooling: str = "class"  # "class", "mean", "mean_patches", "tokens", "conv", "attention"
    in_place: bool = False
    depth: int = 2
    grid: tuple[int, int] = (3, 4)

    @property
    def patches(self) -> int:
        """Tokens that come from the input."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.prefix + self.patches + self.suffix


class Attention(nn.Module):
    """Self-attention in every spelling; returns the branch ``[B, N, C]`` and the keys ``[B, H, N, D]``."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.qkv = nn.Linear(DIM, 3 * DIM) if spec.fused_qkv else nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.q_norm = nn.LayerNorm(WIDTH) if spec.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(WIDTH) if spec.qk_norm else nn.Identity()
        self.out = nn.Linear(DIM, DIM)
        self.relative_bias_table = nn.Parameter(torch.randn(1, HEADS, spec.tokens, spec.tokens))
        angles = torch.randn(spec.patches, WIDTH // 2)
        self.register_buffer("sin", angles.sin().repeat_interleave(2, -1))
        self.register_buffer("cos", angles.cos().repeat_interleave(2, -1))
        place = torch.arange(spec.tokens)
        padding = spec.prefix + spec.patches - spec.patches // 4
        self.register_buffer("there", (place < padding) | (place >= spec.prefix + spec.patches))

    def forward(self, x: Tensor, reducer: Reducer | None) -> tuple[Tensor, Tensor]:
        batch, tokens, _ = x.shape
        if self.spec.fused_qkv:
            q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (proj(x).view(batch, tokens, HEADS, WIDTH).transpose(1, 2) for proj in self.qkv)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rotary:
            q, k = self._rotate(q, reducer), self._rotate(k, reducer)
        mask = self._mask(batch, reducer)
        out = self._product(q, k, v, mask, reducer)
        return self.out(out.transpose(1, 2).reshape(batch, tokens, DIM)), k

    def _rotate(self, x: Tensor, reducer: Reducer | None) -> Tensor:
        """Rotate the patches; prefix and suffix tokens have no place."""
        first, last = self.spec.prefix, x.shape[2] - self.spec.suffix
        sin, cos = self.sin, self.cos
        if reducer is not None and reducer.origin is not None:
            origin = reducer.origin[:, first:last] - first
            sin, cos = sin[origin].unsqueeze(1), cos[origin].unsqueeze(1)
        body = x[:, :, first:last]
        turned = torch.stack((-body[..., 1::2], body[..., ::2]), -1).reshape(body.shape)
        body = body * cos + turned * sin
        return torch.cat((x[:, :, :first], body, x[:, :, last:]), 2) if first or self.spec.suffix else body

    def _mask(self, batch: int, reducer: Reducer | None) -> Tensor | None:
        if self.spec.mask == "none":
            return None
        if self.spec.mask == "relative":
            mask = self.relative_bias_table
        elif self.spec.mask == "bool":
            mask = self.there[None, None, None]
        else:
            mask = torch.zeros(self.there.shape).masked_fill(~self.there, float("-inf"))
            mask = mask.expand(batch, 1, *self.there.shape, -1)
        if reducer is None:
            return mask
        if self.spec.mask != "relative":
            reducer.there = self.there
        return reducer.pairs_of(mask.expand(-1, -1, self.spec.tokens, -1))

    def _product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, reducer: Reducer | None) -> Tensor:
        if reducer is None and self.spec.attention == "sdpa":
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        q = q * WIDTH**-0.5
        if self.spec.attention == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
        elif self.spec.attention == "bmm":
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, (-1, HEADS))
        else:
            scores = q @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        weights = (scores if reducer is None else reducer.logits(scores)).softmax(-1)
        if self.spec.attention == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        if self.spec.attention == "bmm":
            return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, HEADS))
        return weights @ v


class Block(nn.Module):
    """Attention and MLP around a stream that is kept in the layout of the spec."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.attention = Attention(spec)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.gammas = nn.ParameterList(nn.Parameter(torch.ones(DIM)) for _ in range(2))
        self.drop = nn.Dropout(0.3) if spec.dropout else nn.Identity()

    def forward(self, x: Tensor, batch: int, reducer: Reducer | None) -> Tensor:
        pre = not self.spec.post_norm
        branch, keys = self.attention(canonical(self.norm1(x) if pre else x, self.spec, batch), reducer)
        x = self._add(x, laid_out(branch, self.spec), 0)
        if reducer is not None:
            if self.spec.residual == "stream_scaled":
                reducer.not_additive()
            x = laid_out(reducer.reduce(canonical(x, self.spec, batch), keys), self.spec)
        x = x if pre else self.norm1(x)
        x = self._add(x, self.mlp(self.norm2(x) if pre else x), 1)
        if reducer is not None and (self.spec.post_norm or self.spec.residual == "stream_scaled"):
            reducer.not_additive()
        return x if pre else self.norm2(x)

    def _add(self, x: Tensor, branch: Tensor, which: int) -> Tensor:
        branch = self.drop(branch * self.gammas[which] if self.spec.layer_scale else branch)
        if self.spec.residual == "branch_scaled":
            branch = branch * 0.5
        elif self.spec.residual == "stream_scaled":
            x = x * 0.9
        if self.spec.in_place:
            x += branch
            return x
        return x + branch


class Transformer(nn.Module):
    """Embedding, blocks, pooling as the spec says. Input ``[B, patches, 5]``."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Linear(5, DIM)
        self.prefix_tokens = nn.Parameter(torch.randn(1, spec.prefix, DIM))
        self.suffix_tokens = nn.Parameter(torch.randn(1, spec.suffix, DIM))
        self.pos_embed = nn.Parameter(torch.randn(1, spec.tokens, DIM))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = nn.Identity() if spec.post_norm else nn.LayerNorm(DIM)
        self.head = nn.Conv2d(DIM, 3, 3, padding=1) if spec.pooling == "conv" else nn.Linear(DIM, 3)
        self.latent = nn.Parameter(torch.randn(1, 1, DIM))

    def forward(self, x: Tensor, reducer: Reducer | None = None) -> Any:
        spec, batch = self.spec, x.shape[0]
        x = self.embed(x)
        ends = [self.prefix_tokens.expand(batch, -1, -1), x, self.suffix_tokens.expand(batch, -1, -1)]
        x = torch.cat([part for part in ends if part.shape[1]], 1) if spec.prefix + spec.suffix else x
        x = laid_out(x + self.pos_embed, spec)
        for block in self.blocks:
            x = block(x, batch, reducer)
        if reducer is not None and spec.pooling in ("tokens", "conv"):
            x = laid_out(reducer.restore(canonical(x, spec, batch)), spec)
        return self._pool(canonical(self.norm(x), spec, batch), reducer)

    def _pool(self, x: Tensor, reducer: Reducer | None) -> Tensor:
        spec = self.spec
        if spec.pooling == "class":
            return self.head(x[:, 0])
        if spec.pooling == "tokens":
            return self.head(x)
        if spec.pooling == "conv":
            x = x[:, spec.prefix : spec.prefix + spec.patches] if spec.prefix + spec.suffix else x
            return self.head(x.transpose(1, 2).reshape(x.shape[0], DIM, *spec.grid))
        if spec.pooling == "attention":
            scores = self.latent @ x.transpose(1, 2)
            weights = (scores if reducer is None else reducer.logits(scores[:, None])[:, 0]).softmax(-1)
            return self.head(weights @ x)[:, 0]
        prefix = spec.prefix if spec.pooling == "mean_patches" else 0
        return self.head(x[:, prefix:].mean(1) if reducer is None else reducer.mean(x, prefix))


def canonical(x: Tensor, spec: Spec, batch: int) -> Tensor:
    """A stream in the layout of the spec as ``[B, N, C]``."""
    if spec.layout == "NBC":
        return x.transpose(0, 1)
    return x.reshape(batch, -1, DIM) if spec.layout == "merged" else x


def laid_out(x: Tensor, spec: Spec) -> Tensor:
    """``[B, N, C]`` in the layout of the spec."""
    if spec.layout == "NBC":
        return x.transpose(0, 1).contiguous()
    return x.reshape(-1, DIM) if spec.layout == "merged" else x
