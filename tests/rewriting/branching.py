"""A hand-written transformer whose branches run on fewer tokens, and its reference in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracle.branches import Step

SIDE, DIM, HEADS, DEPTH = 6, 32, 2, 3
PATCHES, BATCH, TEXT, R = SIDE * SIDE, 2, 5, 18


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary position: `[B, H, N, D]` by angles `[N, D / 2]` (or `[B, 1, N, D / 2]`)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * table.cos() - b * table.sin(), a * table.sin() + b * table.cos()], -1)


class Attention(nn.Module):
    def __init__(self, tokens: int = 0) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.register_buffer("table", None)
        if tokens:
            places = torch.arange(tokens)[:, None] * torch.logspace(0, -1, DIM // HEADS // 2)
            self.table = places

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        return q, k, v

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.heads(h)
        if self.table is not None:
            q, k = rotate(q, self.table), rotate(k, self.table)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attend(attention: Attention, h: Tensor, step: Step) -> Tensor:
    """The same by hand on the tokens of a step: tables of those that stay, log(size) on the logits."""
    q, k, v = attention.heads(h)
    if attention.table is not None:
        q, k = (rotate(t, step.rows_of(attention.table)) for t in (q, k))
    scores = q @ k.transpose(-1, -2) * (DIM // HEADS) ** -0.5 + step.size.log()[:, None, None]
    return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block in one of several orders."""

    def __init__(self, kind: str = "pre", tokens: int = 0) -> None:
        super().__init__()
        self.kind, self.attention = kind, Attention(tokens)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "pre":
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        if self.kind == "post":
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        h = self.norm1(x)
        if self.kind == "parallel":
            return x + self.attention(h) + self.mlp(h)
        assert self.kind == "parallel, summed first"
        return x + (self.attention(h) + self.mlp(h))


class ViT(nn.Module):
    """Patches after ``prefix`` tokens of their own; what is returned is chosen by ``out``."""

    def __init__(
        self,
        kind: str = "pre",
        prefix: int = 0,
        rotary: bool = False,
        depth: int = DEPTH,
        side: int = SIDE,
        out: str = "all",
    ) -> None:
        super().__init__()
        self.embed, self.prefix, self.out = nn.Conv2d(3, DIM, 4, 4), prefix, out
        count = prefix + side * side
        self.lead_token = nn.Parameter(torch.zeros(1, prefix, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, count, DIM))
        self.blocks = nn.ModuleList(Block(kind, count if rotary else 0) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 48)

    def tokens(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        return torch.cat([self.lead_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed

    def forward(self, images: Tensor) -> Any:
        x, layers = self.tokens(images), []
        for block in self.blocks:
            x = block(x)
            layers.append(x)
        if self.out == "layers":
            return tuple(layers)
        x = self.norm(x)
        if self.out == "class":
            return self.head(x[:, 0])
        if self.out == "image":
            return F.pixel_shuffle(self.head(x).transpose(1, 2).unflatten(2, (SIDE, SIDE)), 4)
        return x


def images(batch: int = BATCH, side: int = SIDE, seed: int = 7) -> Tensor:
    """Noise; the seeds are such that no decision of the reference is too close to rounding."""
    return torch.randn(batch, 3, 4 * side, 4 * side, generator=torch.Generator().manual_seed(seed))


def reference(
    model: ViT, x: Tensor, branches: Sequence[str] = ("attention",), r: int = R, strategy: str = "mean",
    reuse: str = "block",
) -> list[Tensor]:  # fmt: skip
    """The residual stream after each block, with each block's branches on merged tokens."""
    x, found = model.tokens(x), []
    step: Step | None = None
    for block in model.blocks:
        h = x if block.kind == "post" else block.norm1(x)
        if step is None or reuse != "resolution":
            step = Step.of(h, r, model.prefix, SIDE, strategy)
        attended = step.back(attend(block.attention, step.merge(h), step))

        def fed(h: Tensor, block: Any = block, own: Step = step) -> Tensor:
            if "mlp" not in branches:
                return block.mlp(h)
            if reuse == "none":
                own = Step.of(h, r, model.prefix, SIDE, strategy)
            return own.back(block.mlp(own.merge(h)))

        if block.kind == "pre":
            x = x + attended
            x = x + fed(block.norm2(x))
        elif block.kind == "post":
            x = block.norm1(x + attended)
            x = block.norm2(x + fed(x))
        else:
            x = x + (attended + fed(h))
        found.append(x)
    return found


MODELS: dict[str, Callable[[], ViT]] = {
    "pre-norm": ViT,
    "class token": lambda: ViT(prefix=1),
    "registers": lambda: ViT(prefix=5),
    "rotary": lambda: ViT(rotary=True),
    "rotary, class token": lambda: ViT(prefix=1, rotary=True),
    "post-norm": lambda: ViT("post"),
    "parallel": lambda: ViT("parallel"),
    "parallel, summed first": lambda: ViT("parallel, summed first"),
}
BRANCHES = {"attention": ["attention"], "both": ["attention", "mlp"]}


def branch(ratio: float = 0.5, **options: Any) -> dict[str, Any]:
    return {"placement": "branch", "ratio": ratio, **options}


class Ready(nn.Module):
    """Tokens come in flattened, as Flux gets them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(DEPTH)), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
