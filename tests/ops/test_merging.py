"""tofu::fuse_tokens: what the survivors become."""

from __future__ import annotations

import pytest
import torch

from tests.ops.streams import DTYPES, MERGING, along, same_bits, stream
from tests.oracle.operators import (
    decision_margin,
    merge_error,
    reference_fuse,
)
from tofu_fx.ops import STRATEGIES, fuse_tokens
from tofu_fx.ops.matching import match
from tofu_fx.ops.merging import mlerp_gradient, reduce_rows

pytestmark = pytest.mark.usefixtures("on_both")


def test_prune_leaves_destinations_bit_for_bit_and_hands_over_sizes() -> None:
    x, metric, size = stream()
    new_x, new_size, _, kept = fuse_tokens(x, metric, size, 6, "prune", 1, 0)
    assert same_bits(new_x, x.gather(1, kept.unsqueeze(-1).expand(-1, -1, 5)))
    assert torch.equal(new_size.sum(1), size.sum(1))


def test_mean_weighs_by_size() -> None:
    metric = along(0, 1, 90, 180)
    x = torch.tensor([4.0, 8.0, 1.0, 2.0]).view(1, 4, 1)
    new_x, size, _, _ = fuse_tokens(x, metric, torch.tensor([[3.0, 1, 1, 1]]), 1, "mean", 0, 0)
    assert new_x.flatten().tolist() == [5.0, 1.0, 2.0]
    assert size.tolist() == [[4.0, 1.0, 1.0]]


