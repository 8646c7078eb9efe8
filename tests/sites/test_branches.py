"""Where the branches of a block start and end: each entry, held by value, and what lies between it and the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sites.tracing import WIDTH, B, Model, N, Traced, tokens, traced
from tofu_fx.fx.nodes import is_op
from tofu_fx.sites.branches import place_branches
from tofu_fx.sites.site import Branch

ALL = ("attention", "mlp", "cross")
TEXT = 5


def placed(found: Traced, kinds: tuple[str, ...] = ALL, grid: tuple[int, int] | None = None, place: int = 0) -> Any:
    """The site of an attention once its block's branches have been looked for."""
    site = found.site(place)
    over_tokens = [a.node for a in found.attentions if a.query.meta["val"].shape == a.key.meta["val"].shape]
    return place_branches(site, found.axes, found.order, kinds, over_tokens, grid)


def block(m: Model, x: Tensor) -> Tensor:
    y = x + m.attend(m.norm(x))
    return y + m.mlp(m.norm2(y))


def with_text(m: Model, x: Tensor, text: Tensor) -> Tensor:
    y = x + m.attend(m.norm(x))
    z = y + m.read(m.norm3(y), text)
    return z + m.mlp(m.norm2(z))


def norm_last(m: Model, x: Tensor) -> Tensor:
    y = m.norm(x + m.attend(x))
    return m.norm2(y + m.mlp(y))


def side_by_side(m: Model, x: Tensor) -> Tensor:
    h = m.norm(x)
    return x + m.attend(h) + m.mlp(h)


def first(m: Model, x: Tensor) -> Tensor:
    return x + m.attend(m.norm(x))


