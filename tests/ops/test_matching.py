"""tofu::fuse_tokens: who merges with whom."""

from __future__ import annotations

import pytest
import torch

from tests.ops.streams import along, same_bits, stream
from tests.oracle.operators import (
    decision_margin,
    reference_match,
)
from tofu_fx.ops import STRATEGIES, fuse_tokens, max_reduction
from tofu_fx.ops.matching import match

pytestmark = pytest.mark.usefixtures("on_both")


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
