"""Models of torchvision and plain torch, and transformers as people write them by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import SwinTransformer

from tests.zoo.case import Case, images
from tests.zoo.handwritten import (
    DEPTH,
    DIM,
    HEADS,
    EinopsViT,
    EinsumAttention,
    Encoder,
    GroupedQueryAttention,
    MultiheadAttention,
    Plain,
    mlp,
)
from tests.zoo.masked import are_there
from tests.zoo.odd import Causal
from tests.zoo.vision import TORCHVISION

N, WIDTH = 24, DIM // HEADS
PATCH = 8


def _rows(*lengths: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """One sequence of ready tokens ``[2, length, DIM]`` for each length."""
    return lambda generator: tuple(torch.randn(2, length, DIM, generator=generator) for length in lengths or (N,))


def _padded(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (*_rows()(generator), ~are_there([N, N - 7]))


def _plain(attention: Callable[[], nn.Module], sites: int = DEPTH, **facts: Any) -> Case:
    return Case(lambda: Plain(attention), _rows(), sites=sites, **facts)


class FastPath(nn.Module):
    """A model called with PyTorch's fused inference path on or off."""

    def __init__(self, inside: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.inside, self.enabled = inside, enabled

    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any) -> Any:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(self.enabled)
        try:
            return self.inside(*args)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


class PaddedEncoder(Encoder):
    """nn.TransformerEncoder with ``src_key_padding_mask`` (true where a token is padding)."""

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])


def _encoder(batch_first: bool, norm_first: bool, fast: bool = False, **facts: Any) -> Case:
    make = lambda: FastPath(Encoder(batch_first, norm_first), fast)  # noqa: E731
    return Case(make, _rows(), **{"sites": DEPTH, **facts})


class TokensFirstAttention(nn.Module):
    """nn.MultiheadAttention as it is by default: tokens first. ``kwargs`` are its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attention(x, x, x, need_weights=False)[0].transpose(0, 1)


class Attention(nn.Module):
    """Attention over ``[B, N, DIM]``; what others do otherwise they override. Keys may come from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            proj(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for proj, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class FlexAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v)


class NormedAttention(Attention):
    """Queries and keys are normed head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)


class CosineAttention(Attention):
    """Queries and keys of length 1, with a learnt temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (scores * self.logit_scale.exp()).softmax(-1) @ v


class FusedGroupedQueryAttention(nn.Module):
    """Two query heads to a key head, by the fused op's own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, HEADS // 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class TalkingHeads(Attention):
    """Heads are mixed ahead of the softmax and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = (nn.Conv2d(HEADS, HEADS, 1, bias=False) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.before(q @ k.transpose(-2, -1) * WIDTH**-0.5)
        return self.behind(scores.softmax(-1)) @ v


class LinearTalkingHeads(Attention):
    """The same, with the heads moved to the end for a linear layer (CaiT). A bias adds to each token's weight."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.before, self.behind = (nn.Linear(HEADS, HEADS, bias) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)).mul(WIDTH**-0.5).permute(0, 2, 3, 1)
        weights = self.before(scores).permute(0, 3, 1, 2).softmax(-1).permute(0, 2, 3, 1)
        return self.behind(weights).permute(0, 3, 1, 2) @ v


class EinsumTalkingHeads(Attention):
    """The same, as einsums with a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = (nn.Parameter(torch.randn(HEADS, HEADS)) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * WIDTH**-0.5
        weights = torch.einsum("bhij,hg->bgij", scores, self.before).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhij,hg->bgij", weights, self.behind), v)


class FlooredWeights(Attention):
    """No weight is less than a floor: something is added after the softmax for each token that there is."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1) * WIDTH**-0.5).softmax(-1) + 0.01) @ v


class NullToken(Attention):
    """Every query may also attend to a learnt key that is no token."""

    def __init__(self) -> None:
        super().__init__()
        self.null_token = nn.Parameter(torch.randn(2, HEADS, 1, WIDTH))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        null_k, null_v = (part.expand(q.shape[0], -1, -1, -1) for part in self.null_token.unbind(0))
        return F.scaled_dot_product_attention(q, torch.cat([null_k, k], 2), torch.cat([null_v, v], 2))


class RotaryAttention(Attention):
    """Rotary positions in the style of x-transformers: angles made anew, halves turned."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frequencies = 100.0 ** -torch.arange(0, WIDTH, 2, device=q.device).div(WIDTH)
        angles = torch.einsum("i,j->ij", torch.arange(q.shape[2], device=q.device).float(), frequencies)
        angles = torch.cat([angles, angles], -1)
        return F.scaled_dot_product_attention(_turned(q, angles), _turned(k, angles), v)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-other, one], -1) * angles.sin()


