"""Other ways to group tokens, written from their papers as eager references on timm's vision transformers.

- "ToMe" (Token Merging, arXiv 2210.09461): every other token is a candidate; the r candidates most like a token of the
  rest join it. What stays is put before the rest, and that is the order of the next layer's turns.
- "ATC" (Agglomerative Token Clustering, arXiv 2409.11923): clustering by average linkage on cosine distance.
- "PiToMe" (arXiv 2405.16148): the 2 r tokens of the highest energy, those with the most tokens like them, take turns as
  candidates and partners; every other token is protected.

All of them compare the mean of the keys over the heads, merge to the average by sizes between attention and MLP, attend
in proportion to sizes, and leave the first tokens (class, registers) alone. What must be whole is copied back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tofu_fx.extras import need

#: tokens `[B, N, M]`, how many at the start are left alone, r, and the layer's depth from 0 to 1 -> the place `[B, N]`
#: of each token among the N - r that are left
Grouping = Callable[[Tensor, int, int, float], Tensor]


def tome(metric: Tensor, prefix: int, r: int, depth: float) -> Tensor:
    """Bipartite soft matching, for one token at the start that is left alone (it has the first place, then)."""
    assert prefix == 1
    unit = F.normalize(metric, dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].mT
    similarity[:, 0] = -torch.inf
    best, partner = similarity.max(-1)
    leaving = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.argsort(-1, descending=True)[:, :r], True)
    place = torch.empty(metric.shape[:2], dtype=torch.long)
    stay = (~leaving).cumsum(1) - 1  # candidates that stay come first, in their order
    behind = best.shape[1] - r
    place[:, 1::2] = behind + torch.arange(similarity.shape[2])
    place[:, ::2] = torch.where(leaving, behind + partner, stay)
    return place


def atc(metric: Tensor, prefix: int, r: int, depth: float) -> Tensor:
    """The first r joins of clustering by average linkage; a cluster stands where its first token stood."""
    hierarchy, distance = need("scipy.cluster.hierarchy", "scipy"), need("scipy.spatial.distance", "scipy")
    joins = torch.arange(metric.shape[1]).repeat(len(metric), 1)
    for row, sample in zip(joins, metric[:, prefix:].double().numpy(), strict=True):
        tree = hierarchy.linkage(distance.pdist(sample, "cosine"), "average")
        first = [*range(len(sample)), *([-1] * r)]  # the first token of each cluster; scipy numbers the joined ones on
        for cluster, (one, other) in enumerate(tree[:r, :2].astype(int).tolist(), len(sample)):
            earlier, later = sorted((first[one], first[other]))
            first[cluster] = earlier
            row[row == prefix + later] = prefix + earlier
    return places_of(joins)


def pitome(metric: Tensor, prefix: int, r: int, depth: float) -> Tensor:
    """Energy-based merging (the paper's section 3); the margin of what counts as alike shrinks, 0.9 (1 - depth)."""
    unit = F.normalize(metric[:, prefix:], dim=-1)
    similarity, margin = unit @ unit.mT, 0.9 * (1 - depth)
    energy = torch.where(similarity >= margin, similarity, torch.expm1(similarity - margin)).mean(-1)
    mergeable = energy.argsort(-1, descending=True)[:, : 2 * r]
    candidates, partners = mergeable[:, ::2], mergeable[:, 1::2]
    rows = torch.arange(len(metric)).unsqueeze(1)
    between = similarity[rows.unsqueeze(2), candidates.unsqueeze(2), partners.unsqueeze(1)]
    joins = torch.arange(metric.shape[1]).repeat(len(metric), 1)
    joins[rows, prefix + candidates] = prefix + partners.gather(1, between.argmax(-1))
    return places_of(joins)


def places_of(joins: Tensor) -> Tensor:
    """Which token each one joins, `[B, N]`, itself if it stays -> its place among those that stay, in their order."""
    stays = joins == torch.arange(joins.shape[1])
    return (stays.cumsum(1) - 1).gather(1, joins)


PEERS: dict[str, Grouping] = {"ToMe": tome, "ATC": atc, "PiToMe": pitome}


def average(x: Tensor, size: Tensor, place: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Tokens `[B, N, C]` of sizes `[B, N]` to the average by sizes of each group, and the groups' sizes."""
    sizes = size.new_zeros(len(x), left).scatter_add_(1, place, size)
    index = place.unsqueeze(2).expand_as(x)
    sums = x.new_zeros(len(x), left, x.shape[2]).scatter_add_(1, index, x * size.unsqueeze(2))
    return sums / sizes.unsqueeze(2), sizes


def features(backbone: Any, x: Tensor, grouping: Grouping, counts: Sequence[int]) -> Tensor:
    """`VisionTransformer.forward_features` of timm with ``counts`` tokens merged in each block, copied back."""
    x = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(x)))
    size, whole = x.new_ones(x.shape[:2]), torch.arange(x.shape[1]).repeat(len(x), 1)
    for depth, (block, r) in enumerate(zip(backbone.blocks, counts, strict=True)):
        attention = block.attn
        batch, tokens, width = x.shape
        qkv = attention.qkv(block.norm1(x)).view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = attention.q_norm(qkv[0]), attention.k_norm(qkv[1]), qkv[2]
        heard = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[:, None, None])
        x = x + block.ls1(attention.proj(heard.transpose(1, 2).reshape(batch, tokens, width)))
        if r:
            place = grouping(k.mean(1), backbone.num_prefix_tokens, r, depth / len(counts))
            x, size = average(x, size, place, tokens - r)
            whole = place.gather(1, whole)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return backbone.norm(x).gather(1, whole.unsqueeze(2).expand(-1, -1, x.shape[2]))


@contextmanager
def merging(backbone: nn.Module, grouping: Grouping, counts: Sequence[int]) -> Iterator[None]:
    """Within it, ``backbone.forward_features`` merges."""
    backbone.forward_features = lambda x: features(backbone, x, grouping, counts)  # type: ignore[assignment]
    try:
        yield
    finally:
        del backbone.forward_features
