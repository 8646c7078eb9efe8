"""The backend as users call it: by name, into inductor, in every dtype, and untouched where nothing is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.harness import MEANING_TOLERANCE, compiled, relative_error, same_bits
from tests.oracle.stream import Reducer, reference_vit
from tests.zoo import ZOO

# inductor fuses and vectorises: other orders of additions, an approximated exp and erf. Ten times the eager bound.
INDUCTOR_TOLERANCE = 10 * MEANING_TOLERANCE


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"r": 0}])
def test_no_reduction_gives_the_bits_of_the_inner_backend(inner: str, options: dict[str, Any]) -> None:
    entry = ZOO["dinov2_registers"]
    model, x = entry.model(), entry.batch()
    with torch.no_grad():
        outputs = compiled(model, inner_backend=inner, **options)(x)
        torch._dynamo.reset()
        assert same_bits(outputs, torch.compile(model, backend=inner)(x))


@pytest.mark.nightly("17 s; training below runs inductor on the same blocks, with their gradients")
def test_inductor_runs_a_reduced_vit() -> None:
    entry = ZOO["vit"]
    model, x = entry.model(), entry.batch()
    with torch.no_grad():
        outputs = compiled(model, inner_backend="inductor", r=4, strategy="mlerp")(x)
        expected = reference_vit(model, x, Reducer([("mlerp", 4)] * 3, 1))
    assert relative_error(outputs, expected) < INDUCTOR_TOLERANCE


@pytest.mark.nightly("12 s; the one below runs inductor on the same blocks, with their gradients")
def test_inductor_restores_the_tokens_that_are_returned() -> None:
    entry = ZOO["deit_distilled"]
    model, x = entry.model(), entry.batch()
    with torch.no_grad():
        outputs = compiled(model.forward_features, inner_backend="inductor", r=4, strategy="mean")(x)
        expected = reference_vit(model, x, Reducer([("mean", 4)] * 3, 2), features=True)
    assert relative_error(outputs, expected) < INDUCTOR_TOLERANCE


def test_inductor_trains() -> None:
    entry = ZOO["vit_gap"]
    model, x = entry.model().train(), entry.batch()
    model.blocks = model.blocks[:2]

    def step(call: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        nn.functional.cross_entropy(call(x), torch.tensor([1, 2])).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = step(compiled(model, inner_backend="inductor", r=4, strategy="mean"))
    expected = step(lambda x: reference_vit(model, x, Reducer([("mean", 4)] * 2)))
    scale = max(value.abs().max() for value in expected.values())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 4 * INDUCTOR_TOLERANCE * scale, name


def test_options_for_inductor_reach_it_and_unknown_ones_are_refused() -> None:
    entry = ZOO["vit"]
    with pytest.raises(
        torch._dynamo.exc.BackendCompilerFailed, match="'fastest_of_all' is not one of inductor's options"
    ):
        compiled(entry.model(), inner_backend="inductor", r=4, inductor={"fastest_of_all": True})(entry.batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["prune", "mean", "mlerp"])
def test_half_precision_stays_near_float32_where_both_match_the_same_tokens(dtype: torch.dtype, strategy: str) -> None:
    entry = ZOO["vit_gap"]
    model, x = entry.model().to(dtype), entry.batch().to(dtype)
    # The same rounded weights in float32, so that only the arithmetic differs. One reduction, from which each sample's
    # keys tell which tokens went: in half precision near ties fall the other way, and such samples are not compared.
    import tofu_fx

    options = {"r": [2, 0, 0], "strategy": strategy}
    with torch.no_grad():
        half = compiled(model, **options)(x)
        (groups,) = tofu_fx.token_groups(model, x, options=options)
        exact_model, exact_x = model.float(), x.float()
        exact = compiled(exact_model, **options)(exact_x)
        (exact_groups,) = tofu_fx.token_groups(exact_model, exact_x, options=options)
    assert half.dtype == dtype
    assert half.isfinite().all()
    same = (groups == exact_groups).all(1)
    # 3 layers of some 10 roundings of half an eps each, adding up in the worst case, over outputs of order one.
    bound = 30 * torch.finfo(dtype).eps
    if same.any():
        assert relative_error(half.float()[same], exact[same]) < bound
    else:
        pytest.skip("no sample has the same matching in both precisions: nothing to compare")


def test_same_inputs_give_the_same_bits_twice() -> None:
    entry = ZOO["hf_vit"]
    model, x = entry.model(), entry.batch()
    call = compiled(model, ratio=0.5)
    with torch.no_grad():
        assert same_bits(call(x), call(x))


def test_outputs_keep_the_type_that_the_model_returns() -> None:
    entry = ZOO["hf_clip"]
    model, x = entry.model(), entry.batch()
    with torch.no_grad():
        outputs, plain = compiled(model, r=4)(x, output_hidden_states=True), model(x, output_hidden_states=True)
    assert type(outputs) is type(plain)
    assert outputs.keys() == plain.keys()
    assert [h.shape for h in outputs.hidden_states] == [h.shape for h in plain.hidden_states]
    # Hidden states from before the first reduction are not touched.
    assert same_bits(outputs.hidden_states[:1], plain.hidden_states[:1])