class GatedMLP(nn.Module):
    """Two layers with a gate (GLU)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.up(x).chunk(2, -1)
        return self.down(x * F.silu(gate))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(
        self, attention: Callable[[], nn.Module] = Attention, feed_forward: Callable[[], nn.Module] = mlp
    ) -> None:
        super().__init__()
        self.attention, self.mlp = attention(), feed_forward()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class ParallelBlock(Block):
    """Attention and MLP of the same norm, added at once."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        return x + (self.attention(y) + self.mlp(y)) * self.norms[1].weight


class SandwichBlock(Block):
    """Each branch is normed ahead and after."""

    def __init__(self) -> None:
        super().__init__()
        self.behind = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.behind[0](self.attention(self.norms[0](x)))
        return x + self.behind[1](self.mlp(self.norms[1](x)))


class CrossBlock(Block):
    """A decoder's block: looks back at its own tokens, then at another sequence."""

    def __init__(self) -> None:
        super().__init__(Causal)
        self.cross, self.cross_norm = Attention(), nn.LayerNorm(DIM)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attention(self.norms[0](x))
        x = x + self.cross(self.cross_norm(x), context)
        return x + self.mlp(self.norms[1](x))


class Stack(nn.Module):
    """Blocks one after the other, then the mean of the tokens."""

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = DEPTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class LongSkips(Stack):
    """The second half of the blocks sees what went into the first half, concatenated (U-ViT)."""

    def __init__(self) -> None:
        super().__init__(depth=5)
        self.joins = nn.ModuleList(nn.Linear(2 * DIM, DIM) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.blocks[:2]:
            x = block(x)
            skips.append(x)
        x = self.blocks[2](x)
        for join, block in zip(self.joins, self.blocks[3:], strict=True):
            x = block(join(torch.cat([x, skips.pop()], -1)))
        return self.head(self.norm(x))


class TwoTowers(nn.Module):
    """Two sequences, each through blocks of its own; all pairs are compared (CLIP)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Stack(), Stack(depth=2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.normalize(self.one(x), dim=-1) @ F.normalize(self.other(y), dim=-1).T


class EncoderDecoder(nn.Module):
    """Blocks over one sequence, and a causal decoder that looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(DEPTH))
        self.decoder = nn.ModuleList(CrossBlock() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.encoder:
            x = block(x)
        x = self.norm(x)
        for block in self.decoder:
            y = block(y, x)
        return self.head(y)


class TorchTransformer(nn.Module):
    """nn.Transformer with a causal mask over the target."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Transformer(DIM, HEADS, DEPTH, 2, 2 * DIM, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        return self.inside(x, y, tgt_mask=mask, tgt_is_causal=True)


class DetectionTokens(Stack):
    """Learnt tokens after the others, which alone are read (YOLOS)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 6, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.tokens.expand(x.shape[0], -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -6:]))


class ModulatedBlock(Block):
    """Norms without weights, shifted, scaled and gated by a condition (adaLN)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate * self.attention(self.norms[0](x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.norms[1](x) * (1 + scale2) + shift2)


class Denoiser(nn.Module):
    """A small DiT: patches, modulated blocks, and patches put back as an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patchify, self.time = nn.Conv2d(4, DIM, 2, 2), nn.Sequential(nn.Linear(1, DIM), nn.SiLU())
        self.pos_embed = nn.Parameter(torch.randn(1, 36, DIM))
        self.blocks = nn.ModuleList(ModulatedBlock() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 16)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        condition = self.time(time[:, None])
        x = self.patchify(image).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, condition)
        x = self.head(self.norm(x)).reshape(-1, 6, 6, 2, 2, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, 4, 12, 12)


