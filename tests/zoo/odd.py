"""Models with something in them that tokens cannot pass, or that a rewrite could get wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.handwritten import DEPTH, DIM, HEADS, EinsumAttention, Plain


class Between(nn.Module):
    """A model with something of one's own between its blocks."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.inside, self.between = Plain(EinsumAttention), between

    def forward(self, x: Tensor) -> Tensor:
        m = self.inside
        for i in range(DEPTH):
            x = x + m.attentions[i](m.norms[2 * i](x))
            x = x + m.mlps[i](m.norms[2 * i + 1](x))
            x = self.between(x)
        return m.head(x.mean(1))


@torch.library.custom_op("tofu_tests::reverse_tokens", mutates_args=())
def reverse_tokens(x: Tensor) -> Tensor:
    """An op that the compiler has never heard of, which needs the tokens in their places."""
    return x.flip(1)


reverse_tokens.register_fake(torch.empty_like)


class Halved(torch.autograd.Function):
    """A gradient of one's own, which inlining would lose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


class Causal(nn.Module):
    """Attention that looks back only."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Weights(Plain):
    """Returns the attention weights of its second block, as interpretability code asks for."""

    def __init__(self) -> None:
        super().__init__(EinsumAttention)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = []
        for i in range(DEPTH):
            y, m = self.norms[2 * i](x), self.attentions[i]
            q, k, v = (proj(y).unflatten(-1, (HEADS, -1)) for proj in (m.q, m.k, m.v))
            weights.append(torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1))
            x = x + m.out(torch.einsum("bhqk,bkhd->bqhd", weights[-1], v).flatten(2))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(1)), weights[1]


class JoinedLate(nn.Module):
    """Another learnt token joins between the blocks, as in deep prompt tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.token = Plain(EinsumAttention), nn.Parameter(torch.ones(1, 1, DIM))

    def forward(self, x: Tensor) -> Tensor:
        m = self.inside
        for i in range(DEPTH):
            if i == 1:
                x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
            x = x + m.attentions[i](m.norms[2 * i](x))
            x = x + m.mlps[i](m.norms[2 * i + 1](x))
        return m.head(x.mean(1))
