"""What a mask hides, judged by its values: each verdict is that of a mask written out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.sites.tracing import B, Model, N, Traced, tokens, traced
from tofu_fx.sites.mask_values import FAR_BELOW, visible
from tofu_fx.sites.masks import Masks

Q, K = torch.arange(N)[:, None], torch.arange(N)
ALL, CAUSAL, NEAR, DOCUMENTS = torch.ones(N, N).bool(), K <= Q, (Q - K).abs() < 3, Q // 4 == K // 4
THERE = torch.arange(N).expand(B, -1) < torch.tensor([[N], [N - 4]])  # the second sample is padded


def parts(m: Model, x: Tensor) -> tuple[Tensor, ...]:
    return m.heads(m.qkv(m.norm(x)), 3)


def fused(m: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    return m.joined(F.scaled_dot_product_attention(*parts(m, x), attn_mask=mask))


def filled(m: Model, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = parts(m, x)
    return m.joined((q @ k.transpose(2, 3)).masked_fill(~mask, -1e9).softmax(-1) @ v)


def added(m: Model, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = parts(m, x)
    return m.joined((q @ k.transpose(2, 3) + torch.where(mask, 0.0, -1e4)).softmax(-1) @ v)


def behind(m: Model, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = parts(m, x)
    return m.joined(((q @ k.transpose(2, 3)).softmax(-1) * mask) @ v)


def masks_of(found: Traced, seen: bool = True) -> Masks:
    return Masks(found.gm, found.state, found.axes.depends, found.inputs if seen else None)


def judged(found: Traced, seen: bool = True, ahead: int = 0) -> str:
    (attention,) = found.attentions
    return masks_of(found, seen).judge(attention, N, ahead)


@functools.cache
def with_buffer(how: Callable[..., Any], like: torch.dtype, keys: int = N) -> Traced:
    """A model whose mask is a buffer, to be filled with any mask."""
    return traced(lambda m, x: how(m, x, m.mask), tokens(), mask=torch.zeros(N, keys, dtype=like))


def held(how: Callable[..., Any], mask: Tensor, ahead: int = 0) -> str:
    """What is hidden where the model itself holds the mask."""
    found = with_buffer(how, mask.dtype, mask.shape[1])
    found.model.mask.copy_(mask)
    return judged(found, ahead=ahead)


HIDES = {"nothing": ALL, "later": CAUSAL, "pairs": NEAR, "keys": K.expand(N, N) < N - 3}


@pytest.mark.parametrize("hides", HIDES)
@pytest.mark.parametrize("spell", [fused, filled, added, behind])
def test_what_is_hidden_is_seen_in_every_spelling(spell: Callable[..., Tensor], hides: str) -> None:
    assert held(spell, HIDES[hides]) == hides


#: masks of numbers that are added, and what they hide
ADDED = [
    ("a bias", torch.randn(N, N, generator=torch.Generator().manual_seed(0)), "nothing"),
    ("almost far enough", torch.where(CAUSAL, 0.0, -FAR_BELOW + 1), "nothing"),
    ("far enough", torch.where(CAUSAL, 0.0, -FAR_BELOW - 1), "later"),
    ("one that sees nothing", torch.where(Q == 3, -torch.inf, torch.zeros(N, N)), "later"),
    ("the other way round", torch.where(CAUSAL.T, 0.0, -1e9), "later"),
    ("packed documents", torch.where(DOCUMENTS, 0.0, -torch.inf), "pairs"),
]


@pytest.mark.parametrize(("name", "mask", "hides"), ADDED)
def test_numbers_hide_what_they_put_far_below_the_rest(name: str, mask: Tensor, hides: str) -> None:
    assert held(fused, mask) == hides


def test_visible_keys_are_near_the_highest_of_a_sample() -> None:
    inf, yes, no = torch.inf, True, False
    logits = [[[0.0, -50.0], [-10.0, torch.nan]], [[-100.0, -120.0], [-inf, -100.0]], [[0.0, -1.0], [-50.0, -50.0]]]
    sees = [[[yes, no], [yes, no]], [[yes, yes], [no, yes]], [[yes, yes], [no, no]]]
    assert visible(torch.tensor(logits)).tolist() == sees


@pytest.mark.parametrize("high", [1e20, torch.finfo(torch.float32).max])
def test_mask_that_lifts_what_is_seen_hides_the_rest(high: float) -> None:
    logits = torch.tensor([[high, 0.0], [high, high]], dtype=torch.float64)
    assert visible(logits).tolist() == [[True, False], [True, True]]
    assert held(fused, torch.where(CAUSAL, high, 0.0)) == "later"


def test_mask_from_an_input_is_judged_by_this_call_and_by_others_that_may_come() -> None:
    there, mask = torch.ones(B, N).bool(), ALL.clone()
    padded = traced(lambda m, x, there: fused(m, x, there[:, None, None]), tokens(), there)
    assert judged(padded) == "keys"  # nothing is hidden yet
    assert judged(padded, seen=False) == "unseen"
    there.copy_(THERE)
    assert judged(padded) == "keys"
    whole = traced(fused, tokens(), mask)
    assert judged(whole) == "unseen"  # another call may pass a causal one
    mask.copy_(CAUSAL)
    assert judged(whole) == "later"


def test_null_tokens_of_the_keys_are_no_tokens_of_the_queries() -> None:
    def nulls(m: Model, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = parts(m, x)
        k, v = (torch.cat([part[:, :, :2] * 0 + 1, part], 2) for part in (k, v))
        return m.joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    def verdict(null: Tensor, own: Tensor) -> str:
        return held(nulls, torch.cat([null, own], 1), ahead=2)

    open_, closed = torch.ones(N, 2).bool(), torch.zeros(N, 2).bool()
    assert verdict(open_, ALL) == "nothing"
    assert verdict(closed, HIDES["keys"]) == "keys"
    assert verdict(open_, CAUSAL) == "later"
    assert verdict((Q > 5).expand(N, 2), ALL) == "pairs"  # not the same null tokens for all


def test_guard_holds_for_masks_that_are_alike_for_all_queries() -> None:
    found = traced(fused, tokens(), THERE[:, None, None].expand(-1, 1, N, -1).clone())
    (attention,) = found.attentions
    guard = masks_of(found).guard(attention, N)
    assert guard is not None

    def holds(mask: Tensor) -> bool:
        given = [mask if value is found.inputs[place] else value for value in found.inputs]
        return guard.holds(given)

    place = next(i for i, value in enumerate(found.inputs) if value.shape == (B, 1, N, N))
    assert holds(found.inputs[place])
    assert holds(~found.inputs[place])
    assert not holds(CAUSAL.expand(B, 1, N, N))
    causal = traced(fused, tokens(), CAUSAL.expand(B, 1, N, N).clone())
    assert masks_of(causal).guard(causal.attentions[0], N) is None  # it does not hold in the first call


def test_guard_of_a_buffer_holds_until_more_is_hidden() -> None:
    found = traced(lambda m, x: fused(m, x, m.mask), tokens())
    (attention,) = found.attentions
    masks = masks_of(found)
    assert masks.judge(attention, N) == "nothing"
    guard = masks.state_guard(attention, N)
    assert guard is not None
    assert guard.holds(found.inputs)
    found.model.mask.normal_(generator=torch.Generator().manual_seed(0))
    assert guard.holds(found.inputs)  # another bias, which hides nothing
    found.model.mask.copy_(torch.where(CAUSAL, 0.0, -torch.inf))
    assert not guard.holds(found.inputs)
    found.model.mask.zero_()
    assert guard.holds(found.inputs)
    without = traced(lambda m, x: fused(m, x, None), tokens())
    assert masks_of(without).state_guard(without.attentions[0], N) is None
