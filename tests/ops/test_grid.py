"""tofu::fuse_tokens where the tokens are the places of an image: one destination in each cell."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.ops.streams import DTYPES, along, implementation, same_bits
from tests.oracle.branches import cells_of, reference_grid_match
from tests.oracle.operators import merge_error, reference_apply
from tofu_fx.ops import STRATEGIES, fuse_tokens, max_reduction, restore_tokens

quick = settings(max_examples=40, deadline=None)
both = pytest.mark.parametrize("path", ["cpp", "aten"])

# Cosines of float32 rows of at most 20 features are off by some (20/2 + 4) 2^-24 < 1e-6; two of them are compared.
CLEAR_MARGIN = 2e-6


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
    grid: tuple[int, int, int, int, int]

    @property
    def cells(self) -> list[list[int]]:
        return cells_of(*self.grid[:4])

    @property
    def cap(self) -> int:
        """All tokens of the image but one in each cell."""
        return math.prod(self.grid[:3]) - len(self.cells)

    def fuse(self, r: int | None = None, **others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, metric, size = (others.get(name, getattr(self, name)) for name in ("x", "metric", "size"))
        count = self.r if r is None else r
        return fuse_tokens(x, metric, size, count, self.strategy, self.prefix, self.suffix, self.grid)

    def destinations(self) -> list[int]:
        """Which places of the image stay when all that may go does: whatever they are compared by, one in each cell."""
        free = math.prod(self.grid[:3])
        return [int(place) - self.prefix for place in self.fuse(self.cap)[3][0]][self.prefix :][: free - self.cap]


def reference_match(case: Case, destinations: list[int]) -> tuple[list[dict[int, int]], float]:
    """The merges of each sample, and how clear they are."""
    return reference_grid_match(case.metric, case.r, case.prefix, math.prod(case.grid[:3]), destinations)


@st.composite
def cases(draw: st.DrawFn, exact: bool = False) -> Case:
    """Images of any shape, single rows and columns among them, between protected tokens.

    With ``exact`` every metric row is zero or has four entries of +-1: its norm is 2 and all cosines are multiples of
    1/4, so that ties abound and are ties in any precision.
    """
    batch, frames, cell = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(2, 4))
    height, width = draw(st.sampled_from([(1, 0), (0, 1), (0, 0), (0, 0)]))
    height, width = height or draw(st.integers(1, 7)), width or draw(st.integers(1, 9))
    prefix, suffix = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    grid = (frames, height, width, cell, draw(st.integers(0, 5)))
    tokens = prefix + suffix + frames * height * width
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    channels, features = draw(st.integers(1, 12)), draw(st.integers(4, 20))
    x = torch.randn(batch, tokens, channels, generator=generator).to(draw(st.sampled_from(DTYPES)))
    metric = torch.randn(batch, tokens, features, generator=generator)
    if exact:
        metric = metric.sign() * (torch.rand(batch, tokens, features, generator=generator).argsort(dim=-1) < 4)
        metric[torch.rand(batch, tokens, generator=generator) < draw(st.sampled_from([0.0, 0.2]))] = 0.0
    size = torch.randint(1, 5, (batch, tokens), generator=generator).float()
    cap = frames * height * width - len(cells_of(*grid[:4]))
    r = draw(st.one_of(st.integers(0, cap), st.just(cap)))
    return Case(x, metric, size, r, draw(st.sampled_from(STRATEGIES)), prefix, suffix, grid)


def image(height: int, width: int, strategy: str = "mean", r: int = 0, seed: int = 0, batch: int = 2) -> Case:
    """One image of random tokens after a class token."""
    generator = torch.Generator().manual_seed(height * 100 + width)
    x = torch.randn(batch, 1 + height * width, 6, generator=generator)
    metric = torch.randn(batch, 1 + height * width, 8, generator=generator)
    size = torch.randint(1, 5, (batch, 1 + height * width), generator=generator).float()
    return Case(x, metric, size, r, strategy, 1, 0, (1, height, width, 2, seed))


@both
@quick
@given(case=cases())
def test_any_seed_keeps_one_destination_in_each_cell_and_none_its_first(path: str, case: Case) -> None:
    with implementation(path):
        destinations = case.destinations()
        assert [sum(place in cell for place in destinations) for cell in case.cells] == [1] * len(case.cells)
        if case.grid[4] == 0:
            assert destinations == sorted(cell[0] for cell in case.cells)


@both
@quick
@given(case=cases(exact=True))
def test_equals_the_float64_reference_at_ties(path: str, case: Case) -> None:
    with implementation(path):
        merges, _ = reference_match(case, case.destinations())
        new_x, size, assignment, kept = case.fuse()
    expected, expected_size, expected_assignment, expected_kept = reference_apply(
        case.x, case.size, merges, case.strategy
    )
    assert torch.equal(kept, expected_kept)
    assert torch.equal(assignment, expected_assignment)
    assert torch.equal(size, expected_size)
    bound = merge_error(case.x, case.size, assignment, expected, case.strategy)
    # Members that nearly cancel have no meaningful direction: there the bound exceeds what could come out at all.
    hopeless = (bound > case.x.double().norm(dim=2).amax()) & (case.strategy == "mlerp")
    assert (((new_x.double() - expected.double()).abs() <= bound) | hopeless).all()


@both
@quick
@given(case=cases())
def test_equals_the_float64_reference_away_from_ties(path: str, case: Case) -> None:
    with implementation(path):
        merges, margin = reference_match(case, case.destinations())
        assume(margin > CLEAR_MARGIN)
        _, _, assignment, kept = case.fuse()
    _, _, expected_assignment, expected_kept = reference_apply(case.x, case.size, merges, "prune")
    assert torch.equal(kept, expected_kept)
    assert torch.equal(assignment, expected_assignment)


@quick
@given(case=cases(exact=True))
def test_both_implementations_choose_alike(case: Case) -> None:
    with implementation("cpp"):
        expected = case.fuse()
    with implementation("aten"):
        found = case.fuse()
    assert all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))


@both
@quick
@given(case=cases())
def test_restoring_keeps_the_bits_of_destinations_and_of_all_that_were_left_alone(path: str, case: Case) -> None:
    with implementation(path):
        new_x, size, assignment, kept = case.fuse()
        pruned = fuse_tokens(case.x, case.metric, case.size, case.r, "prune", case.prefix, case.suffix, case.grid)
    row = torch.arange(case.x.shape[0]).unsqueeze(1)
    back = restore_tokens(pruned[0], assignment)
    assert same_bits(back[row, kept], case.x[row, kept])
    alone = (size == case.size[row, kept]).unsqueeze(2)
    assert same_bits(torch.where(alone, new_x, 0.0), torch.where(alone, case.x[row, kept], 0.0))
    whole = restore_tokens(new_x, assignment)
    representative = kept.gather(1, assignment)
    assert same_bits(whole, whole[row, representative])


@both
@quick
@given(case=cases())
def test_sizes_add_up_and_protected_tokens_do_not_move(path: str, case: Case) -> None:
    with implementation(path):
        new_x, size, _, kept = case.fuse()
    left = case.x.shape[1] - case.r
    assert new_x.shape == (case.x.shape[0], left, case.x.shape[2])
    assert torch.equal(size.sum(1), case.size.sum(1))  # small integers: exact in float32
    assert (kept.diff(dim=1) > 0).all()
    assert kept[:, : case.prefix].tolist() == [list(range(case.prefix))] * len(kept)
    assert same_bits(new_x[:, : case.prefix], case.x[:, : case.prefix])
    assert same_bits(new_x[:, left - case.suffix :], case.x[:, case.x.shape[1] - case.suffix :])


@both
def test_a_small_image_by_hand(path: str) -> None:
    """4 x 4 places, cells of 2 x 2: places 0, 2, 8 and 10 stay. All look most like another cell's destination."""
    degrees = [0, 91, 90, 1,
               181, 271, 2, 92,
               180, 3, 270, 182,
               93, 4, 272, 183]  # fmt: skip
    size = torch.ones(1, 16)
    with implementation(path):
        _, new_size, assignment, kept = fuse_tokens(
            torch.randn(1, 16, 3), along(*degrees), size, 12, "prune", 0, 0, (1, 4, 4, 2, 0)
        )
    assert kept.tolist() == [[0, 2, 8, 10]]
    assert assignment.tolist() == [[0, 1, 1, 0, 2, 3, 0, 1, 2, 0, 3, 2, 1, 0, 3, 2]]
    assert new_size.tolist() == [[5.0, 4.0, 4.0, 3.0]]


