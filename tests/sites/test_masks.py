"""Masks that hide some tokens from some others: what they hide is seen, and the attention declined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tofu_fx
from tests.harness import compiled, randomise
from tests.zoo.masked import ATTEND, Masked, N, R, are_there, filled_in_a_view, reasons, sample
from tofu_fx.sites import residual
from tofu_fx.sites.masks import MOST_OF_A_MASK
from tofu_fx.sites.residual import LOOKED_AT


def _positions(model: Any, x: Tensor) -> Tensor:
    """As transformers writes it: positions looked up by batch and place, then compared."""
    places = model.places[:, : x.shape[1]].expand(x.shape[0], -1)
    batch, q, k = torch.arange(x.shape[0]), torch.arange(x.shape[1]), torch.arange(x.shape[1])
    batch, q, k = batch[:, None, None, None], q[None, None, :, None], k[None, None, None, :]
    return (places[batch, k] <= places[batch, q]) & torch.ones((), dtype=torch.bool)


def _filled_by_rows(model: Any, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    for row in range(x.shape[1]):
        mask[row, row + 1 :] = False
    return mask


def _dropped_bias(model: Any, x: Tensor) -> Tensor:
    bias = F.dropout(model.bias, 0.1, training=True)  # an additive mask with something learnt and random in it
    return bias + model.upper[: x.shape[1], : x.shape[1]]


CAUSAL: dict[str, Callable[..., Tensor]] = {
    "row by row": _filled_by_rows,
    "around a learnt bias after dropout": _dropped_bias,
    "a product": lambda m, x: (
        torch.einsum("i,j->ij", m.places[0, : x.shape[1]] * 0 + 1, torch.ones(x.shape[1]).long()).tril().bool()
    ),
    "tril": lambda m, x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "a buffer": lambda m, x: m.lower[:, :, : x.shape[1], : x.shape[1]],
    "a buffer of numbers": lambda m, x: m.upper[: x.shape[1], : x.shape[1]] > -1,
    "arange": lambda m, x: torch.arange(x.shape[1])[None] <= torch.arange(x.shape[1])[:, None],
    "positions looked up": _positions,
    "cumsum": lambda m, x: (lambda c: c[None] <= c[:, None])(torch.ones(x.shape[1]).cumsum(0)),
    "outer difference": lambda m, x: torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1]) >= 0,
}


@torch.no_grad()
@pytest.mark.parametrize("how", CAUSAL)
def test_causal_mask_however_it_is_made_is_declined_and_nothing_leaks_back(how: str) -> None:
    model = randomise(Masked(CAUSAL[how]))
    (reason,) = reasons(model, sample())
    assert "causal" in reason
    changed = sample()
    changed[:, -5:] += 1
    torch.manual_seed(0)
    call = compiled(model, r=R)
    with pytest.warns(tofu_fx.TofuWarning, match="causal"):
        call(sample())
    torch.manual_seed(0)
    before = call(sample())
    torch.manual_seed(0)  # the same dropout
    after = call(changed)
    assert torch.equal(before[:, :-5], after[:, :-5])
    assert not torch.equal(before[:, -5:], after[:, -5:])


@torch.no_grad()
@pytest.mark.parametrize("spelling", ATTEND)
def test_causal_mask_is_found_in_every_spelling_of_attention(spelling: str) -> None:
    (reason,) = reasons(randomise(Masked(CAUSAL["a buffer"], ATTEND[spelling])), sample())
    assert "causal" in reason


@torch.no_grad()
def test_scores_that_are_written_through_a_view_are_declined() -> None:
    model = randomise(Masked(CAUSAL["a buffer"], filled_in_a_view))
    assert all(reasons(model, sample()))
    changed = sample()
    changed[:, -5:] += 1
    call = compiled(model, r=R)
    assert torch.equal(call(sample())[:, :-5], call(changed)[:, :-5])


@torch.no_grad()
@pytest.mark.parametrize("first", [torch.tensor(0.0), torch.zeros(4)])
def test_mask_that_an_input_may_make_causal_in_another_call_is_declined(first: Tensor) -> None:
    def chosen(m: Any, x: Tensor, flag: Tensor) -> Tensor:
        causal = (flag > 5).any() | (flag == 1).any()
        return torch.where(causal, CAUSAL["a buffer"](m, x), torch.ones(N, N, dtype=torch.bool))

    (reason,) = reasons(randomise(Masked(chosen)), sample(), first)
    assert "depends on an input" in reason


@torch.no_grad()
def test_judging_a_mask_changes_neither_inputs_nor_the_random_state() -> None:
    def written(m: Any, x: Tensor, there: Tensor) -> Tensor:
        mask = there[:, None, None]
        mask[..., 0] = True  # in place, in the caller's tensor: as the model itself does when it runs
        return mask | (F.dropout(m.bias, 0.5, training=True) > 1e9)

    model, there = randomise(Masked(written)), are_there([N - 9, N - 3])
    there[:, 0] = False
    graphs: list[Any] = []

    def keep(gm: Any, inputs: Any) -> Any:
        state = torch.random.get_rng_state()
        tofu_fx.backend.rewrite(gm, tofu_fx.Options.parse({"r": R}), inputs)
        assert not there[:, 0].any()
        assert torch.equal(torch.random.get_rng_state(), state)
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=keep)(sample(), there)
    assert graphs


@torch.no_grad()
def test_causal_mask_added_to_a_bias_that_the_model_computes_is_found() -> None:
    def biased(m: Any, x: Tensor, hidden: bool) -> Tensor:
        bias = (x @ x.transpose(1, 2))[:, None].tanh()
        return bias + m.upper[: x.shape[1], : x.shape[1]] if hidden else bias

    (reason,) = reasons(randomise(Masked(lambda m, x: biased(m, x, True))), sample())
    assert "causal" in reason
    assert reasons(randomise(Masked(lambda m, x: biased(m, x, False))), sample()) == {""}


@torch.no_grad()
def test_mask_of_pairs_is_declined() -> None:
    near = Masked(lambda m, x: (torch.arange(N)[:, None] - torch.arange(N)).abs() < 4)
    (reason,) = reasons(randomise(near), sample())
    assert "some others only" in reason
    documents = torch.arange(N).div(8, rounding_mode="floor").expand(2, -1)
    packed = Masked(lambda m, x, ids: (ids[:, :, None] == ids[:, None])[:, None])
    (reason,) = reasons(randomise(packed), sample(), documents)
    assert "some others only" in reason


@torch.no_grad()
def test_reason_says_that_the_making_of_a_mask_is_longer_than_is_followed() -> None:
    def long(m: Any, x: Tensor) -> Tensor:
        hides = torch.ones(N, N, dtype=torch.bool)
        for _ in range(MOST_OF_A_MASK):
            hides = hides.logical_not()
        return hides

    (reason,) = reasons(randomise(Masked(long)), sample())
    assert reason == f"the mask is made by more than the {MOST_OF_A_MASK} nodes that are followed: it may be causal"


@torch.no_grad()
def test_reason_says_that_no_end_of_a_branch_was_found_as_far_as_was_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Masked(lambda m, x: torch.ones(N, N, dtype=torch.bool)))
    assert reasons(model, sample()) == {""}
    monkeypatch.setattr(residual, "MOST_OF_A_BLOCK", 2)
    (reason,) = reasons(model, sample())
    assert reason.startswith("no add joins the attention")
    assert LOOKED_AT in reason


@torch.no_grad()
def test_packing_that_the_first_call_does_not_show_is_declined() -> None:
    packed = Masked(lambda m, x, ids: (ids[:, :, None] == ids[:, None])[:, None])
    (reason,) = reasons(randomise(packed), sample(), torch.zeros(2, N, dtype=torch.int64))
    assert "some others only" in reason


@torch.no_grad()
def test_mask_of_pairs_that_is_an_input_is_declined() -> None:
    (reason,) = reasons(randomise(Masked(lambda m, x, mask: mask)), sample(), torch.eye(N, dtype=torch.bool))
    assert "cannot be seen while compiling" in reason


@torch.no_grad()
@pytest.mark.parametrize("spelling", ["fused", "keys ahead"])
def test_padding_given_for_every_pair_is_served_and_a_causal_mask_in_a_later_call_never_leaks(
    spelling: str,
) -> None:
    model = randomise(Masked(lambda m, x, mask: mask, ATTEND[spelling]))
    padding = are_there([N - 9, N - 3])[:, None, None].expand(-1, 1, N, -1).contiguous()
    assert reasons(model, sample(), padding) == {""}
    call, other = compiled(model, r=R), sample(seed=7)
    reduced = call(sample(), padding)
    assert not torch.allclose(reduced, model(sample(), padding), atol=1e-3)
    causal = padding & torch.ones(N, N, dtype=torch.bool).tril()
    with pytest.warns(tofu_fx.TofuWarning, match="hides the same keys from all queries"):
        assert torch.equal(call(other, causal), model(other, causal))
    assert torch.equal(call(sample(), padding), reduced)
    assert not torch.allclose(call(other, ~padding), model(other, ~padding), atol=1e-3)


@torch.no_grad()
def test_without_example_inputs_a_mask_is_declined() -> None:
    graphs: list[Any] = []

    def keep(gm: Any, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(randomise(Masked(CAUSAL["a buffer"])), backend=keep)(sample())
    outcome = tofu_fx.backend.rewrite(graphs[0], tofu_fx.Options.parse({"r": R}))
    assert "cannot be seen while compiling" in outcome.message


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "gpt2_eager", "llama"])
def test_decoders_of_transformers_are_declined_with_or_without_a_mask(kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    attention = "eager" if kind == "gpt2_eager" else "sdpa"
    if kind == "llama":
        model = transformers.LlamaModel(
            transformers.LlamaConfig(
                vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
            )
        )
    else:
        model = transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, attn_implementation=attention)
        )
    model.config.use_cache = False
    ids = torch.randint(5, 99, (2, N))
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        rows = tofu_fx.explain(model.eval(), options={"r": R}, **inputs).sites
        assert len(rows) == 2
        assert all("causal" in row.reason for row in rows)
