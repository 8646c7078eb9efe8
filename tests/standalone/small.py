"""A model of two blocks, and how it is reduced."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

OPTIONS: dict[str, Any] = {"r": 2, "strategy": "mlerp", "profitable_only": False, "inner_backend": "eager"}


class Block(nn.Module):
    """Attention and MLP on `[B, N, 32]`, with a dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.dropout(self.mlp(x))


class Model(nn.Module):
    """Two blocks; the mean of the tokens is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x.mean(1)
