"""The ways in which people write transformers, as one small record."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

DIM, HEADS, WIDTH = 16, 2, 8


@dataclass(frozen=True)
class Spec:
    """How a `Transformer` is written. ``grid`` is the patches' height and width, ``depth`` the number of blocks."""

    layout: str = "BNC"  # "BNC", "NBC", "merged" (batch and tokens in one dim)
    norm: str = "pre"  # "pre", "post", "sandwich" (before and after each branch)
    parallel: str = "none"  # "none", "branches first": x + (attention + mlp), "one by one": (x + attention) + mlp
    fused_qkv: bool = True
    attention: str = "sdpa"  # "sdpa", "matmul", "mT", "einsum", "bmm", "baddbmm"
    # how scores become weights: "softmax"; the same by other ops: "shifted", "log", "by hand", "logsumexp"; less than
    # one in all: "plus one"; no attention: "queries", "squared", "threshold", "gated", "self masked", "slots"
    softmax: str = "softmax"
    addmm: bool = False  # projections by addmm over rows of all samples
    # "plain", "branch_scaled", "stream_scaled"; gates: "gated" (a scalar), "token gate", "pooled gate" (of all tokens)
    residual: str = "plain"
    layer_scale: bool = False
    dropout: bool = False
    qk_norm: bool = False
    # "none"; the last patches are padding: "additive", "finite", "bool", "where", and given with each input "padding",
    # "square" ([B, 1, N, N]); "relative" bias; "visible" (a buffer that hides nothing); "causal", "window"
    mask: str = "none"
    rotary: bool = False
    positions: str = "once"  # "none", "once", "every block" (added to the stream), "queries and keys" (in every block)
    prefix: int = 1
    suffix: int = 0
    pooling: str = "class"  # "class", "mean", "mean_patches", "max", "logsumexp", "tokens", "conv", "attention"
    skip: str = "none"  # "none", "concatenate", "add": the embedding again, ahead of the last block
    alias: str = "none"  # "none", "view_as", "detach", "clone", "identity", "contiguous", "slice": after each block
    reshape: str = "none"  # "none", "flatten", "features", "swap": there and back, after each block
    # after each block samples meet: "none", "centred", "first", "sample", "scaled", "maximum", "groups", "product",
    # "attention", "rolled"
    mixing: str = "none"
    in_place: bool = False
    dead_code: bool = False
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

    @property
    def token_dim(self) -> int:
        """The dim of the tokens in the stream (merged with the batch: that of both)."""
        return 1 if self.layout == "BNC" else 0

    @property
    def given_mask(self) -> bool:
        """Whether the mask is an input."""
        return self.mask in ("padding", "square")

    @property
    def tells_apart(self) -> bool:
        """Whether equal patches may come to differ, by their places or by a mask."""
        return self.positions != "none" or self.rotary or self.mask not in ("none", "visible")

    def tidy(self) -> Spec:
        """The nearest spec that can be built."""
        changes: dict[str, Any] = {}
        if self.pooling == "class" and not self.prefix:
            changes["prefix"] = 1
        if self.suffix and self.pooling not in ("class", "tokens", "max"):
            changes["suffix"] = 0
        if self.softmax != "softmax" and self.attention == "sdpa":
            changes["attention"] = "matmul"
        if self.addmm and self.fused_qkv:
            changes["fused_qkv"] = False
        return replace(self, **changes) if changes else self


#: field -> the ways that are drawn; all that is not named here is True or False
WAYS: dict[str, tuple[Any, ...]] = {
    "pooling": ("class", "mean", "mean_patches", "max", "logsumexp", "tokens", "conv", "attention"),
    "depth": (1, 2, 3),
    "prefix": (0, 1, 2, 3, 4),
    "suffix": (0, 1, 2),
    "layout": ("BNC", "NBC", "merged"),
    "norm": ("pre", "post", "sandwich"),
    "parallel": ("none", "branches first", "one by one"),
    "attention": ("sdpa", "matmul", "mT", "einsum", "bmm", "baddbmm"),
    "softmax": (
        "softmax", "shifted", "log", "by hand", "logsumexp", "plus one", "queries", "squared", "threshold", "gated",
        "self masked", "slots",
    ),
    "residual": ("plain", "branch_scaled", "stream_scaled", "gated", "token gate", "pooled gate"),
    "mask": (
        "none", "additive", "finite", "bool", "where", "padding", "square", "relative", "visible", "causal", "window",
    ),
    "positions": ("once", "none", "every block", "queries and keys"),
    "skip": ("none", "concatenate", "add"),
    "alias": ("none", "view_as", "detach", "clone", "identity", "contiguous", "slice"),
    "reshape": ("none", "flatten", "features", "swap"),
    "mixing": (
        "none", "centred", "first", "sample", "scaled", "maximum", "groups", "product", "attention", "rolled",
    ),
    "grid": ((3, 4), (2, 5), (4, 4), (3, 3)),
}  # fmt: skip
WAYS.update({field.name: (False, True) for field in fields(Spec) if field.name not in WAYS})
#: what few models have: drawn more rarely, so that most of what is drawn can be reduced
ODD = ("softmax", "mixing", "mask", "positions", "residual")


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
