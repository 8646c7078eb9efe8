"""Attention in its spellings: what is found is held by values against the queries and keys of plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.sites.tracing import HEADS, WIDTH, B, Model, N, Traced, tokens, traced
from tofu_fx.sites.attention import find_attentions, find_comparisons

SCALE = (WIDTH // HEADS) ** -0.5


def flat(x: Tensor) -> Tensor:
    """``[B, H, N, D]`` -> ``[B * H, N, D]``"""
    return x.flatten(0, 1)


#: q, k, v ``[B, H, N, D]`` -> what softmax(q . k^T) . v is, in any spelling
SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "matmul": lambda q, k, v: (q @ k.transpose(2, 3) * SCALE).softmax(-1) @ v,
    "scaled queries": lambda q, k, v: ((q * SCALE) @ k.transpose(2, 3)).softmax(-1) @ v,
    "bmm": lambda q, k, v: torch.bmm((torch.bmm(flat(q), flat(k).mT) * SCALE).softmax(-1), flat(v)).view(v.shape),
    "baddbmm": lambda q, k, v: torch.bmm(
        torch.baddbmm(torch.zeros(1, 1, 1), flat(q), flat(k).mT, alpha=SCALE).softmax(-1), flat(v)
    ).view(v.shape),
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE).softmax(-1), v
    ),
    "keys ahead": lambda q, k, v: torch.einsum(
        "bhkq,bhkd->bhqd", (torch.einsum("bhkd,bhqd->bhkq", k, q) * SCALE).softmax(2), v
    ),
    "keys on the left": lambda q, k, v: ((k @ q.transpose(2, 3)).transpose(2, 3) * SCALE).softmax(-1) @ v,
    "softmax turned": lambda q, k, v: ((q @ k.mT * SCALE).transpose(2, 3).softmax(-2)).transpose(2, 3) @ v,
    "masked, in two types, and dropped": lambda q, k, v: (
        F.dropout((q @ k.mT * SCALE).masked_fill(torch.eye(N).bool(), -1e4).double().softmax(-1).float(), 0.1, False)
        @ v
    ),
}


@functools.cache
def attending(*spellings: Callable[..., Tensor]) -> Traced:
    """One model with an attention in each spelling, on the same queries, keys and values."""
    return traced(lambda m, x: [m.joined(spell(*parts(m, x))) for spell in spellings], tokens())


def parts(model: Model, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, ``[B, H, N, D]``."""
    return model.heads(model.qkv(model.norm(x)), 3)


@pytest.mark.parametrize("name", SPELLINGS)
@torch.no_grad()
def test_queries_keys_and_softmax_are_those_that_the_model_computes(name: str) -> None:
    found = attending(*SPELLINGS.values())
    assert len(found.attentions) == len(SPELLINGS)
    attention = found.attentions[list(SPELLINGS).index(name)]
    q, k, v = parts(found.model, tokens())

    def laid_out(node: Any, token_dim: int, feature_dim: int) -> Tensor:
        return found.values[node].movedim((token_dim, feature_dim), (-2, -1)).reshape(B * HEADS, N, -1)

    query = laid_out(attention.query, attention.query_tokens, attention.query_features)
    torch.testing.assert_close(query, flat(q) * (SCALE if name == "scaled queries" else 1.0))
    torch.testing.assert_close(laid_out(attention.key, attention.key_tokens, attention.key_features), flat(k))
    torch.testing.assert_close(found.values[attention.node].flatten(), SPELLINGS[name](q, k, v).flatten())
    assert (attention.unrecognised, attention.causal, attention.mask) == (None, False, None)
    if name == "fused":
        assert attention.softmax is attention.scores is None
        return
    weights = laid_out(attention.softmax, attention.softmax_query_dim, attention.softmax_dim)
    logits = flat(q) @ flat(k).mT * SCALE
    if "masked" in name:
        logits = logits.masked_fill(torch.eye(N).bool(), -1e4)
    torch.testing.assert_close(weights.float(), logits.softmax(-1))
    assert attention.way[0] is attention.scores
    assert attention.after[0] is attention.softmax


@torch.no_grad()
def test_mask_and_flag_of_the_fused_op_are_read() -> None:
    mask = torch.randn(N, N)

    def both(m: Model, x: Tensor, mask: Tensor) -> list[Tensor]:
        attend = functools.partial(F.scaled_dot_product_attention, *parts(m, x))
        return [attend(attn_mask=mask), attend(is_causal=True)]

    found = traced(both, tokens(), mask)
    masked, causal = found.attentions
    assert torch.equal(found.values[masked.mask], mask)
    assert (masked.causal, causal.causal, causal.mask) == (False, True, None)


#: softmaxes and products that are no attention at all
NOTHING: dict[str, Callable[[Model, Tensor], Any]] = {
    "gate over channels": lambda m, x: m.up(x).softmax(-1) @ m.down.weight.T,
    "mixture of experts": lambda m, x: (m.up(x).softmax(-1).unsqueeze(-2) @ torch.ones(B, N, 2 * WIDTH, 3)).squeeze(),
    "classifier": lambda m, x: m.up(x.mean(1)).softmax(-1),
    "mlp": lambda m, x: m.mlp(x),
}


def test_softmax_without_queries_and_keys_is_no_attention() -> None:
    assert traced(lambda m, x: [how(m, x) for how in NOTHING.values()], tokens()).attentions == []


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(2, 3) * SCALE


#: near misses, and the words of why they are no attention that is known
STRANGE: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "weights that see their neighbours": (
        lambda q, k, v: F.conv2d(scores(q, k).softmax(-1), torch.ones(HEADS, HEADS, 1, 1)) @ v,
        "conv2d between the softmax and a product",
    ),
    "weights and their square": (
        lambda q, k, v: (lambda w: w * w)(scores(q, k).softmax(-1)) @ v,
        "mul.Tensor makes of the weights after the softmax more than a multiple",
    ),
    "a number over the weights": (lambda q, k, v: (1 / (1 + scores(q, k)).softmax(-1)) @ v, "is none of the known"),
    "sum over queries": (
        lambda q, k, v: scores(q, k).softmax(-1).transpose(2, 3) @ v,
        "does not sum over the axis that the softmax runs along",
    ),
    "einsum that mixes heads": (
        lambda q, k, v: torch.einsum("bhqd,bgkd->bgqk", q, k).softmax(-1) @ v,
        "einsum ahead of the softmax is none of the known ways",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_near_miss_is_found_and_says_what_it_is_not(name: str) -> None:
    found = attending(*(spell for spell, _ in STRANGE.values()))
    assert len(found.attentions) == len(STRANGE)
    decline = found.attentions[list(STRANGE).index(name)].unrecognised
    assert decline is not None
    assert STRANGE[name][1] in decline.reason


def test_tokens_compared_without_a_softmax_are_unrecognised_and_an_attention_is_not_counted_twice() -> None:
    found = attending(lambda q, k, v: F.relu(scores(q, k)) @ v)
    assert found.attentions == []
    (compared,) = find_comparisons(found.axes, [])
    assert compared.unrecognised is not None
    assert "relu after the product of queries and keys" in compared.unrecognised.reason
    known = attending(SPELLINGS["matmul"])
    assert list(find_comparisons(known.axes, find_attentions(known.axes))) == []


def test_causal_flag_of_the_fused_op_is_read() -> None:
    def both(m: Model, x: Tensor) -> Tensor:
        q, k, v = parts(m, x)
        fused = F.scaled_dot_product_attention
        return m.joined(fused(q, k, v) + fused(q, k, v, is_causal=True))

    assert [attention.causal for attention in traced(both, tokens()).attentions] == [False, True]
