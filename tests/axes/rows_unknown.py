"""The table, ops that no rule knows: barriers along every axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.axes.harness import BARRIER, CAUTIOUS, Row
from tests.axes.layouts import B, C, constant
from tests.axes.rows import along, part

_MIX = torch.eye(B) + constant(B, B)


def _index(x: Tensor, d: int) -> Tensor:
    return x.index_select(d, torch.arange(x.shape[d]).flip(0))


_UNKNOWN: dict[str, Callable[[Tensor, int], Tensor]] = {
    "flip": lambda x, d: x.flip(d),
    "roll": lambda x, d: x.roll(1, d),
    "cumsum": lambda x, d: x.cumsum(d),
    "cumprod": lambda x, d: x.cumprod(d),
    "logcumsumexp": lambda x, d: x.logcumsumexp(d),
    "sort": lambda x, d: x.sort(d).values,
    "topk": lambda x, d: x.topk(x.shape[d], d).values,
    "argsort": lambda x, d: x.argsort(stable=True, dim=d).float(),
    "index_select": _index,
    "gather": lambda x, d: x.gather(d, x.argsort(stable=True, dim=d)),
    "diff": lambda x, d: x.diff(dim=d, prepend=part(x, d, 0, 1)),
    "index_add": lambda x, d: x.index_add(d, torch.tensor([x.shape[d] // 2]), part(x, d, 0, 1)),
    "index_copy": lambda x, d: x.index_copy(d, torch.tensor([x.shape[d] // 2]), part(x, d, 0, 1)),
}
UNKNOWN = [
    *[row for op, f in _UNKNOWN.items() for row in along(
        op, f, BARRIER, BARRIER, CAUTIOUS, CAUTIOUS)],
    *along("max", lambda x, d: x.max(d).values, CAUTIOUS, BARRIER, CAUTIOUS, CAUTIOUS, out="gone"),
    *along("median", lambda x, d: x.median(d).values, BARRIER, BARRIER, CAUTIOUS, CAUTIOUS, out="gone"),
    *along("renorm", lambda x, d: x.renorm(2, d, 1.0), BARRIER, BARRIER, BARRIER, BARRIER),
    *along("unfold", lambda x, d: x.unfold(d, 2, 1), BARRIER, BARRIER, CAUTIOUS, CAUTIOUS, out="part and windows"),
    *along("argmax", lambda x, d: x.argmax(d).float(), BARRIER, BARRIER, CAUTIOUS, CAUTIOUS, out="gone"),
    Row("complex", "none", CAUTIOUS, lambda x: torch.complex(x, x * 2).abs()),
    Row("instance_norm", "token", BARRIER, lambda x: F.instance_norm(x), "b c n"),
    Row("index", "sample", BARRIER, lambda x: x[torch.arange(B).flip(0)]),
    Row("tensordot", "sample", BARRIER, lambda x: torch.tensordot(_MIX, x, 1)),
    Row("cdist", "sample", BARRIER, lambda x: torch.cdist(x, x), "n b c", "n b k"),
    Row("rot90", "sample", BARRIER, lambda x: x.rot90(2, (0, 2))),
    Row("addbmm", "sample", BARRIER, lambda x: torch.addbmm(constant(1, C), x, constant(B, C, C)), out="n c"),
    Row("avg_pool1d", "token", BARRIER, lambda x: F.avg_pool1d(x, 3, 1, 1), "b c n"),
    Row("upsample_linear1d", "token", BARRIER, lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"), "b c n",
        "b c k"),
]  # fmt: skip