@both
def test_the_most_similar_go_first_and_ties_to_the_first(path: str) -> None:
    metric = torch.ones(1, 4 * 40, 64)
    with implementation(path):
        _, _, assignment, kept = fuse_tokens(
            torch.randn(1, 160, 3), metric, torch.ones(1, 160), 3, "prune", 0, 0, (1, 4, 40, 2, 0)
        )
    # Row 0 has destinations at the even columns, so the first candidates are columns 1, 3 and 5; all join place 0.
    assert kept[0, :4].tolist() == [0, 2, 4, 6]
    assert assignment[0, :7].tolist() == [0, 0, 1, 0, 2, 0, 3]


@both
@pytest.mark.parametrize("features", [13, 64, 65])
@pytest.mark.parametrize(("height", "width"), [(3, 5), (7, 9), (8, 8), (13, 17), (1, 50), (24, 24)])
def test_equal_pairs_tie_wherever_they_stand(path: str, height: int, width: int, features: int) -> None:
    """BLAS gives the edge of a matrix other bits than its inside; padding makes these ties exact."""
    generator = torch.Generator().manual_seed(features)
    prototypes = torch.randn(6, features, generator=generator)
    which = torch.randint(0, 3, (2, height * width), generator=generator)
    destinations = [cell[0] for cell in cells_of(1, height, width, 2)]
    which[:, destinations] += 3  # candidates and destinations of different kinds: only equal pairs have equal scores
    x, size = torch.randn(2, height * width, 3), torch.ones(2, height * width)
    cap = height * width - len(destinations)
    for r in (cap // 2, cap):
        case = Case(x, prototypes[which], size, r, "prune", 0, 0, (1, height, width, 2, 0))
        merges, margin = reference_match(case, sorted(destinations))
        assert margin > CLEAR_MARGIN
        with implementation(path):
            _, _, assignment, kept = case.fuse()
        expected = reference_apply(x, size, merges, "prune")
        assert torch.equal(kept, expected[3])
        assert torch.equal(assignment, expected[2])


@both
def test_one_seed_gives_one_choice_and_others_give_others(path: str) -> None:
    with implementation(path):
        chosen = []
        for seed in (1, 2, 3):
            case = image(16, 16, r=128, seed=seed)
            torch.manual_seed(seed)  # the global generator has no say, and is not touched
            state = torch.random.get_rng_state()
            first = case.fuse()
            assert torch.equal(torch.random.get_rng_state(), state)
            torch.manual_seed(99)
            assert all(same_bits(a, b) for a, b in zip(case.fuse(), first, strict=True))
            chosen.append(tuple(case.destinations()))
    assert len(set(chosen)) == 3


def test_seeds_pick_every_place_of_a_cell_about_as_often() -> None:
    counts = [0] * 4
    for seed in range(1, 5):
        case = image(16, 16, seed=seed)
        destinations = set(case.destinations())
        for cell in case.cells:
            counts[next(i for i, place in enumerate(cell) if place in destinations)] += 1
    # 256 picks of 4: 64 each, standard deviation sqrt(256 * 3/16) = 7; five of these.
    assert all(abs(count - 64) <= 35 for count in counts), counts


def test_two_implementations_pick_the_same_places_for_a_seed() -> None:
    with implementation("cpp"):
        expected = image(9, 7, seed=4).destinations()
    with implementation("aten"):
        assert image(9, 7, seed=4).destinations() == expected


@both
def test_a_sample_does_not_depend_on_its_batch(path: str) -> None:
    case = image(9, 11, r=50, batch=5)
    with implementation(path):
        whole = case.fuse()
        for i in range(5):
            one = case.fuse(**{name: getattr(case, name)[i : i + 1] for name in ("x", "metric", "size")})
            assert all(same_bits(a, b[i : i + 1]) for a, b in zip(one, whole, strict=True))


@both
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_rows_that_are_not_finite_are_unlike_every_other_and_go_last(path: str, poison: float) -> None:
    metric = along(*range(16))
    metric[0, 5] = poison
    with implementation(path):
        x, _, _, kept = fuse_tokens(torch.randn(1, 16, 2), metric, torch.ones(1, 16), 11, "mean", 0, 0, (1, 4, 4, 2, 0))
    assert kept.tolist() == [[0, 2, 5, 8, 10]]
    assert x.isfinite().all()


@both
@pytest.mark.parametrize(
    ("grid", "cap"),
    [((1, 5, 5, 2), 16), ((1, 5, 5, 3), 21), ((1, 5, 5, 4), 21), ((1, 1, 25, 2), 12), ((1, 25, 1, 4), 18),
     ((5, 5, 1, 2), 10), ((1, 5, 5, 9, 3), 24)],
)  # fmt: skip
def test_the_cap_is_one_token_in_each_cell_and_its_error_names_it(path: str, grid: tuple[int, ...], cap: int) -> None:
    x, size = torch.randn(1, 28, 4), torch.ones(1, 28)
    assert max_reduction(28, 1, 2, grid) == cap
    with implementation(path):
        assert fuse_tokens(x, x, size, cap, "mean", 1, 2, grid)[0].shape == (1, 28 - cap, 4)
        with pytest.raises(ValueError, match=rf"r={cap + 1} is out of range: of 28 tokens 3 .* 0 and {cap}, .* cell"):
            fuse_tokens(x, x, size, cap + 1, "mean", 1, 2, grid)


@pytest.mark.parametrize(
    "grid",
    [(1, 4, 4), (1, 4, 4, 2, 0, 0), (1, 4, 5, 2, 0), (0, 4, 4, 2, 0), (1, -4, -4, 2, 0), (1, 4, 4, 0, 0),
     (1, 4, 4, 2, -1), (2, 4, 4, 2), (4, 4)],
)  # fmt: skip
def test_wrong_grids_are_refused_in_words_that_say_what_is_expected(grid: tuple[int, ...]) -> None:
    x = torch.randn(1, 18, 4)
    with pytest.raises(ValueError, match=r"fuse_tokens: grid must be \(frames, height, width, cell\)") as caught:
        fuse_tokens(x, x, torch.ones(1, 18), 4, "mean", 1, 1, grid)
    assert str(grid) in str(caught.value)


def test_a_grid_of_the_protected_tokens_too_says_how_many_are_free() -> None:
    x = torch.randn(1, 16, 4)
    with pytest.raises(ValueError, match=r"= 15 free tokens, got \(1, 4, 4, 2\)"):
        fuse_tokens(x, x, torch.ones(1, 16), 4, "mean", 1, 0, (1, 4, 4, 2))


def test_wrong_grids_and_counts_are_refused_while_compiling_too() -> None:
    x, size = torch.randn(1, 16, 4), torch.ones(1, 16)
    for r, grid, words in ((13, (1, 4, 4, 2), "r=13 is out of range"), (2, (1, 4, 5, 2), "grid must be")):
        torch._dynamo.reset()
        call = torch.compile(
            lambda x, r=r, grid=grid: fuse_tokens(x, x, size, r, "mean", 0, 0, grid)[0], backend="eager"
        )
        with pytest.raises(Exception, match=words):
            call(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_opcheck_with_a_grid(strategy: str, dtype: torch.dtype) -> None:
    case = image(3, 5, strategy)
    x = case.x.to(dtype).requires_grad_()
    for grid in ((1, 3, 5, 2, 7), (1, 3, 5, 2)):
        torch.library.opcheck(fuse_tokens, (x, case.metric.to(dtype), case.size, 8, strategy, 1, 0, grid))


def _layer(x: Tensor, size: Tensor) -> Tensor:
    y, new_size, assignment, kept = torch.ops.tofu.fuse_tokens(x, x, size, 20, "mlerp", 1, 0, [1, 6, 6, 2, 3])
    old = torch.ops.tofu.rebase(x.sin(), size, assignment, kept, "mlerp")
    return torch.ops.tofu.restore_tokens(y.tanh() + old * new_size.log().unsqueeze(-1), assignment, x, y)


def test_compiles_whole_forward_and_backward_for_every_batch() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_layer, backend=counter, fullgraph=True)
    for batch in (2, 5, 3):
        case, results = image(6, 6, batch=batch), []
        for call in (compiled, _layer):
            x, size = case.x.clone().requires_grad_(), case.size
            for tensor in (x, size):
                torch._dynamo.mark_dynamic(tensor, 0)
            out = call(x, size)
            out.square().sum().backward()
            assert x.grad is not None
            results.append((out.detach(), x.grad))
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("r", [0, 1, 9])
def test_gradient_with_a_grid(strategy: str, r: int) -> None:
    case = image(3, 5, strategy)
    x = case.x.double().requires_grad_()

    def there_and_back(t: Tensor) -> Tensor:
        merged, _, assignment, _ = fuse_tokens(t, case.metric, case.size, r, strategy, 1, 0, (1, 3, 5, 2, 2))
        return restore_tokens(merged * merged, assignment)

    assert torch.autograd.gradcheck(there_and_back, (x,))
