"""The table, padding, products, attention and convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.axes.harness import BARRIER, CARRIED, CAUTIOUS, SIZED, Row
from tests.axes.layouts import B, C, D, H, N, constant, copies
from tests.axes.rows import TABLE, along

aten: Any = torch.ops.aten
Function = Callable[[Tensor], Tensor]

PADS = [
    *[
        row
        for op, f in (("pad", F.pad), ("constant_pad_nd", aten.constant_pad_nd))
        for row in along(
            op, lambda x, d, f=f: f(x, [0, 0] * (3 - d) + [1, 2]), BARRIER, BARRIER, CARRIED, CARRIED, out="part"
        )
    ],
    Row("pad", "feature", CARRIED, lambda x: F.pad(x, (2, -2)), note="shifted"),
    Row("pad", "feature", CARRIED, lambda x: F.pad(x, (2, 1), "reflect"), out="b n k", note="reflected"),
    Row("pad", "token", BARRIER, lambda x: F.pad(x, (0, 0, 1, -1)), note="shifted"),
    Row("constant_pad_nd", "token", BARRIER, lambda x: aten.constant_pad_nd(x, [0, 0, -1, 1]), note="shifted"),
    Row("pad", "token", BARRIER, lambda x: F.pad(x, (1, 1), "circular"), "b c n", "b c k", note="circular"),
    Row("pad", "sample", BARRIER, lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))[:-1], note="and cut"),
    Row("pad", "sample", BARRIER, lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)), note="shifted"),
]

_MIX = torch.eye(B) + constant(B, B)


def _among(x: Tensor) -> Tensor:
    """Scores of ``[..., L, C]`` with each other."""
    return x @ x.transpose(-1, -2)


PRODUCTS = [
    Row("linear", "feature", CARRIED, lambda x: F.linear(x, constant(5, C), constant(5)), out="b n k"),
    Row("linear", "feature", CARRIED, lambda x: F.linear(x, constant(5, C)), "(b n) c", "(b n) k", note="merged dims"),
    Row("linear", "heads", CARRIED, lambda x: F.linear(x, constant(3, H)), "b n d h", "b n d k"),
    Row("linear", "token", BARRIER, lambda x: F.linear(x, constant(N, N)), "b c n"),
    Row("linear", "sample", BARRIER, lambda x: F.linear(x, _MIX), "n c b"),
    Row("matmul", "feature", CARRIED, lambda x: x @ constant(C, C)),
    Row("matmul", "feature", CARRIED, lambda x: x @ constant(C), out="b n", note="with a vector"),
    Row("matmul", "feature", CARRIED, lambda x: constant(C, C) @ x, "b c n", note="from the left"),
    Row("matmul", "heads", CARRIED, lambda x: constant(H, H) @ x, "b n h d"),
    Row("matmul", "token", BARRIER, lambda x: constant(N, N) @ x),
    Row("matmul", "token", BARRIER, lambda x: constant(N) @ x, out="b c", note="with a vector"),
    Row("matmul", "token", BARRIER, lambda x: x.mT @ x, "b n c", "b c k", note="gram matrix"),
    Row("matmul", "token", BARRIER, lambda x: _among(x), out="b n k", note="compared with each other"),
    Row("matmul", "sample", BARRIER, lambda x: _MIX @ x, "n b c"),
    Row("matmul", "sample", BARRIER, lambda x: (_MIX @ x.flatten(1)).view(x.shape), note="samples first"),
    Row("matmul", "sample", BARRIER, lambda x: _among(x), "n b c", "n b k", note="compared with each other"),
    Row("matmul", "sample", BARRIER, lambda x: x + (_among(x.transpose(0, 1)).softmax(-1) @ x.transpose(0, 1))
        .transpose(0, 1), note="attention over them"),
    Row("matmul", "heads", CARRIED, lambda x: _among(x).softmax(-1) @ x, "b n h d", note="attention over them"),
    Row("matmul", "sample", BARRIER, lambda x: x @ x[2].T, out="b n k", note="all with one"),
    Row("mm", "feature", CARRIED, lambda x: torch.mm(x, constant(C, C)), "(b n) c"),
    Row("mm", "heads", CARRIED, lambda x: torch.mm(x, constant(H, H)), "(b n d) h"),
    Row("addmm", "heads", CARRIED, lambda x: torch.addmm(constant(H), x, constant(H, H)), "(b n d) h"),
    Row("baddbmm", "heads", CARRIED, lambda x: torch.baddbmm(constant(D), x, constant(B * H, D, D)), "(b h) n d"),
    Row("mm", "token", BARRIER, lambda x: torch.mm(constant(B * N, B * N), x), "(b n) c"),
    Row("mm", "sample", BARRIER, lambda x: torch.mm(_MIX, x.flatten(1)).view(x.shape)),
    Row("bmm", "feature", CARRIED, lambda x: torch.bmm(x, constant(C, C).expand(B, C, C))),
    Row("bmm", "sample", CARRIED, lambda x: torch.bmm(x, constant(B, C, C)), note="a weight for each"),
    Row("bmm", "token", BARRIER, lambda x: torch.bmm(x.transpose(1, 2), x), out="b c k"),
    Row("bmm", "token", BARRIER, lambda x: torch.bmm(x, x.transpose(1, 2)), out="b n k", note="with each other"),
    Row("bmm", "sample", BARRIER, lambda x: torch.bmm(_MIX.expand(N, B, B), x), "n b c"),
    Row("bmm", "sample", BARRIER, lambda x: torch.bmm(x, x.transpose(1, 2)), "n b c", "n b k", note="with each other"),
    Row("bmm", "heads", CARRIED, lambda x: torch.bmm(x, constant(B * H, D, D)), "(b h) n d"),
    Row("addmm", "feature", CARRIED, lambda x: torch.addmm(constant(C), x, constant(C, C)), "(b n) c"),
    Row("addmm", "sample", BARRIER, lambda x: torch.addmm(x.flatten(1), _MIX, x.flatten(1)).view(x.shape)),
    Row("addmm", "token", BARRIER, lambda x: torch.addmm(constant(C), constant(5, B * N), x), "(b n) c", "k c"),
    Row("baddbmm", "feature", CARRIED, lambda x: torch.baddbmm(constant(1, 1, C), x, constant(B, C, C))),
    Row("baddbmm", "token", CARRIED, lambda x: torch.baddbmm(TABLE[None], x, constant(B, C, C)), placed=True,
        fewer=lambda x, s, r: TABLE[r] + x @ constant(B, C, C), note="added to by a table"),
    Row("baddbmm", "token", BARRIER, lambda x: torch.baddbmm(x, constant(N, N).expand(B, N, N), x)),
    Row("baddbmm", "sample", BARRIER, lambda x: torch.baddbmm(x, _MIX.expand(N, B, B), x), "n b c"),
    Row("baddbmm", "sample", BARRIER, lambda x: torch.baddbmm(x[:1], x, constant(B, C, C)), note="one added to each"),
]  # fmt: skip

_EINSUM: list[tuple[str, str, str, Tensor | None, str, str]] = [
    ("feature", CARRIED, "bnc,cd->bnd", constant(C, D), "b n c", "b n k"),
    ("feature", CARRIED, "bnc,bnc->bn", None, "b n c", "b n"),
    ("heads", CARRIED, "bhnd,hk->bknd", constant(H, H), "b h n d", "b k n d"),
    ("heads", CARRIED, "bhnd,hde->bhne", constant(H, D, D), "b h n d", "b h n k"),
    ("token", BARRIER, "bnc,nm->bmc", constant(N, N), "b n c", "b k c"),
    ("token", BARRIER, "bnc,bmc->bnm", None, "b n c", "b n k"),
    ("token", BARRIER, "bnc,bnd->bcd", None, "b n c", "b c k"),
    ("token", BARRIER, "bnc->bc", "alone", "b n c", "b c"),  # type: ignore[list-item]
    ("sample", BARRIER, "bnc,ab->anc", _MIX, "b n c", "b n c"),
    ("sample", BARRIER, "bnc,anc->ban", None, "b n c", "b k n"),
    ("sample", BARRIER, "bnc->nc", "alone", "b n c", "n c"),  # type: ignore[list-item]
    ("sample", CARRIED, "bnc,bcd->bnd", constant(B, C, D), "b n c", "b n k"),
    ("sample", CARRIED, "bnc->cnb", "alone", "b n c", "c n b"),  # type: ignore[list-item]
    ("feature", CAUTIOUS, "...c,cd->...d", constant(C, D), "b n c", "b n k"),
    ("feature", CAUTIOUS, "bnc,cd", constant(C, D), "b n c", "b k n"),
]


def _einsum(equation: str, other: Any) -> Function:
    if isinstance(other, str):
        return lambda x: torch.einsum(equation, x)
    return lambda x: torch.einsum(equation, x, x if other is None else other)


EINSUM = [
    Row("einsum", axis, verdict, _einsum(equation, other), layout, out, note=equation)
    for axis, verdict, equation, other, layout, out in _EINSUM
]


def _sdpa(x: Tensor, **more: Any) -> Tensor:
    return F.scaled_dot_product_attention(x, x * 0.5, x + 1, **more)


#: [B, 1, N, N]; of keys that are copies of each other the same, or they would be worth different things
BIAS = copies(constant(B, N, N)).transpose(1, 2)[:, None]


def _pairs_of(bias: Tensor, rows: Tensor) -> Tensor:
    """Rows and columns of a bias ``[B, 1, N, N]`` by the places of each sample's tokens, ``[B, 1, M, M]``."""
    return torch.stack([one[:, row][:, :, row] for one, row in zip(bias, rows, strict=True)])


