"""The ways in which a model is called and compiled: layouts in memory, modes, breaks, parts, empty batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import tofu_fx
from tests.harness import prove, relative_error, same_bits
from tests.zoo import ZOO
from tofu_fx.errors import TofuWarning
from tofu_fx.testing import randomise

R = 4
# The same float32 graph on the same values; a kernel may add in another order for another batch or memory layout.
ROUNDING = 2e-6


def vit() -> Any:
    return ZOO["vit"].model()


def images(batch: int = 2) -> Tensor:
    return ZOO["vit"].batch(batch)


def reduced(model: Any, backend: str = "eager", **kwargs: Any) -> Any:
    torch._dynamo.reset()
    options = {"inner_backend": backend, "on_error": "raise", "r": R, "strategy": "mlerp"}
    return torch.compile(model, backend="tofu", options=options, **kwargs)


def said(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns, and the warnings of the compiler."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = call()
    return value, [str(w.message) for w in caught if issubclass(w.category, TofuWarning)]


class ByBlocks(nn.Module):
    """A ViT whose forward is written out, with something of one's own around each block."""

    def __init__(self, around: Callable[[int, nn.Module, Tensor], Tensor], order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.vit, self.around, self.order = vit(), around, order

    def forward(self, x: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(x))
        for i, number in enumerate(self.order):
            x = self.around(i, self.vit.blocks[number], x)
        return self.vit.forward_head(self.vit.norm(x))


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "a slice of a larger one": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
}


@torch.no_grad()
@pytest.mark.parametrize("memory", MEMORY)
def test_inputs_may_lie_in_memory_as_they_like(memory: str) -> None:
    x = MEMORY[memory](images())
    assert memory == "channels last" or not x.is_contiguous()
    assert relative_error(reduced(vit())(x), reduced(vit())(x.contiguous())) < ROUNDING


@torch.no_grad()
def test_model_in_channels_last() -> None:
    model = vit().to(memory_format=torch.channels_last)
    assert relative_error(reduced(model)(MEMORY["channels last"](images())), reduced(vit())(images())) < ROUNDING


@torch.no_grad()
def test_fullgraph() -> None:
    assert same_bits(reduced(vit(), fullgraph=True)(images()), reduced(vit())(images()))


def test_inference_mode() -> None:
    with torch.no_grad():
        expected = reduced(vit())(images())
    with torch.inference_mode():
        found = reduced(vit())(images())
        assert found.is_inference()
        assert same_bits(found, expected)


@torch.no_grad()
@pytest.mark.parametrize(("backend", "dynamic"), [("eager", None), ("aot_eager", None), ("aot_eager", True)])
def test_empty_batch_gives_an_empty_output_and_says_why_nothing_is_reduced(backend: str, dynamic: bool | None) -> None:
    model = vit()
    call = reduced(model, backend, dynamic=dynamic)
    first = call(images())
    empty, messages = said(lambda: call(images()[:0]))
    assert empty.shape == (0, 10)
    assert any("the call is empty" in message for message in messages)
    assert relative_error(call(images()[:1]), first[:1]) < ROUNDING


@torch.no_grad()
def test_empty_batch_first() -> None:
    call = reduced(vit())
    assert call(images()[:0]).shape == (0, 10)
    assert same_bits(call(images()), reduced(vit())(images()))


def _cast(i: int, block: nn.Module, x: Tensor) -> Tensor:
    if i != 1:
        return block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return block(x)


