"""Self-attention in the spellings of a `Spec`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tofu_fx.testing.spec import DIM, HEADS, WIDTH, Spec, canonical


class Attention(nn.Module):
    """Takes a stream in the layout of the spec; returns the branch in it, and the keys ``[B, H, N, D]``."""

    sin: Tensor
    cos: Tensor
    there: Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.fused = spec.fused_qkv and spec.positions != "queries and keys"
        self.qkv = nn.Linear(DIM, 3 * DIM) if self.fused else nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
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

    def forward(
        self, x: Tensor, batch: int, places: Tensor | None, there: Tensor | None, reducer: Any
    ) -> tuple[Tensor, Tensor]:
        """``places`` are added to what queries and keys are made from, ``there`` ``[B, N]`` says what is no padding."""
        q, k, v = self._heads(x, places, batch)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rotary:
            q, k = self._rotate(q, reducer), self._rotate(k, reducer)
        out = self._product(q, k, v, self._mask(batch, there, reducer), reducer)
        tokens = q.shape[2]
        if self.spec.layout == "NBC":
            out = out.permute(2, 0, 1, 3).reshape(tokens, batch, DIM)
        else:
            out = out.transpose(1, 2).reshape(batch, tokens, DIM)
            out = out.reshape(-1, DIM) if self.spec.layout == "merged" else out
        return self.out(out), k

    def _heads(self, x: Tensor, places: Tensor | None, batch: int) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[B, H, N, D]``."""
        tokens_first = self.spec.layout == "NBC"
        if not self.fused:
            assert isinstance(self.qkv, nn.ModuleList)
            moved = x if places is None else x + places
            projected = [proj(value) for proj, value in zip(self.qkv, (moved, moved, x), strict=True)]
            if tokens_first:
                return tuple(y.view(x.shape[0], batch, HEADS, WIDTH).permute(1, 2, 0, 3) for y in projected)
            split = [canonical(y, self.spec, batch) for y in projected]
            return tuple(y.view(batch, y.shape[1], HEADS, WIDTH).transpose(1, 2) for y in split)
        if tokens_first:
            return self.qkv(x).reshape(x.shape[0], batch, 3, HEADS, WIDTH).permute(2, 1, 3, 0, 4).unbind(0)
        x = canonical(x, self.spec, batch)
        return self.qkv(x).reshape(batch, x.shape[1], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)

    def _rotate(self, x: Tensor, reducer: Any) -> Tensor:
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

    def _mask(self, batch: int, there: Tensor | None, reducer: Any) -> Tensor | None:
        if self.spec.mask == "none":
            return None
        if self.spec.mask == "relative":
            mask: Tensor = self.relative_bias_table
        elif self.spec.mask == "padding":
            assert there is not None
            mask = there[:, None, None, :]
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

    def _product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, reducer: Any) -> Tensor:
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
