"""Rows that nobody reads are not computed: what is left of the graph, and that the outputs are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tofu_fx
from tests.harness import compiled, randomise, relative_error, same_bits
from tests.zoo import ZOO
from tofu_fx.backend import rewrite
from tofu_fx.plan.options import Options
from tofu_fx.testing import EAGER, capture, prove

WIDTH, HEADS, N = 24, 2, 11
# The same float32 products of fewer rows: another kernel adds up in another order, n * 6e-8 of the largest term.
ROUNDING = 2e-6


class Block(nn.Module):
    """A pre-norm block, causal or not, with fused attention or one that is written out."""

    def __init__(self, causal: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.causal, self.fused = causal, fused
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            if self.causal:
                later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, float("-inf"))
            mixed = scores.softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Two blocks and a head that reads what ``read`` takes of the tokens."""

    def __init__(self, read: Callable[[Tensor], Tensor], **block: Any) -> None:
        super().__init__()
        self.table, self.read = nn.Parameter(torch.randn(1, N, WIDTH)), read
        self.blocks = nn.ModuleList(Block(**block) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table
        for block in self.blocks:
            x = block(x)
        return self.head(self.read(self.norm(x)))


def tokens(batch: int = 3) -> Tensor:
    return torch.randn(batch, N, WIDTH, generator=torch.Generator().manual_seed(2))


#: what a head reads, and how many of the rows that is
READS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "the first": (lambda x: x[:, 0], 1),
    "the last": (lambda x: x[:, -1], 1),
    "the last, as a slice": (lambda x: x[:, -1:], 1),
    "the first two": (lambda x: x[:, :2], 2),
    "the first and the last": (lambda x: torch.cat([x[:, :1], x[:, -1:]], 1), 2),
    "two, one by one": (lambda x: x[:, 0] + x[:, 1], 2),
    "one in the middle": (lambda x: x.select(1, 4), 1),
}
READ_WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "their mean": lambda x: x.mean(1),
    "the first, beside the mean of all": lambda x: x[:, 0] + x.mean(1),
    "most of them": lambda x: x[:, 1:],
    "all": lambda x: x,
    "the largest": lambda x: x.amax(1),
    "some along each dim": lambda x: x[:, 0] + x[:, :, 0].mean(1, keepdim=True),
}


def outcome_of(model: nn.Module, **options: Any) -> Any:
    with torch.no_grad():
        gm, inputs = capture(model, tokens())
        return rewrite(gm, Options.parse({**EAGER, "unread": "drop", **options}), inputs)


def rows_of(compilation: Any, *names: str) -> list[int]:
    """The size of the second to last dim of what these ops make, in order."""
    nodes = [node for node in compilation.gm.graph.nodes if node.op == "call_function"]
    return [node.meta["val"].shape[-2] for node in nodes if node.target.__name__.split(".")[0] in names]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", READS)
def test_outputs_are_the_same_and_the_last_block_works_on_the_rows_that_are_read(
    name: str, causal: bool, fused: bool
) -> None:
    read, kept = READS[name]
    model = randomise(Model(read, causal=causal, fused=fused)).eval()
    compilation = outcome_of(model, r=0).compilation
    linear = rows_of(compilation, "linear")
    # Each block: queries, keys and values of all; projection and two of the MLP. At the end the head.
    assert linear[:5] == [N] * 5
    assert linear[5:8] == [kept] * 3
    assert [str(place) for place in compilation.unread] == [
        f"{N - kept} of {N} rows are read by nobody and not computed from blocks.1 on"
    ]
    with torch.no_grad():
        found = compiled(model, r=0, unread="drop")(tokens())
        assert relative_error(found, model(tokens())) < ROUNDING


@pytest.mark.parametrize("name", READ_WHOLE)
def test_where_all_rows_are_read_none_is_left_out(name: str) -> None:
    model = randomise(Model(READ_WHOLE[name])).eval()
    outcome = outcome_of(model, r=0)
    assert outcome.compilation.unread == ()
    with torch.no_grad():
        assert same_bits(compiled(model, r=0, unread="drop")(tokens()), model(tokens()))