def _uncast(i: int, block: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if i != 1:
            return block(x)
        with torch.autocast("cpu", enabled=False):
            return block(x.float())


class Cast(nn.Module):
    """A model that casts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = vit()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inside(x)


# bfloat16 keeps 8 bits: each product is off by 2^-9 = 0.002 relative, a few of them in a row by some 0.02.
BFLOAT16 = 0.03


@torch.no_grad()
@pytest.mark.parametrize("make", [Cast, lambda: ByBlocks(_cast), lambda: ByBlocks(_uncast)], ids=["all", "one", "rest"])
def test_autocast_region_inside_the_model(make: Callable[[], nn.Module]) -> None:
    model, x = make(), images()
    proofs = prove(model, x, r=R)
    assert proofs.identity
    assert len(proofs.matched) == 3
    assert proofs.permutation < BFLOAT16
    found, full = reduced(model)(x), reduced(vit())(x)
    assert found.dtype == model(x).dtype
    assert 1e-4 < relative_error(found.float(), full) < BFLOAT16  # it was cast, and reduced alike
    assert not torch.is_autocast_enabled("cpu")


class CastAhead(nn.Module):
    """Blocks and norm in a region; what needs whole tokens lies after it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = vit()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = self.inside.head(self.inside.forward_features(x))
        return tokens


@torch.no_grad()
def test_tokens_that_leave_an_autocast_region_are_restored_in_its_precision() -> None:
    model, x = CastAhead(), images()
    plain = model(x)
    found = reduced(model)(x)
    assert found.dtype == plain.dtype == torch.bfloat16
    proofs = prove(model, x, r=R)
    assert proofs.identity
    assert len(proofs.matched) == 3
    assert proofs.permutation < BFLOAT16
    assert max(proofs.meaning.values()) < BFLOAT16


@torch.no_grad()
def test_calibration_of_a_model_with_a_region_leaves_no_autocast_behind() -> None:
    plan = tofu_fx.calibrate(Cast(), images(4), flops=0.8, inner_backend="eager", batch_size=2, progress=False)
    assert any(row.r for row in plan.sites)
    assert not torch.is_autocast_enabled("cpu")


@torch.no_grad()
def test_failure_inside_an_autocast_region_leaves_no_autocast_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("tofu_fx.rewriting.reductions.Reductions.reduce", fail)
    with pytest.raises(Exception, match="on purpose"):
        reduced(Cast())(images())
    assert not torch.is_autocast_enabled("cpu")


@torch.no_grad()
def test_one_block_in_a_loop_is_one_site_for_each_turn() -> None:
    proofs = prove(ByBlocks(lambda i, block, x: block(x), order=(0, 0, 0)), images(), r=R).check()
    assert [site.id.rpartition(".")[2] for site in proofs.matched] == ["attn", "attn#2", "attn#3"]
    assert "mlerp" in proofs.meaning


class Broken(nn.Module):
    """A model that Dynamo cuts in two; each half has a stream of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = vit(), vit()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first.forward_features(x)
        torch._dynamo.graph_break()
        for block in self.second.blocks:
            tokens = block(tokens)
        return self.second.forward_head(self.second.norm(tokens))


@torch.no_grad()
def test_both_halves_of_a_model_with_a_graph_break_are_reduced() -> None:
    proofs = prove(Broken(), images(), r=R).check()
    assert len(proofs.matched) == 6
    assert proofs.messages == ["3 of 3 attention sites reduced"] * 2


@torch.no_grad()
def test_fragment_without_any_product_between_two_breaks_is_no_news() -> None:
    def fragment(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        x = x * 2 + 1
        torch._dynamo.graph_break()
        return x.relu()

    found, messages = said(lambda: reduced(fragment)(images()))
    assert not messages
    assert found.min() >= 0


@torch.no_grad()
def test_model_compiled_by_blocks_is_reduced_alike_in_each_and_says_what_that_is_worth() -> None:
    model, x = vit(), images()
    plain = model(x)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="tofu", options={"inner_backend": "eager", "on_error": "raise", "ratio": 0.5})
    found, messages = said(lambda: model(x))
    assert len(messages) == 1, "all blocks share one graph"
    assert "one block of a model" in messages[0]
    assert "compile the whole model" in messages[0]
    assert 1e-3 < relative_error(found, plain) < 2


@torch.no_grad()
def test_one_reduced_site_of_several_is_no_block() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = vit().blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    x = torch.randn(2, 37, 48)
    options = {"inner_backend": "eager", "on_error": "raise", "r": [0, 4, 0]}
    _, messages = said(lambda: torch.compile(Stream(), backend="tofu", options=options)(x))
    assert not messages


@torch.no_grad()
def test_block_with_a_batch_marked_dynamic_compiles_once() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = vit().blocks[0]

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.block(x) * scale.sum()

    call, x = reduced(Scaled()), torch.randn(4, 37, 48)
    torch._dynamo.mark_dynamic(x, 0)
    assert call(x, torch.ones(4)).shape == x.shape  # a guard on the batch would be an error here


@torch.no_grad()
def test_varying_length_is_right_at_each_and_says_that_each_is_compiled() -> None:
    config = transformers.BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, vocab_size=100
    )
    model = randomise(transformers.BertModel(config))
    call, heard = reduced(model, dynamic=True), []
    for length in (20, 31):
        ids = torch.randint(0, 100, (2, length), generator=torch.Generator().manual_seed(length))
        found, messages = said(lambda ids=ids: call(ids).last_hidden_state)  # type: ignore[misc]
        heard.append(sum("number of tokens is symbolic" in message for message in messages))
        assert 1e-3 < relative_error(found, model(ids).last_hidden_state) < 2
    assert heard == [1, 1]


@torch.no_grad()
def test_view_of_the_input_that_the_model_returns_stays_a_view() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48, num_heads=3, img_size=96).eval()

    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return model(x), x.flatten(1)

    x = images()
    _, flat = reduced(Both())(x)
    assert flat.data_ptr() == x.data_ptr()
