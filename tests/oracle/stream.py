"""Token reduction in eager mode, written from the formulas: what a reduced model must compute.

`Reducer` does by hand, around an ordinary forward, what the compiler does in the graph: match on the keys averaged over
heads, fuse after the attention's residual add, add log(size) to later logits, weigh means by size, pick the surviving
tokens' rows of position tables and masks, and restore whole tokens at the end. `reference_vit` is a forward of timm's
VisionTransformer with it. Nothing here comes from the package under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.oracle.operators import (
    decision_margin,
    reference_fuse,
    reference_rebase,
    reference_restore,
    reference_separate,
)

# Scores are cosines computed from float32 keys. Two computations of the keys differ by about 1e-6; a decision that is
# closer than this could fall either way, and then nothing can be compared: such a case is given up, not passed.
CLEAR_MARGIN = 1e-5


class Undecided(Exception):
    """A merge decision was too close to rounding for two float32 computations to be compared."""


class Reducer:
    """Carries out ``rows`` = (strategy, r) at successive sites of a stream with protected ends."""

    def __init__(
        self,
        rows: Sequence[tuple[str, int]],
        prefix: int = 0,
        suffix: int = 0,
        biased: bool = True,
        match: str = "keys",
    ) -> None:
        self.rows, self.prefix, self.suffix, self.biased, self.match = list(rows), prefix, suffix, biased, match
        self.queries: Tensor | None = None  # [B, H, N, D] of the attention ahead of the site
        self.there: Tensor | None = None  # [N] bool: which of the original tokens are no padding
        self.size: Tensor | None = None
        self.origin: Tensor | None = None
        self.steps: list[dict[str, Any]] = []
        self.additive = False
        self.margin = float("inf")

    def reduce(self, x: Tensor, keys: Tensor) -> Tensor:
        """The next site: x ``[B, N, C]`` after the residual add, keys ``[B, H, N, D]`` of that attention."""
        strategy, r = self.rows[len(self.steps)]
        batch, tokens, _ = x.shape
        metric = keys.mean(1)
        if self.match != "keys":
            metric = keys.transpose(1, 2).flatten(2)
        if self.match == "queries_keys":
            assert self.queries is not None
            metric = torch.cat([metric, self.queries.transpose(1, 2).flatten(2)], -1)
        if self.match == "features":
            metric = x - x.mean(-1, keepdim=True)
        if self.there is not None:
            there = self.there.expand(batch, -1) if self.origin is None else self.there[self.origin]
            metric = reference_separate(metric, there)
        size = torch.ones(batch, tokens) if self.size is None else self.size
        self.margin = min(self.margin, decision_margin(metric, r, self.prefix, self.suffix)) if r else self.margin
        if self.margin < CLEAR_MARGIN:
            raise Undecided
        merged, self.size, assignment, kept = reference_fuse(x, metric, size, r, strategy, self.prefix, self.suffix)
        self.origin = kept if self.origin is None else self.origin.gather(1, kept)
        step = {
            "before": x.clone(),
            "merged": merged,
            "assignment": assignment,
            "size": size,
            "additive": self.additive,
        }
        self.steps.append({**step, "kept": kept, "strategy": strategy})
        self.additive = True
        return merged.clone()  # the model may change its stream in place

    def logits(self, scores: Tensor) -> Tensor:
        """Proportional attention: log(size) of the keys onto scores ``[B, H, Q, K]``."""
        if self.size is None or not self.biased:
            return scores
        return scores + self.size.log()[:, None, None, :]

    def mean(self, x: Tensor, prefix: int = 0) -> Tensor:
        """Mean over the tokens after ``prefix``, each counted as often as the tokens that it stands for."""
        x = x[:, prefix:]
        if self.size is None:
            return x.mean(1)
        weight = self.size[:, prefix:, None]
        return (x * weight).sum(1) / weight.sum(1)

    def rows_of(self, table: Tensor) -> Tensor:
        """A table over the original tokens ``[N, D]`` -> ``[B, 1, M, D]`` over those that are left."""
        return table[None, None] if self.origin is None else table[self.origin].unsqueeze(1)

    def pairs_of(self, table: Tensor) -> Tensor:
        """A table over pairs of tokens ``[B or 1, H or 1, N, N]`` -> ``[B, H or 1, M, M]``."""
        if self.origin is None:
            return table
        table = table.expand(self.origin.shape[0], *table.shape[1:])
        picked = [part[:, keep][:, :, keep] for part, keep in zip(table, self.origin, strict=True)]
        return torch.stack(picked)

    def merged(self, x: Tensor) -> Tensor:
        """Features ``[B, N, C]`` from before all reductions (a long skip), merged as the stream was."""
        for step in self.steps:
            x = reference_rebase(x, step["size"], step["assignment"], step["kept"], step["strategy"]).to(x.dtype)
        return x

    def not_additive(self) -> None:
        """The stream was replaced by something else than itself plus a branch (post-norm)."""
        self.additive = False

    def restore(self, x: Tensor) -> Tensor:
        """All original tokens: own features before each reduction plus what the representative gained since."""
        additive = self.additive
        for step in reversed(self.steps):
            if additive:
                x = reference_restore(x, step["assignment"], step["before"], step["merged"])
            else:
                x = reference_restore(x, step["assignment"])
            additive = additive and step["additive"]
        return x


def attention(module: Any, x: Tensor, reducer: Reducer) -> tuple[Tensor, Tensor]:
    """timm's Attention written out; also the keys ``[B, H, N, D]``."""
    batch, tokens, _ = x.shape
    qkv = module.qkv(x).reshape(batch, tokens, 3, module.num_heads, module.head_dim)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    q, k = module.q_norm(q), module.k_norm(k)
    reducer.queries = q
    weights = reducer.logits(q @ k.transpose(-2, -1) * module.head_dim**-0.5).softmax(-1)
    return module.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, -1)), k


def attention_pool(module: Any, x: Tensor, reducer: Reducer) -> Tensor:
    """timm's AttentionPoolLatent with one latent query: keys that stand for several tokens count as several."""
    batch, tokens, dim = x.shape
    heads, width = module.num_heads, module.head_dim
    q = module.q(module.latent.expand(batch, -1, -1)).reshape(batch, 1, heads, width).transpose(1, 2)
    k, v = module.kv(x).reshape(batch, tokens, 2, heads, width).permute(2, 0, 3, 1, 4)
    weights = reducer.logits(q @ k.transpose(-2, -1) * width**-0.5).softmax(-1)
    x = module.proj((weights @ v).transpose(1, 2).reshape(batch, 1, dim))
    return (x + module.mlp(module.norm(x)))[:, 0]


def reference_vit(model: Any, images: Tensor, reducer: Reducer, features: bool = False) -> Tensor:
    """timm's VisionTransformer: class, distillation and register tokens, LayerScale, q/k norm, every pooling.

    With ``features`` the result is that of ``forward_features``: whole tokens, restored ahead of the final norm.
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    for block in model.blocks:
        branch, keys = attention(block.attn, block.norm1(x), reducer)
        x = reducer.reduce(x + block.ls1(branch), keys)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    if features:
        return model.norm(reducer.restore(x))
    x = model.norm(x)
    if hasattr(model, "head_dist"):
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    if model.global_pool == "avg":
        x = reducer.mean(x, model.num_prefix_tokens)
    elif model.global_pool == "map":
        x = attention_pool(model.attn_pool, x, reducer)
    else:
        x = x[:, 0]
    return model.head(model.fc_norm(x))
