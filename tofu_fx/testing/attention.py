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
    pairs: Tensor

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
        self.register_buffer("pairs", _pairs(spec, place))

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
            projected = [self._projected(proj, value) for proj, value in zip(self.qkv, (moved, moved, x), strict=True)]
            if tokens_first:
                return tuple(y.view(x.shape[0], batch, HEADS, WIDTH).permute(1, 2, 0, 3) for y in projected)
            split = [canonical(y, self.spec, batch) for y in projected]
            return tuple(y.view(batch, y.shape[1], HEADS, WIDTH).transpose(1, 2) for y in split)
        if tokens_first:
            return self.qkv(x).reshape(x.shape[0], batch, 3, HEADS, WIDTH).permute(2, 1, 3, 0, 4).unbind(0)
        x = canonical(x, self.spec, batch)
        return self.qkv(x).reshape(batch, x.shape[1], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)

    def _projected(self, proj: nn.Module, x: Tensor) -> Tensor:
        if not self.spec.addmm:
            return proj(x)
        assert isinstance(proj, nn.Linear)
        return torch.addmm(proj.bias, x.reshape(-1, DIM), proj.weight.t()).view(x.shape)

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
        elif self.spec.given_mask:
            assert there is not None
            mask = there[:, None, None, :] if self.spec.mask == "padding" else there
        elif self.spec.mask in ("bool", "where"):
            mask = self.there[None, None, None]
        elif self.spec.mask in ("visible", "causal", "window"):
            mask = self.pairs
        else:
            low = float("-inf") if self.spec.mask == "additive" else -1e9
            mask = torch.zeros(self.there.shape).masked_fill(~self.there, low)
            mask = mask.expand(batch, 1, *self.there.shape, -1)
        if reducer is None:
            return mask
        if self.spec.mask != "relative":
            reducer.there = self.there
        return reducer.pairs_of(mask.expand(-1, -1, self.spec.tokens, -1))

    def _product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, reducer: Any) -> Tensor:
        if reducer is None and self.spec.attention == "sdpa" and self.spec.mask != "where":
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = self._scores(q * WIDTH**-0.5, k)
        if mask is not None and self.spec.mask == "where":
            scores = torch.where(mask, scores, float("-inf"))
        elif mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        weights = weighed(scores if reducer is None else reducer.logits(scores), self.spec.softmax)
        if self.spec.attention == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        if self.spec.attention in ("bmm", "baddbmm"):
            return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, HEADS))
        return weights @ v

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        if self.spec.attention == "einsum":
            return torch.einsum("bhqd,bhkd->bhqk", q, k)
        if self.spec.attention == "bmm":
            return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, (-1, HEADS))
        if self.spec.attention == "baddbmm":
            product = torch.baddbmm(q.new_zeros(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
            return product.unflatten(0, (-1, HEADS))
        return q @ (k.mT if self.spec.attention == "mT" else k.transpose(-2, -1))


def weighed(scores: Tensor, how: str) -> Tensor:
    """Weights ``[B, H, Q, K]`` of scores. Those that are no softmax over the keys are to be left alone."""
    ways = {
        "softmax": lambda: scores.softmax(-1),
        "shifted": lambda: (scores - scores.amax(-1, keepdim=True)).softmax(-1),
        "log": lambda: scores.log_softmax(-1).exp(),
        "by hand": lambda: scores.exp() / scores.exp().sum(-1, keepdim=True),
        "logsumexp": lambda: (scores - scores.logsumexp(-1, keepdim=True)).exp(),
        "plus one": lambda: scores.exp() / (1 + scores.exp().sum(-1, keepdim=True)),
        "queries": lambda: scores.softmax(-2),
        "squared": lambda: scores.softmax(-1).square(),
        "threshold": lambda: scores.softmax(-1).masked_fill(scores.softmax(-1) < 0.06, 0),
        "gated": lambda: scores.softmax(-1) * scores.softmax(-1).sigmoid(),
        "self masked": lambda: scores.masked_fill(scores < 0, -1e9).softmax(-1),
        "slots": lambda: scores.softmax(-2) / scores.softmax(-2).sum(-1, keepdim=True),
    }
    return ways[how]()


def _pairs(spec: Spec, place: Tensor) -> Tensor:
    """A mask over pairs of tokens, to be added: of a causal attention, of a window of five; else it hides nothing."""
    far = place[:, None] - place[None, :]
    hidden = far < 0 if spec.mask == "causal" else far.abs() > 2
    if spec.mask not in ("causal", "window"):
        hidden = torch.zeros_like(hidden)
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
