"""The algebra of token axes: what views, cuts and concatenations make of atoms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tofu_fx.axes.atoms import Atom, Barrier, Base, Dim, dim_size, hint, token_dim
from tofu_fx.axes.space import Space


def token(size: int, prefix: int = 0, suffix: int = 0) -> Atom:
    """A run of tokens with protected ends."""
    return Atom(Base("tokens", size - prefix - suffix, "token", 0), -prefix, size)


def axis(space: Space, name: str, size: int) -> Dim:
    return space.fresh(name, size)


def test_merging_the_batch_with_the_tokens_and_splitting_them_gives_the_same_atoms() -> None:
    space = Space()
    axes = (axis(space, "B", 2), (token(7, 1),), axis(space, "C", 6))
    merged = space.regroup(axes, (14, 6))
    assert merged == ((*axes[0], *axes[1]), axes[2])
    assert space.regroup(merged, (2, 7, 6)) == axes


def test_splitting_features_into_heads_and_joining_them_gives_the_same_atom() -> None:
    space = Space()
    axes = (axis(space, "B", 2), (token(7),), axis(space, "C", 24))
    assert space.regroup(space.regroup(axes, (2, 7, 3, 4, 2)), (2, 7, 24)) == axes


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 3), max_size=3),
    data=st.data(),
)
def test_regrouping_keeps_every_position(sizes: list[int], cuts: list[int], data: st.DataObject) -> None:
    """Any view and the view back: the sizes are those asked for, and the axes those that were."""
    space = Space()
    axes = space.fresh_axes("x", sizes)
    shape = [math.prod(part) for part in _parts(sizes, cuts)]
    there = space.regroup(axes, shape)
    assert [dim_size(dim) for dim in there] == shape
    assert space.regroup(there, sizes) == axes


def _parts(sizes: list[int], cuts: list[int]) -> list[list[int]]:
    places = sorted({min(cut, len(sizes)) for cut in cuts} | {0, len(sizes)})
    return [sizes[places[i] : places[i + 1]] for i in range(len(places) - 1)]


def test_splitting_the_tokens_into_a_grid_is_a_barrier_that_says_the_numbers() -> None:
    space = Space()
    with pytest.raises(Barrier, match=r"the token axis \(12\) is split into 3 x 4"):
        space.regroup((axis(space, "B", 2), (token(12),)), (2, 3, 4))


def test_class_token_ahead_of_the_patches_becomes_the_lead_and_is_cut_off_again() -> None:
    space = Space()
    patches = axis(space, "patches", 9)
    joined = space.concatenate([((), 1, False), (patches, 9, True)], "cat")
    assert (joined[0].prefix, joined[0].suffix, joined[0].size) == (1, 0, 10)
    assert space.cut(joined, 1, 10) == patches


@given(prefix=st.integers(0, 5), suffix=st.integers(0, 5), free=st.integers(2, 9), data=st.data())
def test_cut_keeps_all_reducible_tokens_or_none_or_is_a_barrier(
    prefix: int, suffix: int, free: int, data: st.DataObject
) -> None:
    size = prefix + free + suffix
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    inside = set(range(start, stop)) & set(range(prefix, prefix + free))
    dim = (token(size, prefix, suffix),)
    if 0 < len(inside) < free:
        with pytest.raises(Barrier, match="are taken"):
            Space().cut(dim, start, stop)
        return
    part = Space().cut(dim, start, stop)
    assert dim_size(part) == stop - start
    assert any(atom.is_token for atom in part) == (len(inside) == free)
    if inside:
        assert (part[0].prefix, part[0].suffix) == (prefix - start, stop - prefix - free)


def test_tokens_of_two_streams_cannot_be_concatenated_along_their_axis() -> None:
    with pytest.raises(Barrier, match="concatenated"):
        Space().concatenate([((token(5),), 5, True), ((token(5),), 5, True)], "cat")


def test_runs_that_follow_each_other_join_again() -> None:
    space = Space()
    dim = (token(9, 2),)
    first, rest = space.cut(dim, 0, 2), space.cut(dim, 2, 9)
    joined = space.concatenate([(first, 2, True), (rest, 7, True)], "cat")
    assert joined == dim


def test_single_token_behind_prefix_tokens_knows_them() -> None:
    (joined,) = Space().concatenate([((), 2, False), ((), 1, True)], "cat")
    assert (joined.prefix, joined.size) == (2, 3)


def test_token_dim_refuses_a_tensor_that_carries_them_twice() -> None:
    tokens = (token(5),)
    assert token_dim(((), tokens, ())) == 1
    with pytest.raises(Barrier, match="2 places"):
        token_dim((tokens, tokens))


def test_hint_looks_at_a_symbol_without_pinning_it() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment = ShapeEnv()
    mode = torch._subclasses.FakeTensorMode(shape_env=environment)
    x = mode.from_tensor(torch.empty(5, 3), symbolic_context=None, static_shapes=False)
    assert hint(x.shape[0]) == 5
    assert not environment.guards
