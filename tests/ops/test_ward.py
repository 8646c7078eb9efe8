"""tofu::fuse_tokens with the grouping "ward": who merges with whom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from tests.ops.streams import implementation, same_bits, stream
from tests.oracle.operators import merge_error, reference_apply, reference_ward
from tofu_fx.ops import STRATEGIES, fuse_tokens, max_reduction

pytestmark = pytest.mark.usefixtures("on_both")

# Sums of M squares in float32, and in each round the squared distances from those before: a few dozen roundings.
CLEAR = 1e-4


def groups_of(metric: Tensor, size: Tensor, r: int, prefix: int = 0, suffix: int = 0) -> list[list[int]]:
    """For each sample the first token of each token's group."""
    x = torch.zeros(*metric.shape[:2], 1)
    _, _, assignment, kept = fuse_tokens(x, metric, size, r, "mean", prefix, suffix, None, "ward")
    return kept.gather(1, assignment).tolist()


def referred(metric: Tensor, size: Tensor, r: int, prefix: int = 0, suffix: int = 0) -> tuple[list[list[int]], float]:
    merges, margin = reference_ward(metric, size, r, prefix, suffix)
    return [[joins.get(i, i) for i in range(metric.shape[1])] for joins in merges], margin


def points(*places: float) -> Tensor:
    """A metric `[1, N, 1]`."""
    return torch.tensor(places).view(1, -1, 1)


def ones(metric: Tensor) -> Tensor:
    return torch.ones(metric.shape[:2])


def test_the_nearest_pair_joins_whatever_their_places_are() -> None:
    metric = points(0, 10, 0.5, 20, 10.2)
    assert groups_of(metric, ones(metric), 1) == [[0, 1, 2, 3, 1]]
    assert groups_of(metric, ones(metric), 2) == [[0, 1, 0, 3, 1]]


def test_distance_counts_and_not_direction() -> None:
    metric = torch.tensor([[[1.0, 0], [10, 0], [1, 0.5], [10, 5]]])
    assert groups_of(metric, ones(metric), 1) == [[0, 1, 0, 3]]


def test_large_groups_cost_more() -> None:
    metric, size = points(0, 1, 10, 11.2), torch.tensor([[8.0, 8, 1, 1]])
    assert groups_of(metric, size, 1) == [[0, 1, 2, 2]]  # 4 * 1 against 0.5 * 1.44
    assert groups_of(metric, ones(metric), 1) == [[0, 0, 2, 3]]


def test_copies_join_the_first_of_them_before_anything_else() -> None:
    metric = points(5, 0, 5, 0.001, 5, 7, 5)
    assert groups_of(metric, ones(metric), 3) == [[0, 1, 0, 3, 0, 5, 0]]
    assert groups_of(metric, ones(metric), 4) == [[0, 1, 0, 1, 0, 5, 0]]


def test_all_but_one_may_go_and_all_may_be_equal() -> None:
    metric = torch.ones(2, 40, 3)
    assert groups_of(metric, ones(metric), 39) == [[0] * 40] * 2
    assert max_reduction(40, 1, 2, (), "ward") == 36
    with pytest.raises(ValueError, match="between 0 and 36, all free tokens but one"):
        fuse_tokens(metric, metric, ones(metric), 37, "mean", 1, 2, None, "ward")


def test_more_than_the_rounds_find_is_made_up_by_the_nearest_ahead() -> None:
    metric = points(*(2.0**i for i in range(12)))  # each one is nearest to what is before it: one pair in each round
    found, margin = referred(metric, ones(metric), 8)
    assert margin > CLEAR
    assert groups_of(metric, ones(metric), 8) == found
    assert len(set(found[0])) == 4


def test_protected_tokens_take_no_part() -> None:
    metric = points(0, 0, 3.5, 9, 4, 0)
    assert groups_of(metric, ones(metric), 1, 2, 1) == [[0, 1, 2, 3, 2, 5]]


def test_rows_that_are_not_finite_are_far_from_every_other() -> None:
    metric = points(0, float("nan"), 1, float("inf"), 5)
    assert groups_of(metric, ones(metric), 2) == [[0, 1, 0, 3, 0]]
    assert all(place in range(5) for place in groups_of(metric, ones(metric), 4)[0])


