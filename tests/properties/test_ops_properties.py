"""tofu::* operators on streams that nobody chose: laws, and equality with the oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle.operators import (
    decision_margin,
    merge_error,
    reference_apply,
    reference_fuse,
    reference_match,
    reference_rebase,
)
from tofu_fx.ops import STRATEGIES, fuse_tokens, max_reduction, permute_tokens, rebase, restore_tokens

quick = settings(max_examples=60, deadline=None)


@dataclass
class Case:
    """The arguments of one call."""

    x: Tensor
    metric: Tensor
    size: Tensor
    r: int
    strategy: str
    prefix: int
    suffix: int

    def fuse(self, batch: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = (t[batch].clone() for t in (self.x, self.metric, self.size))
        return fuse_tokens(*tensors, self.r, self.strategy, self.prefix, self.suffix)


@st.composite
def cases(draw: st.DrawFn, strategies: tuple[str, ...] = STRATEGIES, exact: bool = False) -> Case:
    """Random streams with repeated and zero tokens.

    With `exact`, every metric row is zero or has four entries of +-1, so its norm is 0 or 2 and all cosines are exact
    multiples of 1/4 in float32: ties abound, and are ties in any precision.
    """
    batch = draw(st.integers(1, 4))
    prefix, suffix = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    tokens = prefix + suffix + draw(st.integers(1, 40))
    channels, features = draw(st.integers(1, 20)), draw(st.integers(4, 20))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    r = draw(st.integers(0, max_reduction(tokens, prefix, suffix)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def chance(probability: float) -> Tensor:
        return torch.rand(batch, tokens, generator=generator) < probability

    x = torch.randn(batch, tokens, channels, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 100.0]))
    metric = torch.randn(batch, tokens, features, generator=generator)
    if exact:
        nonzero = torch.rand(batch, tokens, features, generator=generator).argsort(dim=-1) < 4
        metric = metric.sign() * nonzero
    repeated = draw(st.sampled_from([0.0, 0.5]))
    twin = torch.randint(0, tokens, (batch, tokens), generator=generator)
    twin = torch.where(chance(repeated), twin, torch.arange(tokens))
    row = torch.arange(batch).unsqueeze(1)
    x, metric = x[row, twin], metric[row, twin]
    zeros = draw(st.sampled_from([0.0, 0.2]))
    x[chance(zeros)] = 0.0
    metric[chance(zeros)] = 0.0
    x[chance(zeros)] *= -1.0  # twins that cancel, and -0.0
    size = torch.randint(1, 9, (batch, tokens), generator=generator).float()
    return Case(x.to(dtype), metric, size, r, draw(st.sampled_from(strategies)), prefix, suffix)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def touched(assignment: Tensor, left: int) -> Tensor:
    """Which groups `[B, M]` have more than one member."""
    return torch.zeros(assignment.shape[0], left).scatter_add(1, assignment, torch.ones(assignment.shape)) > 1


def assert_close_to(expected: Tensor, found: Tensor, case: Case, assignment: Tensor) -> None:
    """Within the bound that `merge_error` derives; members that nearly cancel have no meaningful direction."""
    error = (found.double() - expected.double()).abs()
    bound = merge_error(case.x, case.size, assignment, expected, case.strategy)
    hopeless = (bound > case.x.double().norm(dim=2).amax()) & (case.strategy == "mlerp")
    assert ((error <= bound) | hopeless).all()


@quick
@given(cases(exact=True))
def test_equals_the_reference_at_ties(case: Case) -> None:
    new_x, new_size, assignment, kept = case.fuse()
    x, size, expected_assignment, expected_kept = reference_fuse(
        case.x, case.metric, case.size, case.r, case.strategy, case.prefix, case.suffix
    )
    assert torch.equal(kept, expected_kept)
    assert torch.equal(assignment, expected_assignment)
    assert torch.equal(new_size, size)
    assert_close_to(x, new_x, case, assignment)


@quick
@given(cases())
def test_equals_the_reference_away_from_ties(case: Case) -> None:
    # Cosines in float32 are off by some (features/2 + 4) 2^-24 < 1e-6; that must not decide. Where equal tokens meet,
    # the true cosine is exactly 1 for all such pairs, but float32 orders them by its own rounding.
    new_x, _, assignment, kept = case.fuse()
    if decision_margin(case.metric, case.r, case.prefix, case.suffix) > 2e-6 and not _has_perfect_pairs(case):
        merges = reference_match(case.metric, case.r, case.prefix, case.suffix)
        _, _, expected_assignment, expected_kept = reference_apply(case.x, case.size, merges, "prune")
        assert torch.equal(kept, expected_kept)
        assert torch.equal(assignment, expected_assignment)
    # Whatever the choice was, the features follow from it.
    expected = reference_rebase(case.x, case.size, assignment, kept, case.strategy)
    assert_close_to(expected, new_x, case, assignment)


def _has_perfect_pairs(case: Case) -> bool:
    stop = case.metric.shape[1] - case.suffix
    free = torch.nn.functional.normalize(case.metric[:, case.prefix : stop].double(), dim=-1)
    return bool((free[:, ::2] @ free[:, 1::2].transpose(1, 2) > 1 - 1e-6).any())


@quick
@given(cases(), st.booleans())
def test_places_are_sound_for_any_input(case: Case, poisoned: bool) -> None:
    if poisoned:
        case.x[0, ::3] = math.nan
        case.metric[0, ::2] = math.nan
        case.metric[:, 1::5] = math.inf
    tokens, left = case.x.shape[1], case.x.shape[1] - case.r
    new_x, new_size, assignment, kept = case.fuse()
    assert new_x.shape == (case.x.shape[0], left, case.x.shape[2])
    assert (kept.diff(dim=1) > 0).all()
    assert ((kept >= 0) & (kept < tokens)).all()
    assert ((assignment >= 0) & (assignment < left)).all()
    assert torch.equal(assignment.gather(1, kept), torch.arange(left).expand_as(kept))
    assert torch.equal(new_size.sum(1), case.size.sum(1))  # whole numbers: exact
    assert torch.equal(new_size, torch.zeros_like(new_size).scatter_add(1, assignment, case.size))
    moved = kept.gather(1, assignment) != torch.arange(tokens)
    assert not moved[:, : case.prefix].any()
    assert not moved[:, tokens - case.suffix :].any()
    assert torch.equal(kept[:, : case.prefix], torch.arange(case.prefix).expand(len(kept), -1))
    assert torch.equal(kept[:, left - case.suffix :], torch.arange(tokens - case.suffix, tokens).expand(len(kept), -1))
    assert not touched(assignment, left)[:, : case.prefix].any()
    place = torch.arange(tokens) - case.prefix
    assert (place.expand_as(moved)[moved] % 2 == 0).all()
    assert (kept.gather(1, assignment)[moved] - case.prefix).remainder(2).eq(1).all()


@quick
@given(cases())
def test_untouched_tokens_come_back_bit_for_bit(case: Case) -> None:
    new_x, _, assignment, kept = case.fuse()
    alone = ~touched(assignment, kept.shape[1])
    row = torch.arange(len(kept)).unsqueeze(1)
    assert same_bits(new_x[alone], case.x[row, kept][alone])
    whole = alone.gather(1, assignment)
    assert same_bits(restore_tokens(new_x, assignment)[whole], case.x[whole])
    later = new_x * 1.5
    restored = restore_tokens(later, assignment, case.x, new_x)
    expected = later[row, assignment][whole]
    assert torch.equal(restored[whole], expected)  # adding zero may turn -0.0 into 0.0
    assert same_bits(restored[whole][expected != 0], expected[expected != 0])


@quick
@given(cases())
def test_rebase_repeats_the_reduction(case: Case) -> None:
    new_x, _, assignment, kept = case.fuse()
    assert same_bits(rebase(case.x, case.size, assignment, kept, case.strategy), new_x)


@quick
@given(cases(strategies=("mean", "mlerp")))
def test_norms(case: Case) -> None:
    case.x = case.x.float()
    new_x, _, assignment, kept = case.fuse()
    norms = case.x.double().norm(dim=2)
    largest = torch.zeros(kept.shape, dtype=torch.float64).scatter_reduce(1, assignment, norms, "amax")
    found = new_x.double().norm(dim=2)
    # mean: K products and sums and a division, so (K + 2) 2^-24 of the largest norm. mlerp: two float32 norms of C
    # squares, a division, two products: (C + 6) 2^-24.
    slack = (case.x.shape[1] + case.x.shape[2] + 6) * 2.0**-24 * largest
    assert (found <= largest + slack).all()
    if case.strategy == "mlerp":
        assert (found >= largest - slack).all()


@quick
@given(cases(), st.randoms(use_true_random=False))
def test_samples_do_not_see_each_other(case: Case, random: Random) -> None:
    outputs = case.fuse()
    assert all(same_bits(a, b) for a, b in zip(case.fuse(), outputs, strict=True))
    order = torch.tensor(random.sample(range(len(case.x)), len(case.x)))
    for found, value in zip(case.fuse(order), outputs, strict=True):
        assert same_bits(found, value[order])
    for b in range(len(case.x)):
        for found, value in zip(case.fuse(slice(b, b + 1)), outputs, strict=True):
            assert same_bits(found, value[b : b + 1])


@quick
@given(cases())
def test_gradient_is_finite_and_conserves_what_it_must(case: Case) -> None:
    x = case.x.double().requires_grad_()
    new_x, _, assignment, kept = fuse_tokens(x, case.metric, case.size, case.r, case.strategy, case.prefix, case.suffix)
    grad = torch.randn_like(new_x)
    new_x.backward(grad)
    assert x.grad is not None
    assert x.grad.isfinite().all()
    collected = torch.zeros_like(grad).scatter_add(1, assignment.unsqueeze(-1).expand_as(x), x.grad)
    alone = ~touched(assignment, kept.shape[1])
    assert torch.equal(collected[alone], grad[alone])
    if case.strategy != "mlerp":  # the members' weights sum to one
        torch.testing.assert_close(collected, grad, rtol=1e-6, atol=1e-6)  # the shares are float32
        return
    # Euler: y is homogeneous of degree one in x, so <grad_x, x> = <grad, y> in every group.
    left = torch.zeros(kept.shape, dtype=torch.float64).scatter_add(1, assignment, (x.grad * x).sum(2).detach())
    right = (grad * new_x).sum(2).detach()
    scale = new_x.detach().norm(dim=2) * grad.norm(dim=2)
    # Some 100 float64 operations (members + channels), stretched where members nearly cancel.
    assert ((left - right).abs() <= 100 * 2.0**-53 * scale * stretch(case, assignment, kept)).all()


def stretch(case: Case, assignment: Tensor, kept: Tensor) -> Tensor:
    """How much longer than the weighted mean the largest member of a group is, at least 1 (and 1 where it is zero)."""
    x, index = case.x.double(), assignment.unsqueeze(-1)
    shape = (*kept.shape, x.shape[2])
    weighted = case.size.double().unsqueeze(-1) * x
    total = torch.zeros(kept.shape, dtype=torch.float64).scatter_add(1, assignment, case.size.double())
    mean = torch.zeros(shape, dtype=torch.float64).scatter_add(1, index.expand_as(x), weighted) / total.unsqueeze(-1)
    largest = torch.zeros(kept.shape, dtype=torch.float64).scatter_reduce(1, assignment, x.norm(dim=2), "amax")
    length = mean.norm(dim=2)
    return torch.where(length == 0, 1.0, largest / length).clamp(min=1)


@quick
@given(cases(), st.integers(-(2**40), 2**40))
def test_permute_is_undone_by_restore(case: Case, seed: int) -> None:
    new_x, new_size, assignment, kept = permute_tokens(case.x, case.size, seed, case.prefix, case.suffix)
    assert same_bits(restore_tokens(new_x, assignment), case.x)
    assert torch.equal(new_size, case.size.gather(1, kept))
    assert torch.equal(kept.sort(dim=1).values, torch.arange(kept.shape[1]).expand_as(kept))