ATTENTION = [
    Row("scaled_dot_product_attention", "token", SIZED, lambda x: _sdpa(x), "b h n d",
        fewer=lambda x, s, r: _sdpa(x, attn_mask=s.log()[:, None, None].expand(-1, 1, x.shape[2], -1))),
    Row("scaled_dot_product_attention", "token", SIZED, lambda x: _sdpa(x), "(b h) n d",
        fewer=lambda x, s, r: _sdpa(x, attn_mask=s.log().repeat_interleave(H, 0)[:, None].expand(-1, x.shape[1], -1)),
        note="merged heads"),
    Row("scaled_dot_product_attention", "token", SIZED, lambda x: _sdpa(x, attn_mask=BIAS), "b h n d",
        placed=True, note="with a bias of pairs",
        fewer=lambda x, s, r: _sdpa(x, attn_mask=s.log()[:, None, None] + _pairs_of(BIAS, r))),
    Row("scaled_dot_product_attention", "token", BARRIER, lambda x: _sdpa(x, is_causal=True), "b h n d", note="causal"),
    Row("scaled_dot_product_attention", "feature", BARRIER, lambda x: _sdpa(x), "b c n", note="channels"),
    Row("scaled_dot_product_attention", "feature", CARRIED, lambda x: _sdpa(x), "b n d h", note="of heads"),
    Row("scaled_dot_product_attention", "heads", CARRIED, lambda x: _sdpa(x), "b n h d"),
    Row("scaled_dot_product_attention", "sample", BARRIER, lambda x: _sdpa(x), "n b c"),
    Row("scaled_dot_product_attention", "sample", BARRIER,
        lambda x: F.scaled_dot_product_attention(x, x[:1].expand(B, -1, -1), x), note="keys of one"),
    Row("conv1d", "none", CARRIED, lambda x: F.conv1d(x[:, None], constant(2, 1, 3)), "(b n) c", "(b n) k l",
        note="merged dims are its batch"),
    Row("conv1d", "feature", CAUTIOUS, lambda x: F.conv1d(x, constant(C, C, 1)), "b c n", note="tokens are its places"),
    Row("conv1d", "token", BARRIER, lambda x: F.conv1d(x, constant(C, C, 3), padding=1), "b c n"),
    Row("conv1d", "token", BARRIER, lambda x: F.conv1d(x, constant(5, N, 1)), out="b k c", note="as channels"),
    Row("conv1d", "sample", BARRIER, lambda x: F.conv1d(x, constant(B, B, 1)), "n b c"),
    Row("conv1d", "sample", BARRIER, lambda x: F.conv1d(x, constant(C, C, 3), padding=1), "n c b", note="places"),
    Row("conv1d", "sample", CAUTIOUS, lambda x: F.conv1d(x, constant(B, 1, 3), padding=1, groups=B), "n b c",
        note="as groups"),
    Row("conv2d", "token", BARRIER, lambda x: F.conv2d(x.unflatten(-1, (4, 4)), constant(C, C, 3, 3)), "b c n",
        "b c k l"),
    Row("conv2d", "none", CARRIED, lambda x: F.conv2d(x.view(-1, 1, H, D), constant(3, 1, 2, 2)), "(b n) c",
        "(b n) k l m"),
    Row("conv3d", "none", CARRIED, lambda x: F.conv3d(x.view(-1, 1, 1, H, D), constant(3, 1, 1, 2, 2)), "(b n) c",
        "(b n) k l m o"),
    Row("conv3d", "sample", BARRIER, lambda x: F.conv3d(x[None, :, None], constant(B, B, 1, 1, 1))[0, :, 0]),
    Row("convolution", "none", CARRIED, lambda x: aten.convolution(x[:, None], constant(2, 1, 3), None, [1], [0], [1],
        False, [0], 1), "(b n) c", "(b n) k l"),
    Row("convolution", "sample", BARRIER, lambda x: aten.convolution(x, constant(B, B, 1), None, [1], [0], [1], False,
        [0], 1), "n b c"),
]  # fmt: skip
IMAGES = [
    Row("group_norm", "token", BARRIER, lambda x: F.group_norm(x, 2), "b c n"),
    Row("group_norm", "sample", BARRIER, lambda x: F.group_norm(x, 1), "n b c"),
    Row("group_norm", "feature", CARRIED, lambda x: F.group_norm(x, 2), "(b n) c"),
    Row("upsample_nearest2d", "token", BARRIER, lambda x: F.interpolate(x.unflatten(-1, (4, 4)), scale_factor=2.0),
        "b c n", "b c k l"),
    Row("upsample_bilinear2d", "none", CARRIED,
        lambda x: F.interpolate(x.view(-1, 1, H, D), scale_factor=2.0, mode="bilinear"), "(b n) c", "(b n) k l m"),
    Row("upsample_bicubic2d", "none", CARRIED,
        lambda x: F.interpolate(x.view(-1, 1, H, D), scale_factor=2.0, mode="bicubic"), "(b n) c", "(b n) k l m"),
    Row("avg_pool2d", "none", CARRIED, lambda x: F.avg_pool2d(x.view(-1, 1, H, D), 2), "(b n) c", "(b n) k l m"),
    Row("avg_pool2d", "sample", BARRIER, lambda x: F.avg_pool2d(x[None], 3, 1, 1)[0], "n b c"),
    Row("adaptive_avg_pool2d", "token", BARRIER, lambda x: F.adaptive_avg_pool2d(x.unflatten(-1, (4, 4)), 2), "b c n",
        "b c k l"),
    Row("pixel_shuffle", "token", BARRIER, lambda x: F.pixel_shuffle(x.unflatten(-1, (4, 4)), 2), "b c n", "b k l m"),
    Row("pixel_unshuffle", "none", CARRIED, lambda x: F.pixel_unshuffle(x.view(-1, 1, H, D), 2), "(b n) c",
        "(b n) k l m"),
]  # fmt: skip
