"""The table, ops that treat each number alone, with what they are broadcast with, and ops that make tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.axes.harness import BARRIER, CARRIED, Row
from tests.axes.layouts import B, C, D, H, N, constant
from tests.axes.rows import OWN, SAMPLE, TABLE

aten: Any = torch.ops.aten
Function = Callable[[Tensor], Tensor]

_ALONE: dict[str, Function] = {
    "dropout": lambda x: F.dropout(x, 0.5, False), "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, False),
    "feature_dropout": lambda x: aten.feature_dropout(x, 0.5, False), "to": lambda x: x.to(torch.float64),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "clone": lambda x: x.clone(), "alias": lambda x: aten.alias(x),
    "detach": lambda x: x.detach(), "_to_copy": lambda x: aten._to_copy(x, dtype=torch.float64),
    "lift_fresh": lambda x: aten.lift_fresh(x), "lift_fresh_copy": lambda x: aten.lift_fresh_copy(x),
    "zeros_like": torch.zeros_like, "ones_like": torch.ones_like, "full_like": lambda x: torch.full_like(x, 3.0),
    "empty_like": lambda x: torch.logical_and(torch.empty_like(x), torch.zeros_like(x)),
    "rand_like": lambda x: torch.rand_like(x) > 2,
    "randn_like": lambda x: torch.randn_like(x).isnan(), "bernoulli": lambda x: (x > 0).float().bernoulli(),
    "resolve_conj": lambda x: aten.resolve_conj(x), "resolve_neg": lambda x: aten.resolve_neg(x),
    "log_sigmoid": F.logsigmoid, "hardswish": lambda x: F.hardswish(x), "gelu": F.gelu, "relu": lambda x: F.relu(x),
    "silu": lambda x: F.silu(x), "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp, "neg": torch.neg,
    "abs": torch.abs, "sin": torch.sin, "clamp": lambda x: x.clamp(-1, 1), "elu": lambda x: F.elu(x),
    "softplus": F.softplus, "rsqrt": lambda x: (x * x + 1).rsqrt(), "pow": lambda x: x**2, "erf": torch.erf,
    "logical_not": torch.logical_not, "bitwise_not": lambda x: ~(x > 0),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.5), "round": torch.round,
    "rsub": lambda x: 1 - x, "isnan": torch.isnan, "nan_to_num": lambda x: x.nan_to_num(),
    "log1p": lambda x: x.abs().log1p(),
    "type_as": lambda x: x.type_as(constant(C).double()), "float_power": lambda x: x.abs().float_power(0.5),
    "copy": lambda x: aten.copy(torch.zeros_like(x), x), "_assert_tensor_metadata": lambda x: _asserted(x),
    "prelu": lambda x: F.prelu(x, constant(1)),
}  # fmt: skip


def _asserted(x: Tensor) -> Tensor:
    aten._assert_tensor_metadata(x, dtype=torch.float32)
    return -x


#: an elementwise op of two tensors
TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": lambda a, b: a / (b.abs() + 1),
    "multiply": torch.multiply, "divide": lambda a, b: torch.divide(a, b.abs() + 1), "maximum": torch.maximum,
    "where": lambda a, b: torch.where(b > 0, a, -a), "lerp": lambda a, b: torch.lerp(a, b, 0.3), "gt": torch.gt,
    "addcmul": lambda a, b: torch.addcmul(a, a, b), "pow": lambda a, b: (a.abs() + 1) ** b, "atan2": torch.atan2,
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 0.0), "clamp": lambda a, b: a.clamp(min=b),
    "logical_and": lambda a, b: (a > 0).logical_and(b > 0), "copy": lambda a, b: aten.copy(a, b),
}  # fmt: skip


def _with(op: str, f: Callable[[Tensor, Tensor], Tensor]) -> list[Row]:
    """An elementwise op with all kinds of operands."""
    per_token = lambda x, s, r: f(x, TABLE[r])  # noqa: E731
    own = lambda x, s, r: f(x, OWN.gather(1, r[:, :, None].expand(-1, -1, C)))  # noqa: E731
    return [
        Row(op, "none", CARRIED, lambda x: f(x, x * 0.5), note="with itself"),
        Row(op, "feature", CARRIED, lambda x: f(x, constant(C)), note="with a table of features"),
        Row(op, "token", CARRIED, lambda x: f(x, TABLE), fewer=per_token, placed=True, note="with a table of tokens"),
        Row(op, "token", CARRIED, lambda x: f(x, TABLE[None]), fewer=per_token, placed=True, note="with [1, N, C]"),
        Row(op, "sample", CARRIED, lambda x: f(x, OWN), fewer=own, placed=True, note="with [B, N, C]"),
        Row(op, "sample", CARRIED, lambda x: f(x, SAMPLE), note="with [B, 1, C]"),
        Row(op, "sample", CARRIED, lambda x: f(x, x.amax(1, keepdim=True)), note="with its own maximum"),
        Row(op, "sample", BARRIER, lambda x: f(x, x[:1]), note="with one of them"),
        Row(op, "sample", BARRIER, lambda x: f(x, x[2]), note="with one of them, selected"),
    ]


ELEMENTWISE = [
    *[Row(op, "none", CARRIED, f) for op, f in _ALONE.items()],
    # All kinds of operands with three ops; a table, values of its own and another sample's with the others.
    *[row for op, f in TWO.items() for i, row in enumerate(_with(op, f))
      if op in ("add", "mul", "where") or i in (0, 2, 4, 7)],
    Row("add", "token", CARRIED, lambda x: x + constant(N, 1), fewer=lambda x, s, r: x + constant(N, 1)[r], placed=True,
        note="with [N, 1]"),
    Row("add", "token", CARRIED, lambda x: x + TABLE.T, "b c n", fewer=lambda x, s, r: x + TABLE[r].transpose(1, 2),
        placed=True, note="with [C, N]"),
    Row("add", "token", CARRIED, lambda x: x + TABLE[:, None], "n b c",
        fewer=lambda x, s, r: x + TABLE[r].transpose(0, 1), placed=True, note="tokens first"),
    Row("mul", "token", CARRIED, lambda x: x * constant(N, D), "b h n d",
        fewer=lambda x, s, r: x * constant(N, D)[r][:, None], placed=True, note="heads with [N, D]"),
    Row("mul", "token", CARRIED, lambda x: x * constant(N, D), "(b h) n d",
        fewer=lambda x, s, r: x * constant(N, D)[r].repeat_interleave(H, 0), placed=True,
        note="merged heads with [N, D]"),
    Row("mul", "heads", CARRIED, lambda x: x * constant(H, 1, 1), "b h n d", note="with [H, 1, 1]"),
    Row("mul", "heads", CARRIED, lambda x: x * constant(B * H, 1, 1), "(b h) n d", note="merged, with [B H, 1, 1]"),
    Row("add", "sample", CARRIED, lambda x: x + constant(B, C), "n b c", note="tokens first, with [B, C]"),
    Row("add", "token", BARRIER, lambda x: x + OWN.reshape(B * N, C), "(b n) c", note="merged, with a table"),
    Row("sub", "token", BARRIER, lambda x: x[:, :, None] - x[:, None], out="b n k c", note="from each other"),
    Row("sub", "sample", BARRIER, lambda x: (x[:, None] - x[None]).abs().sum(1), note="from each other"),
    Row("sub", "sample", BARRIER, lambda x: x - x.transpose(0, 1).transpose(0, 1).flip(0), note="from the flipped"),
    Row("prelu", "feature", CARRIED, lambda x: F.prelu(x, constant(C)), "b c n", note="a weight for each"),
    Row("prelu", "token", BARRIER, lambda x: F.prelu(x, constant(N)), note="a weight for each"),
    Row("prelu", "token", BARRIER, lambda x: F.prelu(x, constant(N)), "c n b", note="a weight for each, samples last"),
    Row("detach_", "none", CARRIED, lambda x: x.clone().detach_()),
    Row("where", "sample", BARRIER, lambda x: torch.where(constant(B, 1, 1) > 0, x, x[:1]), note="one of them instead"),
    Row("masked_fill", "sample", CARRIED, lambda x: x.masked_fill(constant(B, 1, 1) > 0, 0.0), note="by [B, 1, 1]"),
]  # fmt: skip

COMPLEX = [
    Row("view_as_complex", "feature", CARRIED, lambda x: torch.view_as_complex(x.view(*x.shape[:2], 4, 2)).abs(),
        out="b n k"),
    Row("view_as_complex", "heads", CARRIED, lambda x: torch.view_as_complex(x.contiguous()).abs(), "b n d h", "b n d"),
    *[Row("view_as_complex", axis, BARRIER,
          lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()).abs(),
          layout, out) for axis, layout, out in (("token", "b c n", "b c k"), ("sample", "n c b", "n c k"))],
    *[Row("view_as_real", axis, CARRIED, lambda x: torch.view_as_real(x * (1 + 2j)), layout, f"{layout} k")
      for axis, layout in (("feature", "b n c"), ("token", "b c n"), ("sample", "n c b"), ("heads", "b n d h"))],
]  # fmt: skip

MADE = [
    *[Row(op, "none", CARRIED, f) for op, f in {
        "new_zeros": lambda x: x + x.new_zeros(C), "new_ones": lambda x: x + x.new_ones(1, C),
        "new_full": lambda x: x + x.new_full((1, 1, C), 2.0), "new_empty": lambda x: x + x.new_empty(C).isnan() * 0,
    }.items()],
    Row("new_ones", "token", CARRIED, lambda x: x * x.new_ones(N, 1), note="of their number",
        fewer=lambda x, s, r: x),
    Row("embedding", "none", CARRIED, lambda x: F.embedding((x[..., 0] > 0).long(), constant(2, C)),
        note="the tokens are indices"),
    Row("embedding", "token", BARRIER, lambda x: F.embedding(torch.arange(0, 84, 9), x.flatten(0, 1)), out="k c",
        note="the tokens are the table"),
    Row("embedding", "sample", BARRIER, lambda x: F.embedding(torch.arange(B).flip(0), x.flatten(1)).view(x.shape),
        note="the samples are the table"),
]  # fmt: skip