def test_kept_rows_give_the_bits_of_the_untouched_model() -> None:
    model = randomise(Model(READS["the first"][0])).eval()
    with torch.no_grad():
        assert same_bits(compiled(model, r=0, unread="keep")(tokens()), model(tokens()))
        assert same_bits(compiled(model, r=0)(tokens()), model(tokens()))


@pytest.mark.parametrize("strategy", ["prune", "mean", "mlerp"])
@pytest.mark.parametrize("name", ["vit", "deit_distilled", "clip", "hf_vit_classifier", "torchvision_vit"])
def test_with_reductions_the_outputs_are_those_of_the_rows_kept(name: str, strategy: str) -> None:
    entry = ZOO[name]
    model, x = entry.model(), entry.batch()
    plan = tofu_fx.explain(model, x, options={"r": [4, 4, 0], "strategy": strategy, "unread": "keep"}).plan
    left = type(plan)(sites=plan.sites[:-1])
    with torch.no_grad():
        expected = compiled(model, plan=plan)(x)
        found = compiled(model, plan=left, unread="drop")(x)
        whole = compiled(model, plan=plan, unread="drop")(x)  # its row for the last one is passed over
        listed = compiled(model, r=[4, 4, 0], strategy=strategy, unread="drop")(x)
    assert relative_error(found, expected) < ROUNDING
    assert relative_error(found, model(x)) > 1e-3
    assert same_bits(whole, found)
    assert same_bits(listed, found)
    with pytest.raises(Exception, match=r"it says nothing of .* unread='drop'"):
        compiled(model, plan=left, unread="keep")(x)


def test_a_site_whose_tokens_nobody_reads_takes_none() -> None:
    entry = ZOO["vit"]
    explained = tofu_fx.explain(entry.model(), entry.batch(), options={"r": 4, "unread": "drop"})
    assert [row.r for row in explained.plan.sites] == [4, 4]
    assert "of its 37 tokens 1 is all that is read afterwards" in explained.sites[-1].reason
    assert explained.unread == ["36 of 37 rows are read by nobody and not computed from blocks.2.attn on"]
    assert explained.unread[0] in str(explained)


def test_operations_that_are_saved_are_counted() -> None:
    entry = ZOO["vit"]
    kept, dropped = (
        tofu_fx.explain(entry.model(), entry.batch(), options={"r": 0, "unread": unread}) for unread in ("keep", "drop")
    )
    assert kept.flops_after == kept.flops_before == dropped.flops_before
    batch, width, left = 2, 48, 36
    # The projection, the MLP of four times the width, and the queries' products with all 37 keys and values.
    saved = 2 * batch * left * (width * width + 2 * 4 * width * width + 2 * 37 * width)
    assert dropped.flops_before - dropped.flops_after == saved


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "einops_class", "encoder_batch_first"])
def test_proofs_hold_beside_it(name: str) -> None:
    entry = ZOO[name]
    prove(entry.model(), entry.batch(), options={"unread": "drop"}).check()


