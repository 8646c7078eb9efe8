"""The ways in which people write transformers, as one small record."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

DIM, HEADS, WIDTH = 16, 2, 8


@dataclass(frozen=True)
class Spec:
    """How a `Transformer` is written. ``grid`` is the patches' height and width, ``depth`` the number of blocks."""

    layout: str = "BNC"  # "BNC", "NBC", "merged" (batch and tokens in one dim)
    norm: str = "pre"  # "pre", "post", "sandwich" (before and behind each branch)
    parallel: str = "none"  # "none", "branches first": x + (attention + mlp), "one by one": (x + attention) + mlp
    fused_qkv: bool = True
    attention: str = "sdpa"  # "sdpa", "matmul", "einsum", "bmm"
    residual: str = "plain"  # "plain", "branch_scaled", "stream_scaled"
    layer_scale: bool = False
    dropout: bool = False
    qk_norm: bool = False
    # "none"; the last patches are padding: "additive", "bool", and "padding" (given with each input); "relative" bias
    mask: str = "none"
    rotary: bool = False
    positions: str = "once"  # "once", "every block" (added to the stream), "queries and keys" (in every block)
    prefix: int = 1
    suffix: int = 0
    pooling: str = "class"  # "class", "mean", "mean_patches", "max", "tokens", "conv", "attention"
    skip: str = "none"  # "none", "concatenate", "add": the embedding again, ahead of the last block
    alias: str = "none"  # "none", "view_as", "detach", "clone", "identity", "contiguous", "slice": behind each block
    reshape: str = "none"  # "none", "flatten", "features", "swap": there and back, behind each block
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
