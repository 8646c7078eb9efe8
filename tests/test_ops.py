"""tofu::* operators: each sentence of their definition, and how they behave under autograd and torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.reference import (
    decision_margin,
    merge_error,
    reference_fuse,
    reference_match,
    reference_rebase,
    reference_restore,
)
from tofu_fx.ops import STRATEGIES, fuse_tokens, max_reduction, permute_tokens, rebase, restore_tokens
from tofu_fx.ops.matching import match
from tofu_fx.ops.merging import mlerp_gradient, reduce_rows

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


# Matching


def test_even_places_join_the_odd_place_they_are_most_like() -> None:
    metric = along(0, 90, 85, 5)
    x = torch.arange(4.0).view(1, 4, 1)
    _, size, assignment, kept = fuse_tokens(x, metric, torch.ones(1, 4), 2, "prune", 0, 0)
    assert kept.tolist() == [[1, 3]]
    assert assignment.tolist() == [[1, 0, 0, 1]]
    assert size.tolist() == [[2.0, 2.0]]


def test_the_most_similar_candidates_are_the_sources() -> None:
    metric = along(0, 20, 90, 91, 200, 250)
    _, _, assignment, kept = fuse_tokens(torch.randn(1, 6, 3), metric, torch.ones(1, 6), 1, "prune", 0, 0)
    assert kept.tolist() == [[0, 1, 3, 4, 5]]
    assert assignment.tolist() == [[0, 1, 2, 2, 3, 4]]


def test_several_sources_may_share_a_destination() -> None:
    metric = along(0, 1, 2, 180, 3, 180)
    x = torch.tensor([1.0, 2, 6, 10, 3, 20]).view(1, 6, 1)
    new_x, size, assignment, kept = fuse_tokens(x, metric, torch.ones(1, 6), 3, "mean", 0, 0)
    assert kept.tolist() == [[1, 3, 5]]
    assert assignment.tolist() == [[0, 0, 0, 1, 0, 2]]
    assert size.tolist() == [[4.0, 1.0, 1.0]]
    assert new_x.flatten().tolist() == [3.0, 10.0, 20.0]


def test_ties_go_to_the_lowest_place() -> None:
    metric = torch.ones(1, 200, 64)
    merges = reference_match(metric, 3)
    assert merges == [{0: 1, 2: 1, 4: 1}]
    _, _, assignment, kept = fuse_tokens(torch.randn(1, 200, 3), metric, torch.ones(1, 200), 3, "prune", 0, 0)
    assert kept[0, :3].tolist() == [1, 3, 5]
    assert assignment[0, :6].tolist() == [0, 0, 0, 1, 0, 2]


@pytest.mark.parametrize("features", [13, 64, 65])
@pytest.mark.parametrize("tokens", [7, 9, 12, 13, 17, 50, 197])
def test_equal_pairs_of_tokens_tie_wherever_they_stand(tokens: int, features: int) -> None:
    """BLAS gives the edge of a matrix other bits than its inside; only the padding makes these ties exact."""
    prototypes = torch.randn(6, features, generator=torch.Generator().manual_seed(features))
    which = torch.randint(0, 3, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    which[:, 1::2] += 3  # candidates and partners of different kinds: only equal pairs have equal scores
    metric = prototypes[which]
    r = max_reduction(tokens)
    assert decision_margin(metric, r) > 1e-6
    expected = reference_match(metric, r)
    reduction = match(metric, r, 0, 0)
    found: list[dict[int, int]] = [{}, {}]
    for source, destination in zip(reduction.sources.tolist(), reduction.destinations.tolist(), strict=True):
        found[source // tokens][source % tokens] = destination % tokens
    assert found == expected


def test_protected_tokens_take_no_part_and_do_not_move() -> None:
    x, _, size = stream(tokens=12)
    metric = torch.ones(2, 12, 4)
    for strategy in STRATEGIES:
        new_x, new_size, assignment, kept = fuse_tokens(x, metric, size, 3, strategy, 3, 2)
        assert kept[:, :3].tolist() == [[0, 1, 2]] * 2
        assert kept[:, -2:].tolist() == [[10, 11]] * 2
        assert assignment[:, :3].tolist() == [[0, 1, 2]] * 2
        assert assignment[:, -2:].tolist() == [[7, 8]] * 2
        assert same_bits(new_x[:, :3], x[:, :3])
        assert same_bits(new_x[:, -2:], x[:, -2:])
        assert same_bits(new_size[:, -2:], size[:, -2:])


def test_even_and_odd_count_from_the_first_free_token() -> None:
    metric = along(0, 7, 7, 100)
    _, _, _, kept = fuse_tokens(torch.randn(1, 4, 2), metric, torch.ones(1, 4), 1, "prune", 1, 0)
    assert kept.tolist() == [[0, 2, 3]]


def test_survivors_keep_the_order_of_the_stream() -> None:
    x, metric, size = stream(tokens=40)
    _, _, assignment, kept = fuse_tokens(x, metric, size, 20, "mlerp", 0, 0)
    assert (kept.diff(dim=1) > 0).all()
    assert torch.equal(assignment.gather(1, kept), torch.arange(20).repeat(2, 1))


def test_zero_rows_of_the_metric_are_merged_last() -> None:
    metric = along(0, 1, 2, 3, 4, 5).repeat(1, 1, 1)
    metric[0, 2] = 0
    _, _, _, kept = fuse_tokens(torch.randn(1, 6, 2), metric, torch.ones(1, 6), 2, "mean", 0, 0)
    assert kept.tolist() == [[1, 2, 3, 5]]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_metric_row_that_is_not_finite_is_unlike_every_other(poison: float) -> None:
    metric = along(0, 1, 2, 3, 4, 5)
    metric[0, 2, 0] = poison
    new_x, _, _, kept = fuse_tokens(torch.randn(1, 6, 2), metric, torch.ones(1, 6), 2, "mean", 0, 0)
    assert kept.tolist() == [[1, 2, 3, 5]]
    assert new_x.isfinite().all()


def test_a_metric_of_nothing_but_nan_still_reduces_by_r() -> None:
    x, metric, size = stream()
    _, new_size, assignment, kept = fuse_tokens(x, metric * float("nan"), size, 6, "mlerp", 1, 0)
    assert (kept.diff(dim=1) > 0).all()
    assert assignment.max() == 10
    assert torch.equal(new_size.sum(1), size.sum(1))


# Features and sizes


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


# Bad input


@pytest.mark.parametrize(("r", "prefix", "suffix", "cap"), [(9, 0, 0, 8), (-1, 0, 0, 8), (8, 1, 1, 7), (1, 16, 0, 0)])
def test_r_out_of_range_names_r_and_the_cap(r: int, prefix: int, suffix: int, cap: int) -> None:
    x, metric, size = stream()
    assert max_reduction(17, prefix, suffix) == cap
    with pytest.raises(ValueError, match=rf"r={r} is out of range: of 17 tokens .* between 0 and {cap}"):
        fuse_tokens(x, metric, size, r, "mean", prefix, suffix)


def test_the_cap_is_reachable() -> None:
    for tokens in range(1, 9):
        x, metric, size = stream(tokens=tokens)
        cap = max_reduction(tokens, 1, 0)
        assert fuse_tokens(x, metric, size, cap, "mlerp", 1, 0)[0].shape[1] == tokens - cap


def test_protected_tokens_must_fit() -> None:
    x, metric, size = stream()
    with pytest.raises(ValueError, match="num_prefix=10 and num_suffix=8 must be >= 0 and fit into 17 tokens"):
        fuse_tokens(x, metric, size, 0, "mean", 10, 8)
    with pytest.raises(ValueError, match="num_prefix=-1"):
        permute_tokens(x, size, 0, -1, 0)


def test_unknown_strategy_is_named_with_the_choices() -> None:
    x, metric, size = stream()
    expected = "unknown strategy 'average': expected one of 'prune', 'mean', 'mlerp'"
    with pytest.raises(ValueError, match=expected):
        fuse_tokens(x, metric, size, 1, "average", 0, 0)
    place = torch.arange(17).repeat(2, 1)
    with pytest.raises(ValueError, match=expected):
        rebase(x, size, place, place, "average")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, m, s: (x[0], m, s), r"x must be floating point \[B, N, C\], got float32 \[17, 5\]"),
        (lambda x, m, s: (x.long(), m, s), r"x must be floating point \[B, N, C\], got int64 \[2, 17, 5\]"),
        (lambda x, m, s: (x, m[:, 1:], s), r"metric must be floating point \[2, 17, M\], got float32 \[2, 16, 4\]"),
        (lambda x, m, s: (x, m, s.double()), r"size must be float32 \[2, 17\], got float64 \[2, 17\]"),
        (lambda x, m, s: (x, m, s[:1]), r"size must be float32 \[2, 17\], got float32 \[1, 17\]"),
    ],
)
def test_wrong_tensors_are_described(change: Callable[..., tuple[Tensor, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse_tokens(*change(*stream()), 1, "mean", 0, 0)


def test_restore_needs_both_or_neither() -> None:
    x, metric, size = stream()
    new_x, _, assignment, _ = fuse_tokens(x, metric, size, 4, "mean", 0, 0)
    with pytest.raises(ValueError, match="before and merged belong together, but merged is missing"):
        restore_tokens(new_x, assignment, before=x)
    with pytest.raises(ValueError, match="before and merged belong together, but before is missing"):
        restore_tokens(new_x, assignment, merged=new_x)


# Restore and rebase


def test_restore_equals_the_reference() -> None:
    x, metric, size = stream()
    merged, _, assignment, _ = fuse_tokens(x, metric, size, 6, "mlerp", 1, 0)
    now = merged + torch.randn_like(merged)
    assert same_bits(restore_tokens(now, assignment), reference_restore(now, assignment))
    assert same_bits(restore_tokens(now, assignment, x, merged), reference_restore(now, assignment, x, merged))


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_gives_untouched_tokens_the_bits_of_the_stream(dtype: torch.dtype) -> None:
    x, metric, size = stream(dtype=dtype)
    merged, _, assignment, _ = fuse_tokens(x, metric, size, 6, "mlerp", 1, 0)
    now = merged * 3 + 1
    whole = restore_tokens(now, assignment, x, merged)
    for b in range(2):
        alone = (assignment[b].bincount() == 1)[assignment[b]]
        assert same_bits(whole[b, alone], now[b, assignment[b, alone]])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rebase_has_the_bits_of_the_reduction(strategy: str, dtype: torch.dtype) -> None:
    x, metric, size = stream(tokens=40, dtype=dtype)
    new_x, _, assignment, kept = fuse_tokens(x, metric, size, 17, strategy, 1, 1)
    assert same_bits(rebase(x, size, assignment, kept, strategy), new_x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rebase_equals_the_reference_on_another_tensor(strategy: str) -> None:
    x, metric, size = stream()
    _, _, assignment, kept = fuse_tokens(x, metric, size, 6, "mlerp", 1, 0)
    other = torch.randn(2, 17, 7)
    expected = reference_rebase(other, size, assignment, kept, strategy)
    error = (rebase(other, size, assignment, kept, strategy) - expected).abs()
    assert (error <= merge_error(other, size, assignment, expected, strategy)).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
def test_rebase_by_pruning_takes_any_dtype(dtype: torch.dtype) -> None:
    x, metric, size = stream()
    _, _, assignment, kept = fuse_tokens(x, metric, size, 6, "mean", 1, 0)
    table = torch.randint(0, 2, (2, 17, 3)).to(dtype)
    assert same_bits(rebase(table, size, assignment, kept, "prune"), table[torch.arange(2).unsqueeze(1), kept])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rebase_over_nothing_merged(strategy: str) -> None:
    x, metric, size = stream()
    _, _, assignment, kept = fuse_tokens(x, metric, size, 0, strategy, 1, 0)
    assert same_bits(rebase(x, size, assignment, kept, strategy), x)
    shuffled, _, assignment, kept = permute_tokens(x, size, 1, 1, 0)
    assert same_bits(rebase(x, size, assignment, kept, strategy), shuffled)


# Permutation


def test_permute_moves_every_free_token_somewhere_and_nothing_else() -> None:
    x, _, size = stream(batch=3, tokens=40)
    new_x, new_size, assignment, kept = permute_tokens(x, size, 7, 2, 3)
    assert torch.equal(kept.sort(dim=1).values, torch.arange(40).repeat(3, 1))
    assert torch.equal(assignment.gather(1, kept), torch.arange(40).repeat(3, 1))
    assert torch.equal(kept[:, :2], torch.arange(2).repeat(3, 1))
    assert torch.equal(kept[:, 37:], torch.arange(37, 40).repeat(3, 1))
    assert torch.equal(new_size, size.gather(1, kept))
    assert same_bits(new_x, x[torch.arange(3).unsqueeze(1), kept])
    assert same_bits(restore_tokens(new_x, assignment), x)


def test_permute_depends_on_seed_and_sample_only() -> None:
    x, _, size = stream(batch=3, tokens=40)
    kept = permute_tokens(x, size, 7, 0, 0)[3]
    assert torch.equal(permute_tokens(x[:2], size[:2], 7, 0, 0)[3], kept[:2])
    assert len({tuple(row) for row in kept.tolist()}) == 3
    assert not torch.equal(permute_tokens(x, size, 8, 0, 0)[3], kept)
    assert not torch.equal(permute_tokens(x, size, -8, 0, 0)[3], kept)


# Gradients


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("r", [0, 1, 6])
def test_gradient_of_fuse(strategy: str, r: int) -> None:
    x, metric, size = stream(dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: fuse_tokens(t, metric, size, r, strategy, 1, 0)[0], (x,))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_of_rebase_restore_and_permute(strategy: str) -> None:
    x, metric, size = stream(dtype=torch.float64)
    x.requires_grad_()
    _, _, assignment, kept = fuse_tokens(x, metric, size, 6, strategy, 1, 0)
    assert torch.autograd.gradcheck(lambda t: rebase(t, size, assignment, kept, strategy), (x,))
    assert torch.autograd.gradcheck(lambda t: permute_tokens(t, size, 3, 1, 0)[0], (x,))

    def there_and_back(t: Tensor) -> Tensor:
        merged = fuse_tokens(t, metric, size, 6, strategy, 1, 0)[0]
        return restore_tokens(merged * merged, assignment, t, merged)

    assert torch.autograd.gradcheck(there_and_back, (x,))


def test_gradient_where_members_cancel_goes_to_the_chosen_one() -> None:
    x = torch.tensor([[[2.0, 1.0], [-2.0, -1.0], [0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    new_x = fuse_tokens(x, along(0, 1, 90, 91), torch.ones(1, 4), 2, "mlerp", 0, 0)[0]
    new_x.backward(torch.tensor([[[3.0, 4.0], [5.0, 6.0]]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[[3.0, 4.0], [0.0, 0.0], [5.0, 6.0], [0.0, 0.0]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_has_the_dtype_of_x_and_the_accuracy_of_float32(strategy: str, dtype: torch.dtype) -> None:
    x, metric, size = stream(dtype=dtype)
    weight = torch.randn(2, 11, 5).to(dtype)
    grads = []
    for t in (x.clone().requires_grad_(), x.double().requires_grad_()):
        out = fuse_tokens(t, metric, size, 6, strategy, 1, 0)
        (out[0] * weight).sum().backward()
        assert t.grad is not None
        assert t.grad.dtype == t.dtype
        grads.append(t.grad.double())
    # one rounding to the dtype; float32's own error is a few 2^-24 times a stretch n/|m| that stays below 10 here
    torch.testing.assert_close(grads[0], grads[1], rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_only_features_carry_gradient() -> None:
    x, metric, size = stream()
    inputs = [t.requires_grad_() for t in (x, metric, size)]
    outputs = fuse_tokens(*inputs, 6, "mlerp", 1, 0)
    assert [o.requires_grad for o in outputs] == [True, False, False, False]
    outputs[0].sum().backward()
    assert x.grad is not None
    assert metric.grad is None
    assert size.grad is None
    assert [o.requires_grad for o in permute_tokens(x, size, 0, 1, 0)] == [True, False, False, False]


# torch.library and torch.compile


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck_fuse(strategy: str, dtype: torch.dtype) -> None:
    x, metric, size = stream(dtype=dtype)
    x.requires_grad_()
    torch.library.opcheck(fuse_tokens, (x, metric.to(dtype), size, 5, strategy, 1, 0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck_fuse_nothing(strategy: str) -> None:
    x, metric, size = stream()
    torch.library.opcheck(fuse_tokens, (x, metric, size, 0, strategy, 1, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_permute(dtype: torch.dtype) -> None:
    x, _, size = stream(dtype=dtype)
    torch.library.opcheck(permute_tokens, (x.requires_grad_(), size, 3, 1, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_the_rest(dtype: torch.dtype) -> None:
    x, metric, size = stream(dtype=dtype)
    merged, _, assignment, kept = fuse_tokens(x, metric, size, 5, "mlerp", 1, 0)
    ops = torch.ops.tofu
    grad = torch.randn_like(merged)
    torch.library.opcheck(ops.mlerp_backward.default, (grad, x, size, assignment, kept))
    x.requires_grad_()
    torch.library.opcheck(ops.restore_tokens.default, (merged, assignment, x, merged))
    for strategy in STRATEGIES:
        torch.library.opcheck(ops.rebase.default, (x, size, assignment, kept, strategy))
        torch.library.opcheck(ops.merge_groups.default, (x, size, assignment, kept, strategy))


def layer(x: Tensor, size: Tensor, strategy: str) -> Tensor:
    """A reduction, work on fewer tokens, an older tensor rebased, and the way back."""
    y, new_size, assignment, kept = torch.ops.tofu.fuse_tokens(x, x, size, 4, strategy, 1, 0)
    old = torch.ops.tofu.rebase(x.sin(), size, assignment, kept, strategy)
    z = torch.tanh(y) + old * new_size.log().unsqueeze(-1)
    return torch.ops.tofu.restore_tokens(z, assignment, x, y)


def run(function: Callable[..., Tensor], x: Tensor, size: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    for tensor in (x, size):
        torch._dynamo.mark_dynamic(tensor, [0, 1])
    out = function(x, size, strategy)
    out.square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiles_whole_forward_and_backward_for_every_batch_and_length(strategy: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for batch, tokens in [(2, 17), (5, 17), (3, 21)]:
        x, _, size = stream(batch=batch, tokens=tokens)
        for found, value in zip(run(compiled, x, size, strategy), run(layer, x, size, strategy), strict=True):
            assert same_bits(found, value)
    assert counter.frame_count == 1


def test_compiles_with_inference_and_static_shapes() -> None:
    torch._dynamo.reset()
    x, _, size = stream()
    with torch.inference_mode():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert same_bits(compiled(x, size, "mlerp"), layer(x, size, "mlerp"))


def test_a_bad_r_is_refused_while_compiling() -> None:
    torch._dynamo.reset()
    x, metric, size = stream()
    compiled = torch.compile(lambda x: fuse_tokens(x, metric, size, 9, "mean", 0, 0)[0], backend="aot_eager")
    with pytest.raises(Exception, match="r=9 is out of range"):
        compiled(x)


def test_a_graph_with_the_operators_can_be_copied() -> None:
    """Compilers deepcopy graph modules; restore and rebase must be there as operators, not as Python closures."""
    graph = torch.fx.Graph()
    x, assignment = graph.placeholder("x"), graph.placeholder("assignment")
    graph.output(graph.call_function(torch.ops.tofu.restore_tokens.default, (x, assignment)))
    module = copy.deepcopy(torch.fx.GraphModule(torch.nn.Module(), graph))
    assert module(torch.ones(1, 2, 3), torch.tensor([[0, 1, 1]])).shape == (1, 3, 3)
