"""Padding: merged away first, and never with what is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tofu_fx
from tests.harness import NIGHTLY, PERMUTATION_TOLERANCE, compiled, randomise, relative_error, study
from tests.zoo.handwritten import DIM, HEADS
from tests.zoo.masked import ATTEND, DEPTH, Masked, N, R, are_there, sample

STRATEGIES = ("prune", "mean", "mlerp")

#: a flag for each token ``[B, N]``, true where it is no padding -> the mask
PADDING: dict[str, Callable[..., Tensor]] = {
    "of keys": lambda m, x, there: there[:, None, None],
    "expanded": lambda m, x, there: there[:, None, None].expand(-1, 1, x.shape[1], -1),
    "of both sides": lambda m, x, there: (
        (there[:, None] & there[:, :, None])[:, None] | torch.eye(x.shape[1], dtype=torch.bool)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("spelling", [name for name in ATTEND if name != "after the softmax"])  # plain leaks there
@pytest.mark.parametrize("padding", ["of keys", "expanded"])
def test_padding_never_reaches_what_is_no_padding(padding: str, spelling: str) -> None:
    model, there = randomise(Masked(PADDING[padding], ATTEND[spelling])), are_there([N - 9, N - 3])
    other = torch.where(there[..., None], sample(), sample(seed=7))
    strategies = STRATEGIES if NIGHTLY else ("prune", "mlerp") if padding == "of keys" else ("mlerp",)
    variants = {name: {"r": R, "strategy": name} for name in strategies}
    found = study(model, sample(), there, variants=variants)
    changed = study(model, other, there, variants=variants, proofs=False)
    assert relative_error(found.outputs["permute"], found.outputs["plain"]) < PERMUTATION_TOLERANCE
    for strategy in strategies:
        assert len(found.reducing(strategy)) == DEPTH
        a, b = (outputs[there] for outputs in (found.outputs[strategy], changed.outputs[strategy]))
        assert torch.equal(a, b)
        assert relative_error(a, found.outputs["plain"][there]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_goes_first_so_that_a_short_sentence_is_left_alone(strategy: str) -> None:
    model, there = randomise(Masked(PADDING["of keys"])), are_there([5, 6], 40)
    plain, reduced = (
        call(sample(tokens=40), there)[there] for call in (model, compiled(model, r=4, strategy=strategy))
    )
    assert relative_error(reduced, plain) < PERMUTATION_TOLERANCE


@torch.no_grad()
def test_padding_that_the_first_call_does_not_show_is_kept_apart_in_the_next() -> None:
    model = randomise(Masked(PADDING["of keys"]))
    call = compiled(model, r=R, strategy="mean")
    call(sample(), are_there([N, N]))
    there = are_there([N - 9, N - 3])
    other = torch.where(there[..., None], sample(), sample(seed=7))
    assert torch.equal(call(sample(), there)[there], call(other, there)[there])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[8, 1], [8, 7], [3, 5]])
@pytest.mark.parametrize("r", [1, 4, (4, 2, 1)])
def test_padding_is_kept_apart_at_the_cap_too(lengths: list[int], r: Any) -> None:
    model = randomise(Masked(PADDING["of keys"]))
    warnings.simplefilter("ignore", tofu_fx.TofuWarning)  # r is capped, which is said
    for there in (are_there(lengths, 8), are_there(lengths, 8).flip(1)):
        call = compiled(model, r=r, strategy="mlerp")
        x = sample(tokens=8)
        a, b = call(x, there), call(torch.where(there[..., None], x, sample(tokens=8, seed=7)), there)
        assert torch.equal(a[there], b[there])


@torch.no_grad()
@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "attention"])
def test_key_padding_masks_of_torch_keep_padding_apart(kind: str, tokens_first: bool) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"batch_first": not tokens_first}
            layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, norm_first=True, **options)
            self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
            self.attention = nn.ModuleList(nn.MultiheadAttention(DIM, HEADS, **options) for _ in range(DEPTH))

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            x = x.transpose(0, 1) if tokens_first else x
            if kind == "encoder":
                x = self.encoder(x, src_key_padding_mask=padding)
            else:
                for attention in self.attention:
                    x = x + attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
                    x = x + self.encoder.layers[0].linear2(self.encoder.layers[0].linear1(x).relu())
            return x.transpose(0, 1) if tokens_first else x

    model, there = randomise(Padded()), are_there([N - 9, N - 3])
    rows = tofu_fx.explain(model, sample(), ~there, options={"r": R}).sites
    assert [row.reason for row in rows] == [""] * DEPTH
    call = compiled(model, r=R, strategy="mlerp")
    other = torch.where(there[..., None], sample(), sample(seed=7))
    assert torch.equal(call(sample(), ~there)[there], call(other, ~there)[there])


@torch.no_grad()
def test_sample_with_nothing_but_padding_is_finite() -> None:
    model = randomise(Masked(PADDING["of keys"], ATTEND["added"]))
    assert compiled(model, r=R)(sample(), are_there([0, N])).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "bert_eager", "distilbert", "t5_encoder"])
def test_text_encoders_of_transformers_keep_padding_apart(kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    make = {
        "bert": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes)),
        "bert_eager": lambda: transformers.BertModel(
            transformers.BertConfig(vocab_size=99, attn_implementation="eager", **sizes)
        ),
        "distilbert": lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
        ),
        "t5_encoder": lambda: transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        ),
    }
    model = randomise(make[kind]())
    ids = torch.randint(5, 99, (2, N), generator=torch.Generator().manual_seed(0))
    there = are_there([N - 9, N - 2])
    call = compiled(model, r=R, strategy="mlerp", placement="stream")
    a, b = (
        call(input_ids=torch.where(there, ids, other), attention_mask=there.long()).last_hidden_state[there]
        for other in (0, 7)
    )
    assert torch.equal(a, b)
    plain = model(input_ids=ids, attention_mask=there.long()).last_hidden_state[there]
    assert 1e-3 < relative_error(a, plain) < 1
