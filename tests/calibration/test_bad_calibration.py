"""Everything that calibration cannot work with is refused in words that say what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tofu_fx
from tests.harness import randomise
from tests.zoo import ZOO
from tofu_fx import CalibrationError, Plan, PlanError

ENTRY = ZOO["vit_avg_of_patches"]
QUICK: dict[str, Any] = {"inner_backend": "eager", "progress": False}
X = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomise(ENTRY.model())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "no batch in them"),
        (iter(()), "no batch in them"),
        ([[[X]]], "holds a list where a tensor is expected"),
        (["image.png"], "batch 0 is a str"),
        ("photos", "inputs: expected a tensor"),
        (3, "got int"),
        (X[:0], "no tensor with samples"),
        ([X, X[:, :, :48]], "batch 1 has shapes"),
        ([X, torch.full_like(X, torch.nan)], "batch 1 holds NaN"),
        ({}, "no tensor with samples"),
        ([torch.tensor(1.0)], "no tensor with samples"),
    ],
)
def test_inputs_that_cannot_be_used(model: nn.Module, inputs: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        tofu_fx.calibrate(model, inputs, flops=0.8, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"speedup": 1.5, "flops": 0.6}, "one target, not speedup and flops"),
        ({"speedup": 0.9}, "speedup: expected a number above 1, got 0.9"),
        ({"flops": 1.2}, "flops: expected a number above 0 and below 1, got 1.2"),
        ({"flops": True}, "flops: expected a number"),
        ({"error": 0}, "error: expected a number above 0, got 0"),
        ({"error": "small"}, "error: expected a number above 0, got 'small'"),
        ({"policy": "guess"}, "policy: expected one of 'auto', 'sensitivity', 'linearity', got 'guess'"),
        ({"inner_backend": "inducter"}, "inner_backend: expected one of 'inductor', .*, got 'inducter'"),
        ({"seed": None}, "seed: expected a whole number of at least 0, got None"),
        ({"batch_size": 2.5}, "batch_size: expected a whole number of at least 1, got 2.5"),
        ({"metric": ["kl"], "flops": 0.8}, "one of relative_l2, kl, got"),
        ({"metric": lambda a, b: -(a - b).abs().mean(), "flops": 0.8}, "must not be negative"),
        ({"metric": "psnr", "flops": 0.8}, "one of relative_l2, kl, got 'psnr'"),
        ({"metric": lambda outputs, plain: "good", "flops": 0.8}, "must return a number or a tensor"),
        ({"metric": lambda outputs, plain: 1.0, "flops": 0.8}, "of equal outputs is 1; it must be an error"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
    ],
)
def test_arguments_that_cannot_be_used(model: nn.Module, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        tofu_fx.calibrate(model, X, **{**QUICK, **arguments})


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(CalibrationError, match="model: expected a module or a function, got str"):
        tofu_fx.calibrate("vit", X, **QUICK)


def test_reductions_that_give_no_numbers_give_no_plan(model: nn.Module) -> None:
    def never(outputs: Tensor, plain: Tensor) -> Tensor:
        return (outputs - plain).abs().mean() if torch.equal(outputs, plain) else torch.tensor(torch.nan)

    for target in ({"flops": 0.8}, {"error": 0.1}):
        with pytest.raises(CalibrationError, match=r"no numbers|cannot be met"):
            tofu_fx.calibrate(model, X, metric=never, **QUICK, **target)


def test_graphs_whose_sites_have_one_name_are_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.mlp = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            q, k, v = self.qkv(x).chunk(3, -1)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v)
            return x + self.mlp(x)

    class Narrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for number, block in enumerate(self.blocks):
                x = block(x[:, : 20 - 8 * number])
            return x.mean(1)

    with pytest.raises(CalibrationError, match="could not be distinguished; find the break"):
        tofu_fx.calibrate(Narrowing().eval(), torch.randn(2, 20, 16), **QUICK)


def test_operations_that_cannot_be_reached_say_the_least(model: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="cannot be reached") as caught:
        tofu_fx.calibrate(model, X, flops=0.05, **QUICK)
    found = re.search(r"can do is (0\.\d+)", str(caught.value))
    assert found is not None
    least = float(found[1])
    assert 0.1 < least < 0.9
    assert tofu_fx.calibrate(model, X, flops=least + 0.01, **QUICK).calibration is not None


@pytest.mark.true_speed
def test_speedup_that_cannot_be_reached_says_the_best_that_was_measured(model: nn.Module) -> None:
    with pytest.raises(CalibrationError, match=r"speedup=500 cannot be reached: the best that was measured is \d"):
        tofu_fx.calibrate(model, X, speedup=500.0, **QUICK)


def test_error_that_cannot_be_met_says_the_least(model: nn.Module) -> None:
    with pytest.raises(CalibrationError, match=r"error=1e-09 \(relative_l2\) cannot be met.*is \d"):
        tofu_fx.calibrate(model, X, error=1e-9, metric="relative_l2", **QUICK)


def test_model_without_a_site_says_why() -> None:
    with pytest.raises(CalibrationError, match=r"no site .* its graphs have no attention"):
        tofu_fx.calibrate(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), torch.randn(2, 3, 4), **QUICK)

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with pytest.raises(CalibrationError, match=r"no site .* causal"):
        tofu_fx.calibrate(Causal().eval(), torch.randn(2, 6, 8), **QUICK)


def test_plain_outputs_that_are_no_numbers(model: nn.Module) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) * torch.nan

    with pytest.raises(CalibrationError, match="outputs hold NaN for calibration batch 0"):
        tofu_fx.calibrate(Broken().eval(), X, flops=0.8, **QUICK)


def test_model_that_is_random_in_eval_mode(model: nn.Module) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            y = self.model(x)
            return y + torch.rand_like(y) * y.abs().max()

    with pytest.raises(CalibrationError, match="random in eval mode"):
        tofu_fx.calibrate(Noisy().eval(), X, flops=0.8, metric="relative_l2", **QUICK)


# ---- plans that do not fit -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(model: nn.Module) -> dict[str, Any]:
    with torch.no_grad():
        return tofu_fx.explain(model, X, options={"r": 4}).plan.model_dump()


def _edited(content: dict[str, Any], **row: Any) -> dict[str, Any]:
    return {**content, "sites": [{**content["sites"][0], **row}, *content["sites"][1:]]}


def _use(model: nn.Module, plan: Any) -> Any:
    with torch.no_grad():
        return tofu_fx.explain(model, X, options={"plan": plan})


def test_unedited_plan_fits(model: nn.Module, content: dict[str, Any]) -> None:
    assert _use(model, content).matched == 3


def test_unknown_strategy_names_row_and_key(model: nn.Module, content: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"sites\.0\.strategy: .*'mlerp'.* got 'melt'"):
        _use(model, _edited(content, strategy="melt"))


def test_more_tokens_than_can_go_says_how_many_can(model: nn.Module, content: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"takes 19 tokens at 'blocks\.0\.attn'.* 37 .* at most 18"):
        _use(model, _edited(content, r=19))
    assert _use(model, _edited(content, r=18)).sites[0].tokens_out == 19


def test_later_row_is_held_to_the_tokens_that_are_left(model: nn.Module, content: dict[str, Any]) -> None:
    rows = [{**row, "r": r} for row, r in zip(content["sites"], (18, 9, 5), strict=True)]
    with pytest.raises(PlanError, match=r"takes 5 tokens at 'blocks\.2\.attn'.* 10 .* at most 4"):
        _use(model, {**content, "sites": rows})


def test_plan_of_another_version_says_so(content: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"version 1, this tofu_fx reads version 2: make the plan again"):
        Plan.load({**content, "version": 1})


def test_plan_of_another_model_names_the_first_difference(model: nn.Module, content: dict[str, Any]) -> None:
    other = tofu_fx.explain(randomise(ZOO["deit"].model()), X, options={"r": 4, "unread": "keep"}).plan
    assert _use(model, other).matched == 3  # the same sites: nothing distinguishes them, and nothing goes wrong
    narrow = Plan(sites=[row.model_copy(update={"dim": 24}) for row in Plan.load(content).sites])
    with pytest.raises(PlanError, match="another model: site 0 has dim 48 in the graph, 24 in the plan"):
        _use(model, narrow)


def test_edited_identity_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="only 'strategy', 'match' and 'r' may be edited"):
        Plan.load(_edited(content, heads=4))


def test_folder_that_does_not_exist_is_named(content: dict[str, Any], tmp_path: Any) -> None:
    with pytest.raises(PlanError, match=r"nowhere.*cannot be written"):
        Plan.load(content).save(tmp_path / "nowhere" / "plan.json")
