"""Inputs that the model itself refuses are named; failures that are ours are not attributed to it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tofu_fx
from tofu_fx import CalibrationError
from tofu_fx.calibration.batches import Batch, read_batches
from tofu_fx.calibration.refusals import RefusedInput, describe, model_refusals

QUICK: dict[str, Any] = {"inner_backend": "eager", "progress": False}


class Picky(nn.Module):
    """Takes rows of eight, none of them all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        assert x.shape[-1] == 8
        if not bool(x.flatten(1).any(1).all()):
            raise ValueError("a row of zeros")
        return self.linear(x) * scale


def test_a_shape_that_the_model_asserts_against_is_its_own_refusal() -> None:
    with pytest.raises(CalibrationError) as caught:
        tofu_fx.calibrate(Picky(), torch.ones(2, 3, 9), **QUICK)
    for words in ("refuses batch 0", "float32 [2, 3, 9]", "its own error", "AssertionError"):
        assert words in str(caught.value)


@pytest.mark.parametrize("use", [tofu_fx.calibrate, tofu_fx.sweep])
def test_the_batch_that_is_refused_is_named_by_its_number(use: Any) -> None:
    batches = [torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.zeros(2, 3, 8)]
    model = nn.Sequential(Attending(), Picky()).eval()
    with pytest.raises(RefusedInput, match=re.escape("refuses batch 2 (float32 [2, 3, 8])")) as caught:
        use(model, batches, **QUICK, **({"flops": [0.8], "calibrated": False} if use is tofu_fx.sweep else {}))
    assert "ValueError: a row of zeros" in str(caught.value)


class Attending(nn.Module):
    """A block with an attention that keeps zeros zero."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mlp = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.mlp(x)


def test_a_split_batch_keeps_the_number_that_the_user_knows() -> None:
    batches = read_batches([torch.ones(5, 8), torch.ones(2, 8)], 2)
    assert [batch.number for batch in batches] == [0, 0, 0, 1]


def test_a_failure_that_the_plain_model_does_not_have_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="ours"), model_refusals(Picky(), Batch((torch.ones(1, 8),))):
        raise KeyError("ours")


def test_an_error_of_ours_is_not_put_down_to_the_model() -> None:
    with pytest.raises(CalibrationError, match="ours"), model_refusals(Picky(), Batch((torch.ones(1, 9),))):
        raise CalibrationError("ours")


def test_arguments_are_told_by_their_types_and_shapes() -> None:
    batch = Batch((torch.ones(1, 2), 3), {"mask": torch.ones(2, dtype=torch.bool), "name": "x" * 1000})
    assert describe(batch).startswith("float32 [1, 2], 3, mask=bool [2], name='xxx")
    assert len(describe(batch)) < 120
