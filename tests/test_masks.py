"""Masks: what may be merged behind one, and what must not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tofu_fx
from tests.harness import PERMUTATION_TOLERANCE, compiled, randomise, relative_error, study
from tests.zoo.handwritten import DIM, HEADS, mlp

N, DEPTH, R = 24, 3, 4
STRATEGIES = ("prune", "mean", "mlerp")
#: q, k, v ``[B, H, N, D]`` and a mask -> the attention's output
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).masked_fill(~mask, -math.inf).softmax(-1) @ v


def _where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, q @ k.transpose(-2, -1), -1e9).softmax(-1) @ v


def _added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((1.0 - mask.float()) * torch.finfo(torch.float32).min + q @ k.transpose(-2, -1)).softmax(-1) @ v


def _einsum_keys_ahead(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhkq", q, k) + (1.0 - mask.float()).transpose(-2, -1) * -1e4
    return torch.einsum("bhkq,bhkd->bhqd", scores.softmax(-2), v)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def _filled_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = _scores(q, k)
    scores.masked_fill_(~mask, -math.inf)
    return scores.softmax(-1) @ v


def _filled_in_a_view(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = _scores(q, k)
    scores.view(scores.shape).masked_fill_(~mask, -math.inf)
    return scores.softmax(-1) @ v


def _behind_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (_scores(q, k).softmax(-1) * mask.float()) @ v


def _flattened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mask = mask.expand(*q.shape[:2], q.shape[2], -1).flatten(0, 1)
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).masked_fill(~mask, -math.inf)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, q.shape[:2])


ATTEND: dict[str, Attend] = {
    "fused": _fused,
    "masked_fill": _filled,
    "masked_fill in place": _filled_in_place,
    "where": _where,
    "added": _added,
    "keys ahead": _einsum_keys_ahead,
    "subtracted": lambda q, k, v, mask: (_scores(q, k) - 1e4 * (1 - mask.float())).softmax(-1) @ v,
    "added with alpha": lambda q, k, v, mask: torch.add(_scores(q, k), 1 - mask.float(), alpha=-1e9).softmax(-1) @ v,
    "scaled behind it": lambda q, k, v, mask: ((_scores(q, k) + (mask.float() - 1) * 50) * 20).softmax(-1) @ v,
    "a logarithm": lambda q, k, v, mask: (_scores(q, k) + mask.float().clamp(1e-30).log()).softmax(-1) @ v,
    "the smaller of two": lambda q, k, v, mask: torch.minimum(_scores(q, k), mask * 2e9 - 1e9).softmax(-1) @ v,
    "behind the softmax": _behind_softmax,
    "batch and heads in one": _flattened,
}


class Masked(nn.Module):
    """Pre-norm blocks behind one mask: ``make(model, x, *inputs)`` gives it, true where a query sees a key."""

    def __init__(self, make: Callable[..., Tensor], attend: Attend = _fused) -> None:
        super().__init__()
        self.make, self.attend = make, attend
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(DEPTH))
        self.out = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(DEPTH))
        self.mlps = nn.ModuleList(mlp() for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * DEPTH))
        self.bias = nn.Parameter(torch.zeros(N, N))
        self.register_buffer("lower", torch.ones(1, 1, 64, 64).tril().bool())
        self.register_buffer("upper", torch.full((64, 64), -math.inf).triu(1))
        self.register_buffer("places", torch.arange(64)[None])

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        mask = self.make(self, x, *inputs)
        for i in range(DEPTH):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + self.out[i](self.attend(q, k, v, mask).transpose(1, 2).flatten(2))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return x


def _x(batch: int = 2, tokens: int = N, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def _reasons(model: nn.Module, *inputs: Tensor) -> set[str]:
    return {row.reason.partition(" (/")[0] for row in tofu_fx.explain(model, *inputs, options={"r": R}).sites}


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
    "around a learnt bias behind dropout": _dropped_bias,
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
    (reason,) = _reasons(model, _x())
    assert "causal" in reason
    changed = _x()
    changed[:, -5:] += 1
    torch.manual_seed(0)
    call = compiled(model, r=R)
    with pytest.warns(tofu_fx.TofuWarning, match="causal"):
        call(_x())
    torch.manual_seed(0)
    before = call(_x())
    torch.manual_seed(0)  # the same dropout
    after = call(changed)
    assert torch.equal(before[:, :-5], after[:, :-5])
    assert not torch.equal(before[:, -5:], after[:, -5:])


@torch.no_grad()
@pytest.mark.parametrize("spelling", ATTEND)
def test_causal_mask_is_found_in_every_spelling_of_attention(spelling: str) -> None:
    (reason,) = _reasons(randomise(Masked(CAUSAL["a buffer"], ATTEND[spelling])), _x())
    assert "causal" in reason


@torch.no_grad()
def test_scores_that_are_written_through_a_view_are_declined() -> None:
    model = randomise(Masked(CAUSAL["a buffer"], _filled_in_a_view))
    assert all(_reasons(model, _x()))
    changed = _x()
    changed[:, -5:] += 1
    call = compiled(model, r=R)
    assert torch.equal(call(_x())[:, :-5], call(changed)[:, :-5])


@torch.no_grad()
@pytest.mark.parametrize("first", [torch.tensor(0.0), torch.zeros(4)])
def test_mask_that_an_input_may_make_causal_in_another_call_is_declined(first: Tensor) -> None:
    def chosen(m: Any, x: Tensor, flag: Tensor) -> Tensor:
        causal = (flag > 5).any() | (flag == 1).any()
        return torch.where(causal, CAUSAL["a buffer"](m, x), torch.ones(N, N, dtype=torch.bool))

    (reason,) = _reasons(randomise(Masked(chosen)), _x(), first)
    assert "hangs on an input" in reason


@torch.no_grad()
def test_judging_a_mask_changes_neither_inputs_nor_the_random_state() -> None:
    def written(m: Any, x: Tensor, there: Tensor) -> Tensor:
        mask = there[:, None, None]
        mask[..., 0] = True  # in place, in the caller's tensor: as the model itself does when it runs
        return mask | (F.dropout(m.bias, 0.5, training=True) > 1e9)

    model, there = randomise(Masked(written)), _there([N - 9, N - 3])
    there[:, 0] = False
    graphs: list[Any] = []

    def keep(gm: Any, inputs: Any) -> Any:
        state = torch.random.get_rng_state()
        tofu_fx.backend.rewrite(gm, tofu_fx.Options.parse({"r": R}), inputs)
        assert not there[:, 0].any()
        assert torch.equal(torch.random.get_rng_state(), state)
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=keep)(_x(), there)
    assert graphs


@torch.no_grad()
def test_causal_mask_added_to_a_bias_that_the_model_computes_is_found() -> None:
    def biased(m: Any, x: Tensor, hidden: bool) -> Tensor:
        bias = (x @ x.transpose(1, 2))[:, None].tanh()
        return bias + m.upper[: x.shape[1], : x.shape[1]] if hidden else bias

    (reason,) = _reasons(randomise(Masked(lambda m, x: biased(m, x, True))), _x())
    assert "causal" in reason
    assert _reasons(randomise(Masked(lambda m, x: biased(m, x, False))), _x()) == {""}


@torch.no_grad()
def test_mask_of_pairs_is_declined() -> None:
    near = Masked(lambda m, x: (torch.arange(N)[:, None] - torch.arange(N)).abs() < 4)
    (reason,) = _reasons(randomise(near), _x())
    assert "some others only" in reason
    documents = torch.arange(N).div(8, rounding_mode="floor").expand(2, -1)
    packed = Masked(lambda m, x, ids: (ids[:, :, None] == ids[:, None])[:, None])
    (reason,) = _reasons(randomise(packed), _x(), documents)
    assert "some others only" in reason


@torch.no_grad()
def test_packing_that_the_first_call_does_not_show_is_declined() -> None:
    packed = Masked(lambda m, x, ids: (ids[:, :, None] == ids[:, None])[:, None])
    (reason,) = _reasons(randomise(packed), _x(), torch.zeros(2, N, dtype=torch.int64))
    assert "some others only" in reason


@torch.no_grad()
def test_mask_of_pairs_that_is_an_input_is_declined() -> None:
    (reason,) = _reasons(randomise(Masked(lambda m, x, mask: mask)), _x(), torch.ones(N, N, dtype=torch.bool))
    assert "cannot be seen while compiling" in reason


@torch.no_grad()
def test_without_example_inputs_a_mask_is_declined() -> None:
    graphs: list[Any] = []

    def keep(gm: Any, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(randomise(Masked(CAUSAL["a buffer"])), backend=keep)(_x())
    outcome = tofu_fx.backend.rewrite(graphs[0], tofu_fx.Options.parse({"r": R}))
    assert "cannot be seen while compiling" in outcome.message


#: a flag for each token ``[B, N]``, true where it is no padding -> the mask
PADDING: dict[str, Callable[..., Tensor]] = {
    "of keys": lambda m, x, there: there[:, None, None],
    "expanded": lambda m, x, there: there[:, None, None].expand(-1, 1, x.shape[1], -1),
    "of both sides": lambda m, x, there: (
        (there[:, None] & there[:, :, None])[:, None] | torch.eye(x.shape[1], dtype=torch.bool)
    ),
}


def _there(lengths: list[int], tokens: int = N) -> Tensor:
    return torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("spelling", [name for name in ATTEND if name != "behind the softmax"])  # plain leaks there
@pytest.mark.parametrize("padding", ["of keys", "expanded"])
def test_padding_never_reaches_what_is_no_padding(padding: str, spelling: str) -> None:
    model, there = randomise(Masked(PADDING[padding], ATTEND[spelling])), _there([N - 9, N - 3])
    other = torch.where(there[..., None], _x(), _x(seed=7))
    variants = {name: {"r": R, "strategy": name} for name in STRATEGIES}
    found, changed = (study(model, x, there, variants=variants) for x in (_x(), other))
    assert relative_error(found.outputs["permute"], found.outputs["plain"]) < PERMUTATION_TOLERANCE
    for strategy in STRATEGIES:
        assert len(found.reducing(strategy)) == DEPTH
        a, b = (outputs[there] for outputs in (found.outputs[strategy], changed.outputs[strategy]))
        assert torch.equal(a, b)
        assert relative_error(a, found.outputs["plain"][there]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_goes_first_so_that_a_short_sentence_is_left_alone(strategy: str) -> None:
    model, there = randomise(Masked(PADDING["of keys"])), _there([5, 6], 40)
    plain, reduced = (call(_x(tokens=40), there)[there] for call in (model, compiled(model, r=4, strategy=strategy)))
    assert relative_error(reduced, plain) < PERMUTATION_TOLERANCE


@torch.no_grad()
def test_padding_that_the_first_call_does_not_show_is_kept_apart_in_the_next() -> None:
    model = randomise(Masked(PADDING["of keys"]))
    call = compiled(model, r=R, strategy="mean")
    call(_x(), _there([N, N]))
    there = _there([N - 9, N - 3])
    other = torch.where(there[..., None], _x(), _x(seed=7))
    assert torch.equal(call(_x(), there)[there], call(other, there)[there])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[8, 1], [8, 7], [3, 5]])
@pytest.mark.parametrize("r", [1, 4, (4, 2, 1)])
def test_padding_is_kept_apart_at_the_cap_too(lengths: list[int], r: Any) -> None:
    model = randomise(Masked(PADDING["of keys"]))
    warnings.simplefilter("ignore", tofu_fx.TofuWarning)  # r is capped, which is said
    for there in (_there(lengths, 8), _there(lengths, 8).flip(1)):
        call = compiled(model, r=r, strategy="mlerp")
        x = _x(tokens=8)
        a, b = call(x, there), call(torch.where(there[..., None], x, _x(tokens=8, seed=7)), there)
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

    model, there = randomise(Padded()), _there([N - 9, N - 3])
    rows = tofu_fx.explain(model, _x(), ~there, options={"r": R}).sites
    assert [row.reason for row in rows] == [""] * DEPTH
    call = compiled(model, r=R, strategy="mlerp")
    other = torch.where(there[..., None], _x(), _x(seed=7))
    assert torch.equal(call(_x(), ~there)[there], call(other, ~there)[there])


@torch.no_grad()
def test_sample_with_nothing_but_padding_is_finite() -> None:
    model = randomise(Masked(PADDING["of keys"], _added))
    assert compiled(model, r=R)(_x(), _there([0, N])).isfinite().all()


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
    there = _there([N - 9, N - 2])
    call = compiled(model, r=R, strategy="mlerp")
    a, b = (
        call(input_ids=torch.where(there, ids, other), attention_mask=there.long()).last_hidden_state[there]
        for other in (0, 7)
    )
    assert torch.equal(a, b)
    plain = model(input_ids=ids, attention_mask=there.long()).last_hidden_state[there]
    assert 1e-3 < relative_error(a, plain) < 1


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