Entries = list[tuple[str, Callable[[Model, Tensor, Tensor], Tensor]]]
#: a block, and of each of its branches the kind and the value at which it is entered
BLOCKS: dict[str, tuple[Callable[..., Tensor], Entries]] = {
    "norm first": (
        lambda m, x, text: block(m, x) + 0 * text.sum(),
        [("attention", lambda m, x, _: m.norm(x)), ("mlp", lambda m, x, _: m.norm2(first(m, x)))],
    ),
    "cross attention between": (
        with_text,
        [
            ("attention", lambda m, x, _: m.norm(x)),
            ("cross", lambda m, x, _: m.norm3(first(m, x))),
            ("mlp", lambda m, x, text: m.norm2(first(m, x) + m.read(m.norm3(first(m, x)), text))),
        ],
    ),
    "norm last": (
        lambda m, x, text: norm_last(m, x) + 0 * text.sum(),
        [("attention", lambda m, x, _: x), ("mlp", lambda m, x, _: m.norm(x + m.attend(x)))],
    ),
    "side by side": (  # what reads the same entry is no branch of its own
        lambda m, x, text: side_by_side(m, x) + 0 * text.sum(),
        [("attention", lambda m, x, _: m.norm(x))],
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_branches_are_entered_ahead_of_their_first_product(name: str) -> None:
    how, entries = BLOCKS[name]
    x, text = tokens(), tokens(TEXT, seed=1)
    found = traced(how, x, text)
    site = placed(found)
    assert site.decline is None, site.decline
    assert [branch.kind for branch in site.branches] == [kind for kind, _ in entries]
    for branch, (_, value) in zip(site.branches, entries, strict=True):
        torch.testing.assert_close(found.values[branch.enter], value(found.model, x, text))
        assert (branch.dim, branch.place) == (1, 0)
    assert site.reduce_at is site.branches[0].enter
    assert (site.placement, site.tokens, site.prefix, site.suffix, site.grid) == ("branch", N, 0, 0, None)


def products(branch: Branch) -> int:
    return sum(is_op(node, "linear") for node in branch.inside)


def test_inside_of_a_branch_are_the_ways_from_its_entry_to_its_end() -> None:
    found = traced(with_text, tokens(), tokens(TEXT, seed=1))
    attention, cross, mlp = placed(found).branches
    assert found.attentions[0].node in attention.inside
    assert found.attentions[1].node in cross.inside
    assert [products(branch) for branch in (attention, cross, mlp)] == [1, 2, 2]  # the text's keys are outside
    assert not attention.inside & cross.inside
    assert not cross.inside & mlp.inside
    assert all(branch.enter in branch.inside for branch in (attention, cross, mlp))


@pytest.mark.parametrize("kinds", [("attention",), ("attention", "mlp"), ("attention", "cross")])
def test_only_the_kinds_that_are_wanted_are_found(kinds: tuple[str, ...]) -> None:
    site = placed(traced(with_text, tokens(), tokens(TEXT, seed=1)), kinds)
    assert tuple(branch.kind for branch in site.branches) == kinds
    assert site.kinds == kinds


def test_branches_of_the_next_block_are_not_those_of_this_one() -> None:
    found = traced(lambda m, x: block(m, block(m, x)), tokens())
    one, two = placed(found, place=0), placed(found, place=1)
    assert [len(site.branches) for site in (one, two)] == [2, 2]
    assert not {branch.enter for branch in one.branches} & {branch.enter for branch in two.branches}


def image_tokens(m: Model, image: Tensor) -> Tensor:
    return m.patches(image).flatten(2).transpose(1, 2)


def test_image_and_protected_tokens_of_a_branch() -> None:
    def vit(m: Model, image: Tensor) -> Tensor:
        return block(m, torch.cat([m.token.expand(B, -1, -1), image_tokens(m, image)], 1))[:, 1:]

    site = placed(traced(vit, torch.randn(B, 3, 6, 8)))
    assert (site.tokens, site.prefix, site.suffix, site.image, site.grid) == (13, 1, 0, (1, 3, 4), (1, 3, 4))
    hidden = traced(block, tokens())
    assert placed(hidden, grid=(4, 3)).grid == (1, 4, 3)  # the user knows what the graph does not show
    assert placed(hidden, grid=(4, 4)).grid is None  # of other tokens than these


@pytest.mark.parametrize("text_first", [True, False])
@torch.no_grad()
def test_text_beside_an_image_is_protected(text_first: bool) -> None:
    def joined(m: Model, x: Tensor, text: Tensor) -> Tensor:
        both = torch.cat([text, x] if text_first else [x, text], 1)
        y = both + m.attend(m.norm(both))
        return y[:, TEXT:] if text_first else y[:, :-TEXT]

    x, text = tokens(), tokens(TEXT, seed=1)
    found = traced(joined, x, text)
    site = placed(found)
    assert site.decline is None, site.decline
    assert (site.tokens, site.prefix, site.suffix) == (N + TEXT, *((TEXT, 0) if text_first else (0, TEXT)))
    torch.testing.assert_close(
        found.values[site.reduce_at], found.model.norm(torch.cat([text, x] if text_first else [x, text], 1))
    )


def test_map_of_channels_is_entered_where_its_places_are_tokens() -> None:
    def unet(m: Model, image: Tensor) -> Tensor:
        x = m.patches(image)  # [B, C, 3, 4]
        h = m.attend(m.norm(x.flatten(2).transpose(1, 2)))
        return x + h.transpose(1, 2).reshape(B, WIDTH, 3, 4)

    site = placed(traced(unet, torch.randn(B, 3, 6, 8)))
    assert site.decline is None, site.decline
    assert (site.tokens, site.grid, len(site.branches)) == (12, (1, 3, 4), 1)


DECLINED: dict[str, tuple[Callable[[Model, Tensor], Any], str]] = {
    "no residual": (lambda m, x: m.attend(m.norm(x)).relu(), "the branch has no end"),
    "a residual that the branch does not read": (lambda m, x: x.flip(1) + m.attend(m.norm(x)), "the branch has no end"),
    "one token": (lambda m, x: block(m, x[:, :1]), "there is one token"),
    "hardly any": (lambda m, x: block(m, torch.cat([m.token.expand(B, -1, -1), x[:, :1]], 1)), "too few tokens: 2"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_block_without_a_branch_is_declined_in_words(name: str) -> None:
    how, words = DECLINED[name]
    site = placed(traced(how, tokens()))
    assert site.decline is not None
    assert words in site.decline.reason
