"""The table, ops that move, cut, normalise and sum: each op along each axis, with the verdict written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.axes.harness import BARRIER, CARRIED, CAUTIOUS, SIZED, Fewer, Row
from tests.axes.layouts import B, C, D, H, N, constant

aten: Any = torch.ops.aten
Along = Callable[[Tensor, int], Tensor]

#: in the layout "b h n d"
DIMS = {"sample": 0, "heads": 1, "token": 2, "feature": 3}
PART = {"sample": "k h n d", "heads": "b k n d", "token": "b h k d", "feature": "b h n k"}
GONE = {"sample": "h n d", "heads": "b n d", "token": "b h d", "feature": "b h n"}


def along(op: str, function: Along, *verdicts: str, out: str = "", fewer: Fewer | None = None) -> list[Row]:
    """A row for each axis of ``[B, H, N, D]``: the verdicts of token, sample, heads and feature.

    ``out`` "gone": the axis is reduced away; "part": what is left of it is no whole axis. ``fewer`` is for tokens.
    """
    rows = []
    for axis, verdict in zip(("token", "sample", "heads", "feature"), verdicts, strict=True):
        dim = DIMS[axis]
        result = {"gone": GONE[axis], "part": PART[axis], "part and windows": f"{PART[axis]} w"}.get(out, out)
        call = lambda x, dim=dim: function(x, dim)  # noqa: E731
        rows.append(Row(op, axis, verdict, call, "b h n d", result, fewer if axis == "token" else None))
    return rows


def swapped(parts: Any, dim: int) -> Tensor:
    """Parts of a tensor put together in the reverse order."""
    return torch.cat(list(parts)[::-1], dim)


def part(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """A range of a dim."""
    return aten.slice(x, dim, start, stop)


def class_token() -> Tensor:
    """One token more for each sample."""
    return constant(1, 1, C).expand(B, -1, -1)


def weights(x: Tensor, sizes: Tensor) -> Tensor:
    """Sizes of tokens beside ``[B, H, M, D]``."""
    return sizes[:, None, :, None]


TABLE, OWN, SAMPLE = constant(N, C), constant(B, N, C), constant(B, 1, C)
MATRIX = constant(N, N)

REDUCTIONS = [
    *along(
        "sum", lambda x, d: x.sum(d), SIZED, BARRIER, CARRIED, CARRIED, out="gone",
        fewer=lambda x, s, r: (x * weights(x, s)).sum(2),
    ),
    *along(
        "mean", lambda x, d: x.mean(d), SIZED, BARRIER, CARRIED, CARRIED, out="gone",
        fewer=lambda x, s, r: (x * weights(x, s)).sum(2) / N,
    ),
    *along("amax", lambda x, d: x.amax(d), CARRIED, BARRIER, CARRIED, CARRIED, out="gone"),
    *along("amin", lambda x, d: x.amin(d), CARRIED, BARRIER, CARRIED, CARRIED, out="gone"),
    *along("var", lambda x, d: x.var(d), BARRIER, BARRIER, CARRIED, CARRIED, out="gone"),
    *along("std", lambda x, d: x.std(d), BARRIER, BARRIER, CARRIED, CARRIED, out="gone"),
    *along(
        "linalg_vector_norm", lambda x, d: torch.linalg.vector_norm(x, dim=d), BARRIER, BARRIER, CARRIED, CARRIED,
        out="gone",
    ),
    *along("norm", lambda x, d: aten.norm.ScalarOpt_dim(x, 2, [d]), BARRIER, BARRIER, CARRIED, CARRIED, out="gone"),
    *along("prod", lambda x, d: x.prod(d), BARRIER, BARRIER, CARRIED, CARRIED, out="gone"),
    *along("logsumexp", lambda x, d: x.logsumexp(d), BARRIER, BARRIER, CARRIED, CARRIED, out="gone"),
    *along("any", lambda x, d: (x > 1).any(d), CAUTIOUS, BARRIER, CARRIED, CARRIED, out="gone"),
    *along("all", lambda x, d: (x > -1).all(d), CAUTIOUS, BARRIER, CARRIED, CARRIED, out="gone"),
    Row("mean", "sample", BARRIER, lambda x: x - x.mean(0), note="taken from each"),
    Row("mean", "sample", BARRIER, lambda x: x - x.mean((0, 2), keepdim=True), note="features too"),
    Row("mean", "sample", SIZED, lambda x: x - x.mean(), note="of all there is",
        fewer=lambda x, s, r: x - (x * s[:, :, None]).sum() / (B * N * C)),
    Row("amax", "sample", CARRIED, lambda x: x - x.amax(), note="of all there is"),
    Row("mean", "sample", BARRIER, lambda x: x.mean(1, keepdim=True), "n b c", "n k c", note="tokens first"),
    Row("mean", "sample", BARRIER, lambda x: x.mean(0), "(b n) c", "c", note="samples and tokens in one dim"),
    Row("mean", "token", SIZED, lambda x: x.mean(0), "n b c", "b c",
        lambda x, s, r: (x * s.T[:, :, None]).sum(0) / N, note="tokens first"),
    Row("mean", "token", SIZED, lambda x: x.mean((1, 2)), out="b",
        fewer=lambda x, s, r: (x * s[:, :, None]).sum((1, 2)) / N / C, note="features too"),
    Row("mean", "heads", CARRIED, lambda x: x.unflatten(0, (B, H)).mean(1), "(b h) n d", "b n d",
        note="beside samples"),
    Row("sum", "sample", BARRIER, lambda x: x + x.view(2, B // 2, N, C).sum(0).repeat(2, 1, 1), note="in two groups"),
    Row("sum", "sample", BARRIER, lambda x: x.sum(0), "(b h) n d", "n d", note="beside heads"),
    Row("sum", "heads", CARRIED, lambda x: x.unflatten(0, (H, B)).sum(0), "(h b) n d", "b n d",
        note="ahead of samples"),
    Row("sum", "feature", CARRIED, lambda x: x.sum(-1), "n b c", "n b", note="tokens first"),
    Row("var", "sample", BARRIER, lambda x: x / (1 + x.var(0)), note="divides each"),
    Row("amax", "sample", BARRIER, lambda x: x + x.amax(0), note="added to each"),
    Row("linalg_vector_norm", "sample", BARRIER, lambda x: F.normalize(x, dim=0), note="normalize"),
    Row("linalg_vector_norm", "feature", CARRIED, lambda x: F.normalize(x, dim=-1), note="normalize"),
]  # fmt: skip

SOFTMAX = [
    *along("softmax", lambda x, d: x.softmax(d), BARRIER, BARRIER, CARRIED, CARRIED),
    *along("_softmax", lambda x, d: aten._softmax(x, d, False), BARRIER, BARRIER, CARRIED, CARRIED),
    *along("log_softmax", lambda x, d: x.log_softmax(d), BARRIER, BARRIER, CARRIED, CARRIED),
    *along("_log_softmax", lambda x, d: aten._log_softmax(x, d, False), BARRIER, BARRIER, CARRIED, CARRIED),
    Row("softmax", "sample", BARRIER, lambda x: x.softmax(0), "(b n) c", note="samples and tokens in one dim"),
    Row("softmax", "sample", BARRIER, lambda x: x.softmax(1), "n (b h) d", note="beside heads"),
    Row("softmax", "feature", CARRIED, lambda x: x.softmax(-1), "(b n) c", note="samples and tokens in one dim"),
]

NORMS = [
    Row("layer_norm", "feature", CARRIED, lambda x: F.layer_norm(x, (C,), constant(C), constant(C))),
    Row("layer_norm", "feature", CARRIED, lambda x: F.layer_norm(x, (D,)), "(b h) n d", note="of heads"),
    Row("layer_norm", "heads", CARRIED, lambda x: F.layer_norm(x, (H, D)), "b n h d"),
    Row("layer_norm", "token", BARRIER, lambda x: F.layer_norm(x, (x.shape[-1],)), "b c n"),
    Row("layer_norm", "token", BARRIER, lambda x: F.layer_norm(x, x.shape[-2:]), "b n c", note="and features"),
    Row("layer_norm", "sample", BARRIER, lambda x: F.layer_norm(x, (B,)), "n c b"),
    Row("layer_norm", "sample", BARRIER, lambda x: F.layer_norm(x, (B, C)), "n b c", note="and features"),
    Row("layer_norm", "sample", BARRIER, lambda x: F.layer_norm(x, x.shape), note="all there is"),
    Row("rms_norm", "feature", CARRIED, lambda x: F.rms_norm(x, (C,), constant(C))),
    Row("rms_norm", "heads", CARRIED, lambda x: F.rms_norm(x, (H, D)), "b n h d"),
    Row("rms_norm", "token", BARRIER, lambda x: F.rms_norm(x, (x.shape[-1],)), "b c n"),
    Row("rms_norm", "sample", BARRIER, lambda x: F.rms_norm(x, (B, C)), "n b c"),
    Row("batch_norm", "feature", CARRIED, lambda x: F.batch_norm(x, constant(C), constant(C) ** 2 + 1), "b c n"),
    Row("batch_norm", "heads", CARRIED, lambda x: F.batch_norm(x, constant(H), constant(H) ** 2 + 1), "b h n d"),
    Row("batch_norm", "token", BARRIER, lambda x: F.batch_norm(x, constant(N), constant(N) ** 2 + 1)),
    Row("batch_norm", "sample", CARRIED, lambda x: F.batch_norm(x, constant(B), constant(B) ** 2 + 1), "n b c",
        note="in evaluation"),
    Row("batch_norm", "sample", BARRIER, lambda x: F.batch_norm(x, None, None, training=True), "b c n",
        note="in training"),
    Row("batch_norm", "sample", BARRIER, lambda x: F.batch_norm(x, None, None, training=True), "(b n) c",
        note="in training, samples and tokens in one dim"),
    Row("batch_norm", "token", BARRIER, lambda x: F.batch_norm(x, None, None, training=True), "n b c",
        note="in training"),
]  # fmt: skip


def _written(x: Tensor, d: int) -> Tensor:
    """The middle position of a dim written over the one ahead."""
    middle = x.shape[d] // 2
    return torch.slice_scatter(x, part(x, d, middle, middle + 1) * 2, d, middle - 1, middle)


CUTS = [
    *along("select", lambda x, d: x + x.select(d, x.shape[d] // 2).unsqueeze(d), BARRIER, BARRIER, CARRIED, CARRIED),
    Row("select", "token", CARRIED, lambda x: x[:, 0], out="b c", note="a protected one"),
    Row("select", "sample", BARRIER, lambda x: x[0], out="n c", note="alone"),
    Row("select", "sample", BARRIER, lambda x: x + x[0], note="added to each"),
    Row("select", "sample", BARRIER, lambda x: x[:, 1], "n b c", "n c", note="tokens first"),
    *along("slice", lambda x, d: swapped((part(x, d, 0, x.shape[d] // 2), part(x, d, x.shape[d] // 2, x.shape[d])), d),
           BARRIER, BARRIER, CARRIED, CARRIED),
    Row("slice", "token", BARRIER, lambda x: x[:, 4:9], out="b k c", note="some"),
    Row("slice", "token", BARRIER, lambda x: x[:, ::2], out="b k c", note="every second"),
    Row("slice", "token", CARRIED, lambda x: x[:, :1], out="b k c", note="a protected one"),
    Row("slice", "token", CARRIED, lambda x: aten.slice(x, 1, 0, 2**63 - 1), note="all"),
    Row("slice", "sample", BARRIER, lambda x: x + x[:1], note="one added to each"),
    Row("slice", "sample", BARRIER, lambda x: x[:1], out="k n c", note="one"),
    Row("slice", "sample", BARRIER, lambda x: x + x[:1].expand(B, -1, -1), note="one expanded to all"),
    Row("slice", "sample", BARRIER, lambda x: x[:2], out="k n c", note="two"),
    Row("slice", "sample", BARRIER, lambda x: torch.cat((x[::2], x[1::2])), note="every second"),
    Row("slice", "sample", CARRIED, lambda x: aten.slice(x, 0, 0, 2**63 - 1), note="all"),
    Row("slice", "feature", CARRIED, lambda x: x[..., 1:7:2], out="b n k", note="every second"),
    *along("slice_scatter", _written, BARRIER, BARRIER, CARRIED, CARRIED),
    Row("slice_scatter", "sample", BARRIER, lambda x: torch.slice_scatter(x, constant(2, N, C), 0, 2, 4),
        note="two by a table"),
    *along("split", lambda x, d: swapped(x.split(x.shape[d] // 2, d), d), BARRIER, BARRIER, CARRIED, CARRIED),
    *along("chunk", lambda x, d: swapped(x.chunk(2, d), d), BARRIER, BARRIER, CARRIED, CARRIED),
    *along("split_with_sizes", lambda x, d: swapped(x.split([1, x.shape[d] - 1], d), d),
           BARRIER, BARRIER, CARRIED, CARRIED),
    *along("tensor_split", lambda x, d: swapped(x.tensor_split(2, d), d), BARRIER, BARRIER, CARRIED, CARRIED),
    *along("getitem", lambda x, d: x.chunk(2, d)[0] - x.chunk(2, d)[1], BARRIER, BARRIER, CARRIED, CARRIED, out="part"),
    *along("narrow", lambda x, d: x.narrow(d, x.shape[d] // 2, 1), BARRIER, BARRIER, CARRIED, CARRIED, out="part"),
    *along("unbind", lambda x, d: torch.stack(x.unbind(d)[::-1], d), BARRIER, BARRIER, CARRIED, CARRIED),
    Row("chunk", "sample", BARRIER, lambda x: swapped(x.chunk(2, 0), 0), "(b h) n d", note="beside heads"),
    Row("chunk", "sample", BARRIER, lambda x: x.chunk(2)[0] - x.chunk(2)[1], out="k n c", note="halves compared"),
    Row("chunk", "heads", CAUTIOUS, lambda x: swapped(x.chunk(2, 0), 0), "(h b) n d", note="ahead of samples"),
    Row("split_with_sizes", "token", CARRIED, lambda x: torch.cat((class_token(), x), 1).split([1, x.shape[1]], 1)[1],
        note="after a class token"),
    Row("split", "token", CARRIED, lambda x: x.split(N, 1)[0] * 2, note="all"),
    Row("chunk", "sample", CARRIED, lambda x: x.chunk(1, 0)[0] * 2, note="all"),
    Row("split_with_sizes", "feature", CARRIED, lambda x: swapped(x.split([3, 5], -1), -1), "(b n) c",
        note="merged dims"),
]  # fmt: skip

_CATS: dict[str, Callable[..., Tensor]] = {"cat": torch.cat, "concat": torch.concat, "concatenate": torch.concatenate}
JOINS = [
    *[row for op, f in _CATS.items() for row in along(
        op, lambda x, d, f=f: part(f((x, -x), d), d, x.shape[d] // 2, x.shape[d] // 2 + x.shape[d]),
        BARRIER, BARRIER, CARRIED, CARRIED)],
    Row("cat", "token", CARRIED, lambda x: torch.cat((class_token(), x), 1)[:, 1:],
        note="after a class token"),
    Row("cat", "token", CAUTIOUS, lambda x: torch.cat((x, x), 1), out="b (k n) c", note="twice"),
    Row("cat", "sample", BARRIER, lambda x: torch.cat((x[2:], x[:2])), note="in another order"),
    Row("cat", "sample", CAUTIOUS, lambda x: torch.cat((x, -x)), out="(k b) n c", note="two of each"),
    Row("stack", "sample", BARRIER, lambda x: torch.stack([x[i] for i in range(B)][::-1]), note="of slices"),
    *[Row("stack", "none", CARRIED, lambda x, d=d: torch.stack((x, x * 2), d), out=out, note=f"a new dim {d}")
      for d, out in enumerate(("k b n c", "b k n c", "b n k c", "b n c k"))],
    *[Row(op, "none", CARRIED, f, out="k b n c", note="a new dim") for op, f in {
        "expand": lambda x: x.expand(2, -1, -1, -1), "broadcast_to": lambda x: x.broadcast_to((2, *x.shape)),
        "expand_as": lambda x: x.expand_as(torch.stack((x, x))), "repeat": lambda x: x.repeat(2, 1, 1, 1),
    }.items()],
    Row("expand", "sample", BARRIER, lambda x: x[2:3].expand(B, -1, -1), note="one for all"),
    Row("expand_as", "sample", BARRIER, lambda x: x[2:3].expand_as(x), note="one for all"),
    Row("expand_as", "token", CAUTIOUS, lambda x: x[:, :1].expand_as(x) + x, note="a protected one for all"),
    Row("broadcast_to", "sample", BARRIER, lambda x: x[2:3].broadcast_to(x.shape), note="one for all"),
    Row("repeat", "feature", CARRIED, lambda x: x.repeat(1, 1, 2), out="b n k"),
    Row("repeat", "token", CAUTIOUS, lambda x: x.repeat(1, 2, 1), out="b (k n) c"),
    Row("repeat", "sample", CAUTIOUS, lambda x: x.repeat(2, 1, 1), out="(k b) n c"),
    Row("repeat", "heads", CARRIED, lambda x: x.repeat(1, 2, 1, 1), "b h n d", "b k n d"),
]  # fmt: skip

#: a tensor in a shape; what a shape is taken from is made from the tensor itself
_SHAPED: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "view": lambda x, shape: x.view(shape),
    "reshape": lambda x, shape: x.reshape(shape),
    "_unsafe_view": lambda x, shape: aten._unsafe_view(x, shape),
    "view_as": lambda x, shape: x.view_as(x.view(shape)),
    "reshape_as": lambda x, shape: x.reshape_as(x.view(shape)),
}


def _viewed(op: str, to: Callable[[Tensor, list[int]], Tensor]) -> list[Row]:
    """A view that splits each axis; those of samples and tokens side by side come first."""
    return [
        Row(op, "token", BARRIER, lambda x: to(x, [B, 4, 4, C]), out="b k l c", note="into a grid"),
        Row(op, "sample", CARRIED, lambda x: to(x, [2, B // 2, *x.shape[1:]]).flatten(0, 1), note="split and joined"),
        Row(op, "heads", CARRIED, lambda x: to(x, [*x.shape[:2], C]), "b n h d", "b n c"),
        Row(op, "feature", CARRIED, lambda x: to(x, [*x.shape[:2], H, D]).transpose(2, 3), out="b n k l"),
    ]


VIEWS = [
    *[row for op, to in _SHAPED.items() for row in _viewed(op, to)],
    Row("reshape", "sample", CARRIED, lambda x: x.reshape(-1, C), out="(b n) c", note="with tokens"),
    Row("reshape", "token", BARRIER, lambda x: x.reshape(B, C, -1).transpose(1, 2), note="across features"),
    Row("reshape", "token", BARRIER, lambda x: x.reshape(2 * B, -1, C), out="k l c",
        note="into windows beside samples"),
    Row("reshape", "sample", BARRIER, lambda x: x.reshape(B, -1, C), "n b c", "k l c",
        note="tokens first, across samples"),
    Row("flatten", "feature", CARRIED, lambda x: x.flatten(2), "b n h d", "b n c"),
    *[Row("flatten", axis, CARRIED, lambda x: x.flatten(0, 1), "b h n d", "(b h) n d") for axis in ("sample", "heads")],
    Row("flatten", "token", CARRIED, lambda x: x.flatten(1).view(x.shape), note="with features and back"),
    Row("flatten", "token", BARRIER, lambda x: x.flatten(1).softmax(-1), out="b (n c)", note="with features"),
    *[Row("unflatten", axis, CARRIED, lambda x: x.unflatten(0, (B, H)).transpose(0, 1), "(b h) n d", "h b n d")
      for axis in ("sample", "heads")],
    Row("unflatten", "feature", CARRIED, lambda x: x.unflatten(-1, (H, D)).transpose(2, 3), out="b n k l"),
    Row("unflatten", "token", BARRIER, lambda x: x.unflatten(1, (4, -1)), out="b k l c", note="into a grid"),
    Row("unsqueeze", "none", CARRIED, lambda x: x.unsqueeze(1) * 2, out="b k n c"),
    Row("squeeze", "none", CARRIED, lambda x: x[..., None].squeeze(-1)),
]  # fmt: skip

#: the last two dims exchanged
_TURNS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(-2, -1), "swapaxes": lambda x: x.swapaxes(-2, -1), "mT": lambda x: x.mT,
    "swapdims": lambda x: x.swapdims(-1, -2), "mH": lambda x: x.mH, "adjoint": lambda x: x.adjoint(),
    "permute": lambda x: x.permute(*range(x.dim() - 2), x.dim() - 1, x.dim() - 2),
    "movedim": lambda x: x.movedim(-2, -1), "moveaxis": lambda x: x.moveaxis(-1, -2),
}  # fmt: skip
_FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda x: x.t(),
    "numpy_T": lambda x: x.T,
    "matrix_H": lambda x: x.H,
}
TURNS = [
    *[Row(op, axis, CARRIED, f, layout, out) for op, f in _TURNS.items() for axis, layout, out in (
        ("token", "b n c", "b c n"), ("sample", "n b c", "n c b"), ("heads", "b n h d", "b n d h"),
        ("feature", "b c n", "b n c"))],
    *[Row(op, axis, CARRIED, f, layout, out) for op, f in _FLAT.items() for axis, layout, out in (
        ("token", "(b n) c", "c (b n)"), ("sample", "(n b) c", "c (n b)"), ("heads", "(b n h) d", "d (b n h)"),
        ("feature", "c (b n)", "(b n) c"))],
    Row("transpose", "sample", CARRIED, lambda x: x.transpose(0, 1), out="n b c", note="with tokens"),
    Row("permute", "sample", CARRIED, lambda x: x.permute(2, 1, 0), out="c n b", note="last"),
    Row("movedim", "sample", CARRIED, lambda x: x.movedim(0, -1), out="n c b", note="last"),
    Row("movedim", "heads", CARRIED, lambda x: x.movedim((1, 2), (2, 1)), "b h n d", "b n h d", note="two"),
    Row("transpose", "heads", CARRIED, lambda x: x.transpose(1, 2), "b h n d", "b n h d", note="with tokens"),
]  # fmt: skip
