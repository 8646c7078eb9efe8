"""tofu::restore_tokens, rebase and permute_tokens: other versions of a stream."""

from __future__ import annotations

import pytest
import torch

from tests.ops.streams import DTYPES, same_bits, stream
from tests.oracle.operators import (
    merge_error,
    reference_rebase,
    reference_restore,
)
from tofu_fx.ops import STRATEGIES, fuse_tokens, permute_tokens, rebase, restore_tokens

pytestmark = pytest.mark.usefixtures("on_both")


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
