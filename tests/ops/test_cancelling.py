"""MLERP at the ends of the range of numbers, and where members cancel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.streams import along, implementation, same_bits
from tests.oracle.operators import cancellation, merge_error, reference_rebase
from tofu_fx.ops import fuse_tokens, rebase

both = pytest.mark.usefixtures("on_both")
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _merge(rows: Tensor, size: Tensor | None = None) -> Tensor:
    """MLERP of the first K tokens of `[K, C]` into one."""
    count, size = len(rows), torch.ones(1, len(rows)) if size is None else size
    assignment = torch.zeros(1, count, dtype=torch.int64)
    return rebase(rows.unsqueeze(0), size, assignment, torch.zeros(1, 1, dtype=torch.int64), "mlerp")[0, 0]


def _expected(rows: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """By the reference, and how far from it a result may be."""
    size = torch.ones(1, len(rows)) if size is None else size
    places = torch.zeros(1, len(rows), dtype=torch.int64)
    expected = reference_rebase(rows.unsqueeze(0), size, places, places[:, :1], "mlerp")
    return expected[0, 0], merge_error(rows.unsqueeze(0), size, places, expected, "mlerp")[0, 0]


@both
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float32, (1e38, 1e30, 1e19, 1e-19, 1e-30, 1e-38)),
        (torch.bfloat16, (1e38, 1e30, 1e19, 1e-19, 1e-30, 1e-38)),
        (torch.float16, (6e4 / 3, 1e-4)),
        (torch.float64, (1e307, 1e200, 1e160, 1e-160, 1e-200, 1e-307)),
    ],
)
def test_members_of_any_finite_size_give_what_they_do_at_one(dtype: torch.dtype, scales: tuple[float, ...]) -> None:
    rows = torch.tensor([[1.0, 2.0, -1.0], [0.5, 1.0, 0.25], [0.0, 0.125, 1.0]], dtype=torch.float64)
    size = torch.tensor([[3.0, 1.0, 2.0]])
    for scale in scales:
        members = (rows * scale).to(dtype)
        expected, bound = _expected(members, size)
        assert expected.isfinite().all()
        found = _merge(members, size)
        assert found.isfinite().all()
        # The sums are those of merge_error; a member below the smallest normal number has fewer bits of its own.
        assert ((found.double() - expected.double()).abs() <= bound + torch.finfo(dtype).smallest_normal * 1e-6).all()


@both
def test_a_norm_may_be_out_of_range_where_the_result_is_not() -> None:
    rows = torch.full((2, 8), 3e38)  # norms of 8e38
    torch.testing.assert_close(_merge(rows), rows[0], rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-13, 2.0**12])
def test_members_that_cancel_up_to_rounding_leave_the_largest(dtype: torch.dtype, scale: float) -> None:
    """A third of each member is no binary fraction; what is left of the sum is one rounding of it, or nothing."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    unit = torch.finfo(wide).eps / 2
    third = torch.tensor([1 / 3, 2 / 3, -1 / 3], dtype=torch.float64)
    rows = torch.stack([third, third / 7, -(third + third / 7)]).to(wide) * scale
    rows = rows.to(dtype)
    left = rows.double().sum(0).norm() / rows.double().norm(dim=1).sum()
    if wide == dtype:
        assert left <= 4 * unit  # rounding of the members themselves, below 64 * 3 units
        assert same_bits(_merge(rows), rows[2])
    expected, bound = _expected(rows)
    assert ((_merge(rows).double() - expected.double()).abs() <= bound).all()


@both
@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_the_threshold_is_64_units_for_each_member(count: int) -> None:
    """On either side of it: the largest member stands, or the direction of the sum does."""
    for factor, stands in ((0.9, True), (1.1, False), (4.0, False)):
        rows = torch.zeros(count, 4)
        rows[0, 0], rows[1, 0] = 1.0, -1.0
        rows[1, 1] = factor * 64 * count * 2.0**-24 * 2.0  # of a sum of norms of 2
        assert (cancellation(rows.double(), torch.ones(count), 2.0**-24) <= 1) is stands
        found = _merge(rows)
        if stands:
            assert same_bits(found, rows[0])  # the other is longer by less than a thousandth
        else:
            torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.0, 0.0]), rtol=0, atol=1e-6)