def test_mlerp_takes_the_direction_of_the_mean_and_the_largest_norm() -> None:
    metric = along(0, 1, 90, 180)
    x = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [7.0, 7.0], [8.0, 8.0]]])
    new_x, _, _, _ = fuse_tokens(x, metric, torch.tensor([[1.0, 3, 1, 1]]), 1, "mlerp", 0, 0)
    # mean = (3/4, 3/4), so the direction is the diagonal, with the norm 3 of the first member
    torch.testing.assert_close(new_x[0, 0], torch.full((2,), 3 / 2**0.5))
    assert same_bits(new_x[0, 1:], x[0, 2:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlerp_of_members_that_cancel_is_the_largest_of_them(dtype: torch.dtype) -> None:
    metric = along(0, 1, 2, 180)
    rows = torch.tensor([[[2.0, 1.0], [1.0, 0.0], [-3.0, -1.0], [5.0, 5.0]]], dtype=dtype)
    new_x, _, _, _ = fuse_tokens(rows, metric, torch.ones(1, 4), 2, "mlerp", 0, 0)
    assert same_bits(new_x[0, 0], rows[0, 2])


def test_mlerp_of_members_that_cancel_takes_the_first_of_equal_norms() -> None:
    metric = along(0, 1, 90, 180)
    x = torch.tensor([[[2.0, 1.0], [-2.0, -1.0], [7.0, 7.0], [8.0, 8.0]]])
    new_x, _, _, _ = fuse_tokens(x, metric, torch.ones(1, 4), 1, "mlerp", 0, 0)
    assert same_bits(new_x[0, 0], x[0, 0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_group_of_zero_tokens_is_zero(strategy: str) -> None:
    x = torch.zeros(1, 6, 3)
    new_x, _, _, _ = fuse_tokens(x, torch.ones(1, 6, 2), torch.ones(1, 6), 3, strategy, 0, 0)
    assert torch.equal(new_x, x[:, :3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_that_take_no_part_keep_their_bits(strategy: str, dtype: torch.dtype) -> None:
    x, metric, size = stream(dtype=dtype)
    x[:, ::3] = -0.0
    x[:, 1::5] = float("nan")
    new_x, new_size, _, kept = fuse_tokens(x, metric, size, 3, strategy, 1, 0)
    for b in range(2):
        assignment = fuse_tokens(x, metric, size, 3, strategy, 1, 0)[2]
        alone = assignment[b].bincount() == 1
        assert alone.sum() >= 8
        assert same_bits(new_x[b, alone], x[b, kept[b, alone]])
        assert torch.equal(new_size[b, alone], size[b, kept[b, alone]])


@pytest.mark.parametrize("strategy", MERGING)
def test_nan_features_reach_their_own_group_only(strategy: str) -> None:
    x = torch.ones(1, 6, 3)
    x[0, 0, 1] = float("nan")
    new_x, _, _, _ = fuse_tokens(x, along(0, 1, 90, 91, 180, 181), torch.ones(1, 6), 3, strategy, 0, 0)
    assert new_x[0, 0].isnan().any()
    assert new_x[0, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("r", [1, 6, 8])
def test_equals_the_reference(strategy: str, dtype: torch.dtype, r: int) -> None:
    x, metric, size = stream(batch=3, dtype=dtype)
    assert decision_margin(metric, r, 1, 0) > 1e-6
    new_x, new_size, assignment, kept = fuse_tokens(x, metric, size, r, strategy, 1, 0)
    expected_x, expected_size, expected_assignment, expected_kept = reference_fuse(x, metric, size, r, strategy, 1, 0)
    assert torch.equal(assignment, expected_assignment)
    assert torch.equal(kept, expected_kept)
    assert torch.equal(new_size, expected_size)
    error = (new_x.double() - expected_x.double()).abs()
    assert (error <= merge_error(x, size, assignment, expected_x, strategy)).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_r_zero_returns_the_same_bits(strategy: str) -> None:
    x, metric, size = stream()
    x[0, 0, 0] = -0.0
    new_x, new_size, assignment, kept = fuse_tokens(x, metric, size, 0, strategy, 1, 0)
    assert same_bits(new_x, x)
    assert same_bits(new_size, size)
    assert assignment.tolist() == kept.tolist() == [list(range(17))] * 2
    assert new_x.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("r", [0, 3])
def test_an_empty_batch(r: int) -> None:
    x, metric, size = stream()
    outputs = fuse_tokens(x[:0], metric[:0], size[:0], r, "mlerp", 1, 0)
    assert [list(o.shape) for o in outputs] == [[0, 17 - r, 5], [0, 17 - r], [0, 17], [0, 17 - r]]


def test_inputs_need_not_be_contiguous() -> None:
    x, metric, size = stream(batch=2, tokens=16, channels=6)
    for strategy in STRATEGIES:
        expected = fuse_tokens(x, metric, size, 5, strategy, 1, 0)
        columns = x.transpose(1, 2).contiguous().transpose(1, 2)
        strided = (columns, metric.repeat(1, 1, 2)[..., :4], size.t().contiguous().t())
        for found, value in zip(fuse_tokens(*strided, 5, strategy, 1, 0), expected, strict=True):
            assert same_bits(found, value)
            assert found.is_contiguous()


@pytest.mark.parametrize("tokens", [8, 33, 50, 197])
@pytest.mark.parametrize("strategy", MERGING)
def test_a_sample_does_not_depend_on_its_batch(strategy: str, tokens: int) -> None:
    x, metric, size = stream(batch=9, tokens=tokens, channels=13, features=15)
    r = tokens // 3
    whole = fuse_tokens(x, metric, size, r, strategy, 1, 0)
    for batch in range(1, 10):
        for first in {0, 1, 9 - batch}:
            part = slice(first, min(first + batch, 9))
            inputs = [t[part].clone() for t in (x, metric, size)]
            for found, value in zip(fuse_tokens(*inputs, r, strategy, 1, 0), whole, strict=True):
                assert same_bits(found, value[part])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_counting_groups_the_bits_are_the_same(strategy: str) -> None:
    """Off CPU the number of groups is not read back; that path runs here on CPU tensors."""
    x, metric, size = stream(tokens=30)
    x[0, :20] = x[0, :20].sign()  # groups that cancel, for the fallback
    x, size = x.flatten(0, 1), size.flatten()
    reduction = match(metric, 12, 1, 0)
    for found, value in zip(
        reduce_rows(x, size, reduction, strategy, padded=True), reduce_rows(x, size, reduction, strategy), strict=True
    ):
        assert same_bits(found, value)
    grad = torch.randn(36, 5)
    assert same_bits(
        mlerp_gradient(grad, x, size, reduction, padded=True), mlerp_gradient(grad, x, size, reduction, padded=False)
    )


def test_autocast_does_not_reach_inside() -> None:
    x, metric, size = stream(tokens=60, features=64)
    expected = fuse_tokens(x, metric, size, 20, "mlerp", 1, 0)
    with torch.autocast("cpu", torch.bfloat16):
        found = fuse_tokens(x, metric, size, 20, "mlerp", 1, 0)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