@given(
    seed=st.integers(0, 10**6), tokens=st.integers(3, 24), features=st.integers(1, 6), share=st.floats(0, 1),
    prefix=st.integers(0, 2), suffix=st.integers(0, 2), grid=st.sampled_from([0.0, 1.0]), sized=st.booleans(),
)  # fmt: skip
def test_groups_are_those_of_the_reference(
    seed: int, tokens: int, features: int, share: float, prefix: int, suffix: int, grid: float, sized: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, tokens + prefix + suffix, features, generator=generator)
    if grid:  # many copies, and many equal distances: exact in float32, so they tie in it, too
        metric = (metric * 2).round()
    size = torch.randint(1, 5, metric.shape[:2], generator=generator).float() if sized else ones(metric)
    r = max(1, round(share * (tokens - 1)))
    found, margin = referred(metric, size, r, prefix, suffix)
    assume(margin > CLEAR)
    assert groups_of(metric, size, r, prefix, suffix) == found


@pytest.mark.parametrize("r", [1, 13, 49])
def test_they_are_those_of_scipy_where_all_sizes_are_one(r: int) -> None:
    metric = torch.randn(2, 98, 16, generator=torch.Generator().manual_seed(r))
    for row, found in zip(metric, groups_of(metric, ones(metric), r), strict=True):
        expected = fcluster(linkage(row.numpy(), "ward"), len(row) - r, "maxclust").tolist()
        assert [found.index(group) for group in found] == [expected.index(group) for group in expected]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_features_and_sizes_are_those_of_the_groups(strategy: str) -> None:
    x, metric, size = stream(tokens=23, channels=7)
    found = fuse_tokens(x, metric, size, 14, strategy, 2, 1, None, "ward")
    expected = reference_apply(x, size, reference_ward(metric, size, 14, 2, 1)[0], strategy)
    error = merge_error(x, size, expected[2], expected[0], strategy)
    assert bool(((found[0] - expected[0]).abs() <= error).all())
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(a, b)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    metric = torch.randn(5, 61, 9, generator=torch.Generator().manual_seed(0))
    metric[3] = metric[1]
    size = torch.ones(5, 61)
    whole = fuse_tokens(metric, metric, size, 30, "mlerp", 1, 0, None, "ward")
    alone = fuse_tokens(metric[1:2], metric[1:2], size[:1], 30, "mlerp", 1, 0, None, "ward")
    for a, b in zip(whole, alone, strict=True):
        assert same_bits(a[1:2], b)
        assert same_bits(a[3:4], b)


def test_of_a_grid_each_goes_to_the_partner_of_least_cost() -> None:
    x, metric, _ = stream(tokens=24)
    size = torch.rand(2, 24, generator=torch.Generator().manual_seed(3)) + 0.5
    _, _, assignment, kept = fuse_tokens(x, metric, size, 11, "mean", 0, 0, (1, 4, 6, 2), "ward")
    partners = [0, 2, 4, 12, 14, 16]
    for b in range(2):
        best = {}
        for i in set(range(24)) - set(partners):
            costs = {
                p: float(
                    size[b, i] * size[b, p] / (size[b, i] + size[b, p]) * (metric[b, i] - metric[b, p]).square().sum()
                )
                for p in partners
            }
            best[i] = min((cost, p) for p, cost in costs.items())
        goes = sorted(best, key=lambda i: best[i])[:11]
        expected = [best[i][1] if i in goes else i for i in range(24)]
        assert kept[b][assignment[b]].tolist() == expected


def test_opcheck() -> None:
    x, metric, size = stream()
    torch.library.opcheck(
        torch.ops.tofu.fuse_tokens.default, (x.requires_grad_(), metric, size, 6, "mean", 1, 1, None, "ward")
    )


def test_unknown_grouping() -> None:
    x, metric, size = stream()
    with pytest.raises(ValueError, match="unknown grouping 'kmeans': expected one of 'bipartite', 'ward'"):
        fuse_tokens(x, metric, size, 1, "mean", 0, 0, None, "kmeans")


def test_both_implementations_choose_alike_where_many_tokens_go() -> None:
    metric = torch.randn(3, 257, 64, generator=torch.Generator().manual_seed(5))
    found = []
    for name in ("cpp", "aten"):
        with implementation(name):
            found.append(groups_of(metric, ones(metric), 120, 1, 0))
    assert found[0] == found[1]
