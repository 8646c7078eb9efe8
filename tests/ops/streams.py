"""Streams to reduce, whole and by hand, and the choice between the three implementations of the operators on CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from tofu_fx.ops import cpu, portable
from tofu_fx.ops.checks import check_one_reduction

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MERGING = ["mean", "mlerp"]


def stream(
    batch: int = 2, tokens: int = 17, channels: int = 5, features: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """A stream whose matching at r = 6 is far from every tie; x, metric, size."""
    generator = torch.Generator().manual_seed(batch * 1000 + tokens * 10 + channels)
    x = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64).to(dtype)
    metric = torch.randn(batch, tokens, features, generator=generator)
    size = torch.randint(1, 5, (batch, tokens), generator=generator).float()
    return x, metric, size


def along(*degrees: float) -> Tensor:
    """A metric [1, N, 2]: token i points at degrees[i]."""
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], dim=1).unsqueeze(0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bits: -0.0 is not 0.0, and NaN equals itself."""
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Run the operators in C++ ("cpp"; float32 only), on ATen ("aten") or as they are exported ("portable")."""
    if name == "portable":
        stand_ins = {"usable": lambda x: True, "fuse": portable.fuse_tokens, "merge": _checked_merge}
        with mock.patch.multiple(cpu, **stand_ins):
            yield
        return
    if name == "aten":
        with mock.patch.object(cpu, "usable", return_value=False):
            yield
        return
    if cpu.library() is None:
        pytest.skip("there is no C++ compiler, so the operators have one implementation only")
    yield


def _checked_merge(x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    """What is exported is called by graphs of ours only, and checks no values."""
    check_one_reduction("merge_groups", assignment, kept)
    return portable.merge_groups(x, size, assignment, kept, strategy)
