"""The small models that faults are proved on. Imported in a process of its own, with the package that has the fault."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tofu_fx
from tofu_fx.testing import Spec, Transformer, prove, randomise

STREAM: dict[str, Any] = {"placement": "stream"}


class Block(nn.Module):
    """Attention and MLP around a stream ``[B, N, 16]``."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Between(nn.Module):
    """Two blocks with an op of the stream between them."""

    def __init__(self, op: Callable[[Tensor], Tensor], causal: bool = False) -> None:
        super().__init__()
        self.op, self.cls, self.head = op, nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 5)
        self.first, self.second = Block(causal), Block(causal)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.second(self.op(self.first(x))).mean(1))


class Replaced(Between):
    """A stream that is normed between two blocks, so that what it was before is no part of it; every token is read."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.op(self.first(x))))


class BiasedByPairs(nn.Module):
    """Scores with what each query finds in a table of all pairs, made of the input: its keys' axis is no token axis."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """From ``[B, N, 16]`` to ``[B, 16]``."""
        pairs = (x[:, :, None, :8] - x[:, None, :, :8]).sin()
        for qkv in self.qkv:
            query, key, value = qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            scores = query @ key.mT + torch.einsum("bhid,bijd->bhij", query, pairs)
            x = x + (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return x.mean(1)


def _view_in_place(x: Tensor) -> Tensor:
    """Something is read through a view from before it is changed in place."""
    x = x * 1.0
    seen = x.transpose(1, 2)
    x.mul_(0.5)
    return x + seen.transpose(1, 2).tanh()


@dataclass(frozen=True)
class Tried:
    """A model, the options of `prove`, and at how many attentions tokens must be reduced."""

    of: Spec | Callable[[], nn.Module]
    sites: int = 2
    options: Any = None
    r: int = 2
    dtype: torch.dtype = torch.float32


DEEP = {"depth": 3, "grid": (4, 4)}
MODELS: dict[str, Tried] = {
    "mean": Tried(Spec(pooling="mean")),
    "maximum": Tried(Spec(pooling="max")),
    "patches": Tried(Spec(pooling="mean_patches", prefix=3)),
    "registers": Tried(Spec(pooling="mean", prefix=4)),
    "suffix": Tried(Spec(pooling="tokens", prefix=1, suffix=2)),
    "deep": Tried(Spec(pooling="mean", **DEEP), 3, r=3),  # type: ignore[arg-type]
    "NBC": Tried(Spec(layout="NBC", attention="einsum", pooling="mean")),
    "tokens": Tried(Spec(pooling="tokens")),
    "relative": Tried(Spec(mask="relative", attention="matmul", pooling="mean")),
    "bmm": Tried(Spec(attention="bmm", mask="relative", pooling="mean")),
    "relative fused": Tried(Spec(mask="relative", pooling="mean")),
    "rotary": Tried(Spec(rotary=True, prefix=1, suffix=1, pooling="tokens", **DEEP), 3),  # type: ignore[arg-type]
    "places": Tried(Spec(positions="queries and keys", pooling="mean", **DEEP), 3),  # type: ignore[arg-type]
    "padding": Tried(Spec(mask="padding", pooling="class")),
    "bool": Tried(Spec(mask="bool", pooling="class")),
    "finite": Tried(Spec(mask="finite", pooling="class", attention="matmul")),
    "finite padding": Tried(Spec(mask="finite", pooling="class")),
    "window": Tried(Spec(mask="window", pooling="mean"), 0),
    "causal": Tried(Spec(mask="causal", pooling="mean"), 0),
    "skip": Tried(Spec(skip="concatenate", pooling="mean", **DEEP), 3),  # type: ignore[arg-type]
    "post": Tried(Spec(norm="post", pooling="mean")),
    "replaced": Tried(Replaced),
    "post tokens": Tried(Spec(norm="post", pooling="tokens")),
    "pairs": Tried(BiasedByPairs),
    "queries and keys": Tried(Spec(pooling="mean"), options={"match": "queries_keys", **STREAM}),
    "double": Tried(Spec(pooling="tokens", **DEEP), 3, dtype=torch.float64),  # type: ignore[arg-type]
    "image": Tried(
        Spec(pooling="tokens", prefix=0, grid=(3, 4)), options={"placement": "branch", "grid": (3, 4), "cell": 2}
    ),
    "variance": Tried(lambda: Between(lambda x: x / (1 + x.var(1, keepdim=True)))),
    "softmax": Tried(lambda: Between(lambda x: x + x.softmax(1))),
    "views in place": Tried(lambda: Between(_view_in_place), 1),
    "rolled": Tried(lambda: Between(lambda x: torch.cat([x[:, 5:], x[:, :5]], 1))),
    "causal flag": Tried(lambda: Between(lambda x: x, causal=True), 0),
}


def seen(names: list[str], folder: str) -> str:
    """What `prove` finds wrong with the first of the models that it finds something wrong with."""
    assert str(tofu_fx.__file__).startswith(folder), f"{tofu_fx.__file__} was imported, not the copy in {folder}"
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    warnings.simplefilter("ignore")
    for name in names:
        found = _seen(MODELS[name])
        if found:
            return f"{name}: {found}"
    return ""


def _seen(tried: Tried) -> str:
    torch.manual_seed(0)
    if isinstance(tried.of, Spec):
        model: Any = Transformer(tried.of)
        inputs = model.example_inputs()
    else:
        model, inputs = tried.of(), (torch.randn(3, 12, 16),)
    model = randomise(model).to(tried.dtype)
    inputs = tuple(value.to(tried.dtype) if value.is_floating_point() else value for value in inputs)
    try:
        proofs = prove(model, *inputs, r=tried.r, options=tried.options or STREAM)
    except Exception as error:  # noqa: BLE001 - a fault may make anything fail; here that is what is looked for
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    if proofs.failures:
        return proofs.failures[0]
    if len(proofs.matched) != tried.sites:
        return f"idle: {len(proofs.matched)} sites are reduced, not {tried.sites}"
    return ""