class Ending(Model):
    """As CLIP's text tower: of each sample the token at its end, which the input says."""

    def forward(self, x: Tensor, words: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.table
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[torch.arange(len(x)), self.places(words)])

    @staticmethod
    def places(words: Tensor) -> Tensor:
        return words.to(torch.int).argmax(-1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_one_token_of_each_sample_at_a_place_that_the_input_says(causal: bool, fused: bool, batch: int) -> None:
    model = randomise(Ending(lambda x: x, causal=causal, fused=fused)).eval()
    words = torch.randint(0, 99, (batch, N), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        explained = tofu_fx.explain(model, tokens(batch), words, options={"r": 0, "unread": "drop"})
        assert explained.unread == [f"{N - 1} of {N} rows are read by nobody and not computed from blocks.1 on"]
        call = compiled(model, r=0, unread="drop")
        for _ in range(2):
            assert relative_error(call(tokens(batch), words), model(tokens(batch), words)) < ROUNDING
            words = words.flip(1)


def test_places_that_depend_on_the_tokens_themselves_leave_all_rows() -> None:
    class Chosen(Ending):
        def forward(self, x: Tensor, words: Tensor) -> Tensor:  # type: ignore[override]
            for block in self.blocks:
                x = block(x)
            return self.head(x[torch.arange(len(x)), x[:, :, 0].argmax(-1)])

    model = randomise(Chosen(lambda x: x)).eval()
    words = torch.zeros(3, N)
    with torch.no_grad():
        explained = tofu_fx.explain(model, tokens(), words, options={"r": 0, "unread": "drop"})
        assert explained.unread == []
        assert same_bits(compiled(model, r=0, unread="drop")(tokens(), words), model(tokens(), words))


def test_tokens_and_a_batch_of_one_in_one_dim_and_back() -> None:
    class Regrouped(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x + self.table).transpose(0, 1)  # [N, 1, C]
            x = self.norm(F.gelu(x.flatten(0, 1)).unflatten(0, (N, 1)))
            return self.head(x[0])

    model = randomise(Regrouped(lambda x: x)).eval()
    with torch.no_grad():
        assert tofu_fx.explain(model, tokens(1), options={"r": 0}).unread
        assert relative_error(compiled(model, r=0, unread="drop")(tokens(1)), model(tokens(1))) < ROUNDING


def test_places_and_tokens_from_one_view_of_an_input() -> None:
    # CLIP's: the view stands ahead of everything, and the places, which are computed from it, are wanted early.
    class Words(Ending):
        def __init__(self) -> None:
            super().__init__(lambda x: x, causal=True)
            self.words = nn.Embedding(99, WIDTH)

        def forward(self, words: Tensor) -> Tensor:  # type: ignore[override]
            words = words.view(-1, N)
            return super().forward(self.words(words), words)

    model = randomise(Words()).eval()
    words = torch.randint(0, 99, (3, N), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert tofu_fx.explain(model, words, options={"r": 0}).unread
        assert relative_error(compiled(model, r=0, unread="drop")(words), model(words)) < ROUNDING


def test_places_counted_from_the_end() -> None:
    class Counted(Ending):
        @staticmethod
        def places(words: Tensor) -> Tensor:
            return words.sum(-1) - 1

    model = randomise(Counted(lambda x: x, causal=True)).eval()
    words = (torch.arange(N) < torch.tensor([[4], [0], [11]])).long()
    with torch.no_grad():
        call = compiled(model, r=0, unread="drop")
        assert relative_error(call(tokens(), words), model(tokens(), words)) < ROUNDING


def test_dropout_in_training_is_left_as_it_is() -> None:
    class Dropping(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.read(F.dropout(self.blocks[0](x), 0.5, self.training)))

    model = randomise(Dropping(READS["the first"][0])).train()
    with torch.enable_grad():
        gm, inputs = capture(model, tokens())
        outcome = rewrite(gm, Options.parse({**EAGER, "unread": "drop", "r": 0}), inputs)
    assert outcome.compilation is not None
    assert outcome.compilation.unread == ()


def test_gradients_are_those_of_the_untouched_model() -> None:
    model = randomise(Model(READS["the first"][0])).eval()

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        x = tokens().requires_grad_()
        call(x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    with torch.enable_grad():
        expected = [value.clone() for value in gradients(model)]
        found = gradients(compiled(model, r=0, unread="drop", inner_backend="aot_eager"))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 10 * ROUNDING * max(float(b.abs().max()), 1e-3)


@pytest.mark.parametrize("value", ["dropped", True, None])
def test_wrong_values_are_refused(value: Any) -> None:
    with pytest.raises(tofu_fx.OptionError, match="option 'unread': expected 'drop' or 'keep'"):
        Options.parse({"unread": value})