class Tied(Stack):
    """One block, called again and again."""

    def __init__(self) -> None:
        super().__init__(depth=1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(DEPTH):
            x = self.blocks[0](x)
        return self.head(self.norm(x).mean(1))


class Broken(Stack):
    """Blocks with a graph break among them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](x))
        torch._dynamo.graph_break()
        return self.head(self.norm(self.blocks[2](x)).mean(1))


class BrokenLoop(Stack):
    """A graph break within the loop over the blocks, so that each block is called through one shared graph."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return self.head(self.norm(x).mean(1))


def _noisy(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 12, 12, generator=generator), torch.rand(2, generator=generator)


def _swin() -> nn.Module:
    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], mlp_ratio=2, stochastic_depth_prob=0, num_classes=10)


def _maxvit() -> nn.Module:
    return MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10)


OTHER_CASES: dict[str, Case] = {
    "torchvision_vit": Case(TORCHVISION["torchvision_vit"].make, images(96), sites=DEPTH),
    "torchvision_swin": Case(_swin, images(64), declined=("residual stream", "see some others only") * 2),
    "torchvision_maxvit": Case(_maxvit, images(64), sites=4),
    "encoder_batch_first": _encoder(True, False),
    "encoder_tokens_first": _encoder(False, False),
    "encoder_pre_norm": _encoder(True, True),
    "encoder_tokens_first_pre_norm": _encoder(False, True),
    "encoder_padded": Case(lambda: FastPath(PaddedEncoder(True, False), False), _padded, sites=DEPTH),
    "encoder_fast_path": _encoder(True, False, fast=True, sites=0, declined=("fused inference path",) * DEPTH),
    "encoder_padded_fast_path": Case(
        lambda: FastPath(PaddedEncoder(True, False), True), _padded, declined=("fused inference path",) * DEPTH
    ),
    "torch_transformer": Case(
        lambda: FastPath(TorchTransformer(), False),
        _rows(N, 10),
        sites=DEPTH,
        declined=("causal", "different tokens") * 2,
    ),
    "multihead": _plain(lambda: TokensFirstAttention()),
    "multihead_weights": _plain(MultiheadAttention),
    "multihead_bias_kv": _plain(lambda: TokensFirstAttention(add_bias_kv=True)),
    "multihead_zero_attn": _plain(lambda: TokensFirstAttention(add_zero_attn=True)),
    "flex_attention": _plain(FlexAttention, 0, reason="flex_attention"),
    "einops_class": Case(partial(EinopsViT, "class"), images(48), sites=DEPTH),
    "einops_mean": Case(partial(EinopsViT, "mean"), images(48), sites=DEPTH),
    "einsum": _plain(EinsumAttention),
    "x_transformers": Case(lambda: Stack(partial(Block, RotaryAttention, GatedMLP)), _rows(), sites=DEPTH),
    "parallel_block": Case(
        lambda: Stack(ParallelBlock), _rows(), sites=DEPTH - 1, declined=("nothing is computed on the tokens",)
    ),
    "sandwich_norm": Case(lambda: Stack(SandwichBlock), _rows(), sites=DEPTH),
    "qk_norm": _plain(NormedAttention),
    "cosine": _plain(CosineAttention),
    "grouped_query": _plain(GroupedQueryAttention),
    "grouped_query_fused": _plain(FusedGroupedQueryAttention),
    "talking_heads": _plain(TalkingHeads, 0, declined=("softmax",) * DEPTH),
    "talking_heads_linear": _plain(LinearTalkingHeads, 0, declined=("softmax",) * DEPTH),
    "talking_heads_linear_without_bias": _plain(partial(LinearTalkingHeads, bias=False)),
    "talking_heads_einsum": _plain(EinsumTalkingHeads, 0, declined=("aten.einsum",) * DEPTH),
    "floored_weights": _plain(FlooredWeights, 0, declined=("softmax",) * DEPTH),
    "null_token": _plain(NullToken),
    "causal": _plain(Causal, 0, declined=("causal",) * DEPTH),
    "long_skips": Case(LongSkips, _rows(), sites=5),
    "two_towers": Case(TwoTowers, _rows(N, 17), sites=DEPTH + 2),
    "encoder_decoder": Case(EncoderDecoder, _rows(N, 10), sites=DEPTH, declined=("causal", "different tokens") * 2),
    "detection_tokens": Case(DetectionTokens, _rows(), sites=DEPTH),
    "denoiser": Case(Denoiser, _noisy, sites=DEPTH),
    "tied": Case(Tied, _rows(), sites=DEPTH),
    "graph_break": Case(Broken, _rows(), sites=DEPTH),
    "graph_break_in_loop": Case(BrokenLoop, _rows(), sites=1),
}
