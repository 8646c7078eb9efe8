"""What is said of a model that Dynamo compiles in pieces, or again and again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tofu_fx
from tests.zoo import ZOO
from tofu_fx.errors import TofuWarning
from tofu_fx.testing import randomise

OPTIONS = {"inner_backend": "eager", "on_error": "raise", "r": 2, "profitable_only": False}


def said(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """The compiler's warnings during a call."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        call(*args, **kwargs)
    return [str(w.message) for w in caught if issubclass(w.category, TofuWarning)]


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="tofu", options=OPTIONS)


class Pieces(nn.Module):
    """A head and a tail of products, apart from what is between them by graph breaks."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.head, self.between, self.tail = nn.Linear(48, 48), between, nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        torch._dynamo.graph_break()
        x = self.between(x)
        torch._dynamo.graph_break()
        return self.tail(x).relu()


def blocks() -> nn.Module:
    return ZOO["vit"].model().blocks


def causal() -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 3, 96, batch_first=True)

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1))

    return Causal()


def test_pieces_without_attention_are_no_news_beside_a_reduced_one() -> None:
    model, x = Pieces(blocks()), torch.randn(2, 37, 48)
    call = compiled(model)
    assert said(call, x) == []
    assert said(call, torch.randn(3, 37, 48)) == []  # nor are they when they are compiled again
    with torch.no_grad():
        explanation = tofu_fx.explain(model, x, options=OPTIONS)
    assert explanation.summary == "3 of 3 attention sites reduced in 3 graphs"
    assert explanation.summary in str(explanation)


def test_model_in_pieces_of_which_none_is_reduced_says_so_once_with_the_reason() -> None:
    call = compiled(Pieces(causal()))
    (message,) = said(call, torch.randn(2, 37, 48))
    assert "nothing was accelerated: every attention was declined" in message
    assert "causal" in message
    assert said(call, torch.randn(2, 37, 48)) == []


def test_pieces_without_any_attention_say_so_once() -> None:
    (message,) = said(compiled(Pieces(nn.Linear(48, 48))), torch.randn(2, 37, 48))
    assert "has no attention" in message


def test_model_that_ends_with_a_graph_break_says_so_in_its_first_call() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = causal()

        def forward(self, x: Tensor) -> Tensor:
            x = self.inside(x)
            torch._dynamo.graph_break()
            return x

    (message,) = said(compiled(Ends()), torch.randn(2, 37, 48))
    assert "nothing was accelerated" in message


def test_two_models_with_the_same_options_are_told_apart() -> None:
    torch._dynamo.reset()
    good, idle = (torch.compile(m, backend="tofu", options=OPTIONS) for m in (Pieces(blocks()), Pieces(causal())))
    x = torch.randn(2, 37, 48)
    assert said(good, x) == []
    assert len(said(idle, x)) == 1


def test_reduced_model_that_runs_whole_for_other_inputs_says_so() -> None:
    call = compiled(Pieces(blocks()))
    assert said(call, torch.randn(2, 37, 48)) == []
    (message,) = said(call, torch.randn(0, 37, 48))
    assert "the call is empty" in message


def test_warnings_may_be_errors() -> None:
    call = compiled(Pieces(causal()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", TofuWarning)
        with pytest.raises(TofuWarning, match="nothing was accelerated"):
            call(torch.randn(2, 37, 48))
    assert call(torch.randn(2, 37, 48)).shape == (2, 37, 48)


def test_backend_that_is_called_without_dynamo_speaks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tofu_fx.summary.enclosing_call", lambda: None)
    messages = said(compiled(Pieces(causal())), torch.randn(2, 37, 48))
    assert sum("nothing was accelerated" in message for message in messages) == 3


def siglip2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.Siglip2VisionConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, num_patches=16, patch_size=4
    )
    inputs = {
        "pixel_values": torch.randn(2, 16, 48),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }
    return randomise(transformers.Siglip2VisionModel(config)), inputs


def test_siglip2_is_reduced_and_says_nothing_of_its_other_graphs() -> None:
    model, inputs = siglip2()
    assert said(compiled(model), **inputs) == []
    with torch.no_grad():
        explanation = tofu_fx.explain(model, options=OPTIONS, **inputs)
    assert len(explanation.graphs) > 1
    assert explanation.matched > 0


@torch._dynamo.config.patch(recompile_limit=3)
def test_last_length_that_dynamo_compiles_is_told_once() -> None:
    model = blocks()
    call = compiled(model)
    heard, whole = [], []
    for length in range(20, 31):
        x = torch.randn(2, length, 48)
        heard.append(sum("recompile_limit" in message for message in said(call, x)))
        with torch.no_grad():
            whole.append(torch.equal(call(x), model(x)))
    assert heard == [0, 0, 1] + [0] * 8
    assert whole == [False] * 3 + [True] * 8  # and it is true
