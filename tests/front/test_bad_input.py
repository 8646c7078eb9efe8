"""What happens when something is wrong: each case ends in its own message or its documented result."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tofu_fx
from tests.harness import EAGER, compiled, relative_error, same_bits, study
from tests.zoo import ZOO
from tests.zoo.handwritten import DEPTH, DIM, EinsumAttention, Plain
from tests.zoo.odd import Between, Causal, Halved, Weights, reverse_tokens
from tofu_fx import OptionError, PassError, PlanError, TofuError, TofuWarning, pipeline

X = torch.randn(2, 24, DIM, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Plain(EinsumAttention).eval()


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest) -> Any:
    with torch.set_grad_enabled("with_grad" in request.node.name):
        yield


def failure(model: Any, x: Tensor = X, **options: Any) -> BaseException:
    """What the backend raised, as torch.compile's user finds it inside BackendCompilerFailed."""
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(model, backend="tofu", options=options)(x)
    error = caught.value.inner_exception
    assert error is not None
    assert str(error) in str(caught.value)
    return error


def fallback(model: Any, x: Any = X, **options: Any) -> tuple[Any, list[str]]:
    """Outputs with on_error="fallback", and the TofuWarnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = compiled(model, **{"on_error": "fallback", **options})(x)
    return outputs, [str(w.message) for w in caught if issubclass(w.category, TofuWarning)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ration": 0.5}, ["unknown option 'ration'", "did you mean 'ratio'"]),
        ({"ratio": "half"}, ["option 'ratio'", "[0, 1)", "'half'"]),
        ({"ratio": 1.0}, ["option 'ratio'", "[0, 1)", "1.0"]),
        ({"ratio": -0.1}, ["option 'ratio'", "[0, 1)", "-0.1"]),
        ({"r": 2, "ratio": 0.5}, ["ratio", "r", "not both"]),
        ({"r": -1}, ["'r'", "negative"]),
        ({"r": 1.5}, ["option 'r'", "int", "1.5"]),
        ({"r": [1, 2]}, ["'r' lists 2", f"{DEPTH} attention sites"]),
        ({"strategy": "melt"}, ["option 'strategy'", "melt"]),
        ({"inner_backend": "nothing"}, ["option 'inner_backend'", "nothing"]),
    ],
)
def test_wrong_options_are_errors_that_name_the_key(
    model: nn.Module, options: dict[str, Any], words: list[str]
) -> None:
    error = failure(model, **{"inner_backend": "eager", **options})
    assert isinstance(error, OptionError)
    assert all(word in str(error) for word in words), str(error)


def test_r_that_leaves_no_token_is_capped_and_the_warning_says_the_cap(model: nn.Module) -> None:
    outputs, messages = fallback(model, r=1000)
    assert outputs.shape == (2, 10)
    assert any("r = 1000 capped at 12: 24 tokens" in message for message in messages), messages
    assert [row.tokens_out for row in tofu_fx.explain(model, X, options={"r": 1000}).sites] == [12, 6, 3]


def test_plan_of_another_model_names_the_first_site_that_differs(model: nn.Module) -> None:
    plan = tofu_fx.explain(model, X, options={"r": 2}).plan
    other = tofu_fx.Plan(sites=[row.model_copy(update={"heads": 7}) for row in plan.sites])
    error = failure(model, plan=other, **EAGER)
    assert isinstance(error, PlanError)
    assert re.search(r"site 0 has heads \d in the graph, 7 in the plan", str(error))


def test_plan_with_too_few_sites_says_which_is_missing(model: nn.Module) -> None:
    plan = tofu_fx.explain(model, X, options={"r": 2}).plan
    error = failure(model, plan=tofu_fx.Plan(sites=plan.sites[:2]), **EAGER)
    assert "2 sites, the graph 3" in str(error)
    assert "attentions.2" in str(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read", "No such file"]),
        ("{", ["is not JSON"]),
        (json.dumps({"sites": [], "color": 1}), ["color"]),
        (json.dumps({"version": 2, "sites": [{"id": "a"}]}), ["sites.0."]),
        (json.dumps({"version": 7, "sites": []}), ["version 7", "reads version 2"]),
    ],
)
def test_plan_file_that_cannot_be_used_is_an_error_that_names_the_file(
    model: nn.Module, tmp_path: Path, content: str | None, words: list[str]
) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    error = failure(model, plan=str(path), **EAGER)
    assert isinstance(error, PlanError)
    assert all(word in str(error) for word in [str(path), *words]), str(error)


def test_model_without_attention_warns_and_runs_untouched() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU()).eval()
    outputs, messages = fallback(model)
    why = "the graph has no attention between pairs of tokens (linear attention has none)"
    assert messages == [f"tofu_fx: nothing was accelerated: {why}"]
    assert same_bits(outputs, model(X))


def test_attention_over_one_free_token_is_declined_with_the_reason() -> None:
    class Prefixed(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.cat([self.norms[0].weight.expand(x.shape[0], 2, -1), x], 1))

    model = Prefixed(EinsumAttention).eval()
    outputs, messages = fallback(model, X[:, :1])
    assert len(messages) == 1
    assert "too few tokens: 3, of which 2 are protected" in messages[0]
    assert same_bits(outputs, model(X[:, :1]))


def test_nan_inputs_give_nan_outputs_of_their_own_sample_only(model: nn.Module) -> None:
    x = X.clone()
    x[1, 5] = float("nan")
    outputs = compiled(model, r=4)(x)
    assert outputs[1].isnan().all()
    assert torch.equal(outputs[0], compiled(model, r=4)(X)[0])


@pytest.mark.parametrize("op", ["sort", "cumsum", "custom"])
def test_op_without_a_rule_gets_whole_tokens_and_the_right_result(op: str) -> None:
    ops = {
        "sort": lambda x: x + x.sort(1).values * 0.1,
        "cumsum": lambda x: x + x.cumsum(1) * 0.1,
        "custom": lambda x: x + reverse_tokens(x),
    }
    model = Between(ops[op]).eval()
    explained = tofu_fx.explain(model, X, options={"r": 4, "placement": "stream"})
    assert any(op in barrier or "reverse_tokens" in barrier for barrier in explained.barriers)
    assert explained.matched == DEPTH
    found = study(model, X, variants={}, base={"placement": "stream"})
    assert len(found.reducing("permute")) == DEPTH
    assert relative_error(found.outputs["permute"], model(X)) < 1e-5
    assert compiled(model, r=4, placement="stream")(X).isfinite().all()


def test_graph_break_between_blocks_reduces_both_graphs() -> None:
    class Broken(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.block(self.block(x, 0), 1)
            torch._dynamo.graph_break()
            return self.head(self.block(x, 2).mean(1))

        def block(self, x: Tensor, i: int) -> Tensor:
            x = x + self.attentions[i](self.norms[2 * i](x))
            return x + self.mlps[i](self.norms[2 * i + 1](x))

    torch.manual_seed(0)
    model = Broken(EinsumAttention).eval()
    explained = tofu_fx.explain(model, X, options={"r": 4, "placement": "stream"})
    assert len(explained.graphs) == 2
    found = [(row.graph, row.reason, row.tokens_in) for row in explained.sites]
    assert found == [
        (0, "", 24),
        (0, "", 20),
        (1, "", 24),
    ]
    outputs, messages = fallback(model, r=4)
    assert not messages
    assert outputs.shape == (2, 10)
    assert 1e-3 < relative_error(outputs, model(X)) < 2


def test_no_compiler_for_inductor_is_one_clear_error(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *a, **k: None)
    error = failure(model)
    assert type(error) is TofuError
    assert "C++ compiler" in str(error)
    assert "apt-get install g++" in str(error)


def test_activation_checkpointing_with_grad_falls_back_to_the_untouched_graph() -> None:
    class Checkpointed(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed(EinsumAttention)
    outputs, messages = fallback(model)
    assert same_bits(outputs, model(X))
    assert len(messages) == 1
    assert "higher-order op" in messages[0]
    assert "checkpoint" in messages[0]


def test_autograd_function_with_grad_falls_back_and_keeps_its_gradient() -> None:
    model = Between(Halved.apply)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    outputs, messages = fallback(model, x)
    outputs.sum().backward()
    model(y).sum().backward()
    # torch 2.11 breaks the graph at the function instead of tracing it: then each piece says what it lacks.
    traced = [message for message in messages if "autograd_function" in message]
    assert len(traced) == len(messages) == 1 or (not traced and len(messages) > 1)
    assert relative_error(x.grad, y.grad) < 1e-6


@pytest.mark.parametrize("change", ["a_view", "all"])
def test_tokens_changed_in_place_where_it_shows_keep_the_right_values(change: str) -> None:
    def between(x: Tensor) -> Tensor:
        if change == "a_view":
            x[:, 3:9].mul_(2.0)
            return x
        y = x.view(x.shape)
        y.mul_(2.0)
        return x + y

    model = Between(between).eval()
    plan = tofu_fx.explain(model, X, options={"r": 4}).plan
    assert relative_error(study(model, X, variants={}).outputs["permute"], model(X)) < 1e-5
    reduced, messages = fallback(model, r=4)
    assert reduced.shape == (2, 10)
    assert plan.sites or any("in place" in message for message in messages)


def test_attention_weights_that_are_returned_keep_the_tokens_that_they_are_of_whole() -> None:
    model = Weights().eval()
    reasons = [row.reason for row in tofu_fx.explain(model, X, options={"r": 4}).sites]
    assert "attention weights are returned" in reasons[0]
    outputs, _ = fallback(model, r=4)
    plain = model(X)
    assert outputs[1].shape == (2, 4, 24, 24)
    assert torch.equal(outputs[1], plain[1])


def test_causal_attention_is_declined_and_the_result_is_plain() -> None:
    model = Plain(Causal).eval()
    outputs, messages = fallback(model)
    assert len(messages) == 1
    assert "every attention was declined" in messages[0]
    assert "causal" in messages[0]
    assert same_bits(outputs, model(X))


@pytest.mark.parametrize("name", [p.__name__ for p in pipeline.PASSES])
def test_pass_that_raises_leaves_the_plain_result_and_one_warning(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def broken(graph: Any) -> None:
        graph.at.node = graph.gm.graph.output_node().prev
        raise RuntimeError("on purpose")

    broken.__name__ = name
    monkeypatch.setattr(pipeline, "PASSES", tuple(broken if p.__name__ == name else p for p in pipeline.PASSES))
    outputs, messages = fallback(model, r=4)
    assert same_bits(outputs, model(X))
    assert len(messages) == 1
    assert re.search(rf"pass {name} failed at node \w+.*\(.*handwritten\.py:\d+\).*on purpose", messages[0])
    error = failure(model, r=4, **EAGER)
    assert isinstance(error, PassError)
    assert f"pass {name} failed at node" in str(error)


def test_fused_encoder_layers_are_declined_and_the_reason_says_what_to_call() -> None:
    model = ZOO["encoder_pre_norm"].model()
    torch.backends.mha.set_fastpath_enabled(True)
    outputs, messages = fallback(model)
    assert len(messages) == 1
    assert "torch.backends.mha.set_fastpath_enabled(False)" in messages[0]
    assert same_bits(outputs, model(X))