def test_both_implementations_agree_wherever_members_nearly_cancel() -> None:
    """Weighted, so that products are rounded. A sum over the threshold is known to 1/64, better the longer it is."""
    generator = torch.Generator().manual_seed(0)
    stood = 0
    for trial in range(300):
        count = 2 + trial % 5
        rows = torch.randn(count, 6, generator=generator)
        size = torch.randint(1, 9, (1, count), generator=generator).float()
        rest = -(size[0, :-1, None] * rows[:-1]).sum(0) / size[0, -1]
        rows[-1] = rest + torch.randn(6, generator=generator) * 10 ** (-8 * torch.rand((), generator=generator))
        found = []
        for name in ("cpp", "aten"):
            with implementation(name):
                found.append(_merge(rows, size).double())
        expected, bound = _expected(rows, size)
        assert all(((value - expected.double()).abs() <= bound).all() for value in found)
        if bound.isfinite().all():
            assert (found[0] - found[1]).norm() <= rows.norm(dim=1).max() / 32
        stood += cancellation(rows.double(), size[0], 2.0**-24) <= 1
    assert 20 < stood < 200


@both
def test_which_of_two_opposite_members_stays_is_not_up_to_rounding() -> None:
    for seed in range(50):
        row = torch.randn(384, generator=torch.Generator().manual_seed(seed))
        near = -row * (1 + 2.0**-22)  # a norm that is larger by as little as its rounding
        assert same_bits(_merge(torch.stack([row, near])), row)
        assert same_bits(_merge(torch.stack([near, row])), near)


@both
@pytest.mark.parametrize("scale", [1.0, 1e150, 1e-150, 1e300, 1e-300])
def test_the_gradient_does_not_depend_on_how_long_the_members_are(scale: float) -> None:
    metric, size = along(0, 1, 90, 91), torch.tensor([[1.0, 3.0, 1.0, 1.0]])
    rows = torch.tensor([[[1.0, 2.0], [0.5, -1.0], [2.0, 1.0], [-2.0, -1.0]]], dtype=torch.float64)
    grad = torch.tensor([[[3.0, 4.0], [5.0, 6.0]]], dtype=torch.float64)
    grads = []
    for factor in (1.0, scale):
        x = (rows * factor).requires_grad_()
        fuse_tokens(x, metric, size, 2, "mlerp", 0, 0)[0].backward(grad)
        assert x.grad is not None
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("left", "stands"), [(1e-14, True), (1e-6, False)])
def test_the_gradient_takes_the_same_way_as_the_value(left: float, stands: bool) -> None:
    """Of two members that differ by `left`; float64, where 2 * 64 units are 1.4e-14."""
    x = torch.tensor([[[2.0, 1.0], [-2.0, -1.0 - left]]], dtype=torch.float64, requires_grad=True)
    y = fuse_tokens(x, torch.ones(1, 2, 2), torch.ones(1, 2), 1, "mlerp", 0, 0)[0]
    y.backward(torch.tensor([[[3.0, 4.0]]], dtype=torch.float64))
    assert x.grad is not None
    if stands:
        assert y[0, 0].tolist() == x[0, 0].tolist()
        assert x.grad.tolist() == [[[3.0, 4.0], [0.0, 0.0]]]
    else:
        torch.testing.assert_close(
            y[0, 0].detach(), torch.tensor([0.0, -(5**0.5)], dtype=torch.float64), rtol=1e-5, atol=0
        )
        assert x.grad.abs().max() > 1e5


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_member_that_is_not_finite_leaves_nothing_finite_that_looks_right(value: float) -> None:
    rows = torch.tensor([[1.0, 2.0], [value, 1.0]])
    assert not _merge(rows).isfinite().all()
