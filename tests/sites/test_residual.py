"""Where a stream may shrink: the residual add after an attention, held by value, and the tokens that are protected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sites.tracing import WIDTH, B, Model, N, Traced, tokens, traced
from tofu_fx.sites.residual import next_branch, place_site


def placed(found: Traced, place: int = 0) -> Any:
    """The site of an attention once its place has been looked for."""
    return place_site(found.site(place), found.axes, found.order)


def block(m: Model, x: Tensor) -> Tensor:
    return x + m.attend(m.norm(x))


#: a block, and the value that has the attention's branch added and nothing after it
BLOCKS: dict[str, tuple[Callable[[Model, Tensor], Tensor], Callable[[Model, Tensor], Tensor]]] = {
    "norm first": (lambda m, x: block(m, x) + m.mlp(m.norm2(block(m, x))), block),
    "norm last": (lambda m, x: m.norm(x + m.attend(x)), lambda m, x: x + m.attend(x)),
    "scaled branch": (lambda m, x: x + m.gamma * m.attend(x), lambda m, x: x + m.gamma * m.attend(x)),
    "scaled stream": (lambda m, x: 0.7 * x + m.attend(x) * 0.3, lambda m, x: 0.7 * x + m.attend(x) * 0.3),
    "another branch first": (
        lambda m, x: m.up(x + (m.attend(m.norm(x)) + m.mlp(m.norm(x)))),
        lambda m, x: x + m.attend(m.norm(x)) + m.mlp(m.norm(x)),
    ),
    "tokens first": (lambda m, x: block(m, x).transpose(0, 1).relu(), block),
    "tokens and batch in one": (
        lambda m, x: m.up(x.flatten(0, 1) + m.attend(m.norm(x)).flatten(0, 1)),
        lambda m, x: block(m, x).flatten(0, 1),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_stream_may_shrink_where_the_branch_has_been_added(name: str) -> None:
    how, expected = BLOCKS[name]
    found = traced(how, tokens())
    site = placed(found)
    assert site.decline is None, site.decline
    torch.testing.assert_close(found.values[site.reduce_at], expected(found.model, tokens()))
    assert (site.tokens, site.prefix, site.suffix, site.placement) == (N, 0, 0, "stream")


def within(m: Model, x: Tensor) -> Tensor:
    """Attention within windows of four tokens."""
    return m.attend(x.view(B * N // 4, 4, WIDTH)).view(B, N, WIDTH)


def of_a_map(m: Model, x: Tensor) -> Tensor:
    """A residual stream that stays a map of 3 x 4 places."""
    x = x.view(B, 3, 4, WIDTH)
    return x + m.attend(m.norm(x).flatten(1, 2)).view(B, 3, 4, WIDTH)


DECLINED: dict[str, tuple[Callable[[Model, Tensor], Any], str]] = {
    "no residual": (lambda m, x: m.attend(x).relu(), "no add joins the attention"),
    "a residual of other tokens": (lambda m, x: x.flip(1).exp() * 0 + m.attend(m.norm(x)).relu() * 2, "no add joins"),
    "windows": (lambda m, x: x + within(m, x), "attention within groups of 4 tokens"),
    "a map": (of_a_map, "the residual stream is a map of 3 x 4 tokens"),
    "one token": (lambda m, x: block(m, x[:, :1]), "there is one token"),
    "hardly any": (lambda m, x: block(m, torch.cat([m.token.expand(B, -1, -1), x[:, :1]], 1)), "too few tokens: 2"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_attention_without_a_place_is_declined_in_words(name: str) -> None:
    how, words = DECLINED[name]
    site = placed(traced(how, tokens()))
    assert site.decline is not None
    assert words in site.decline.reason


def with_token(m: Model, x: Tensor) -> Tensor:
    return torch.cat([m.token.expand(B, -1, -1), x], 1)


#: what is joined to the tokens, or read of them by its place near an end -> the protected ones at either end
PROTECTED: dict[str, tuple[Callable[[Model, Tensor], Any], tuple[int, int]]] = {
    "nothing": (block, (0, 0)),
    "a class token that nobody reads": (lambda m, x: block(m, with_token(m, x)).mean(1), (1, 0)),
    "the first token is read": (lambda m, x: block(m, x)[:, 0], (1, 0)),
    "the last but one is read": (lambda m, x: block(m, x)[:, -2], (0, 2)),
    "two are cut off in front": (lambda m, x: block(m, x)[:, 2:].mean(1) + block(m, x)[:, :2].sum(1), (2, 0)),
    "class token, and the last one read": (lambda m, x: block(m, with_token(m, x))[:, -1], (1, 1)),
    "the middle is read": (lambda m, x: block(m, x)[:, N // 2], (0, 0)),
    "a class token joined after": (
        lambda m, x: block(m, torch.cat([x, m.token.expand(B, -1, -1)], 1))[:, -1],
        (0, 1),
    ),
}


@pytest.mark.parametrize("name", PROTECTED)
def test_tokens_that_are_no_ordinary_ones_are_protected(name: str) -> None:
    how, ends = PROTECTED[name]
    site = placed(traced(how, tokens()))
    assert site.decline is None, site.decline
    assert (site.prefix, site.suffix) == ends
    assert site.free == site.tokens - sum(ends)


def test_image_that_the_tokens_come_from_is_known_without_its_class_token() -> None:
    def vit(m: Model, image: Tensor) -> Tensor:
        return block(m, with_token(m, m.patches(image).flatten(2).transpose(1, 2)))[:, 0]

    site = placed(traced(vit, torch.randn(B, 3, 6, 10)))
    assert (site.tokens, site.prefix, site.image) == (16, 1, (1, 3, 5))
    assert placed(traced(block, tokens())).image is None


@torch.no_grad()
def test_next_branch_is_what_the_next_residual_add_adds() -> None:
    def added(m: Model, y: Tensor) -> Tensor:
        h = m.norm2(y)
        return m.mlp(h) + h * 2  # an add, and no residual one

    def both(m: Model, x: Tensor) -> Tensor:
        y = block(m, x)
        return y + added(m, y)

    found = traced(both, tokens())
    add = placed(found).reduce_at
    assert add is not None
    branch = next_branch(add, found.order)
    assert branch is not None
    torch.testing.assert_close(found.values[branch], added(found.model, block(found.model, tokens())))
    last = traced(lambda m, x: m.up(block(m, x)), tokens())
    end = placed(last).reduce_at
    assert end is not None
    assert next_branch(end, last.order) is None
