"""Tokens compared by what the output feels ("fisher"): in the graph, in a plan's files, and as the interpreter does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import tofu_fx
from tests.harness import compiled, randomise, relative_error, same_bits, study
from tests.zoo import ZOO
from tests.zoo.masked import ATTEND, Masked, N, are_there, sample
from tofu_fx import PlanError
from tofu_fx.backend import rewrite
from tofu_fx.plan.options import Options
from tofu_fx.plan.table import differences
from tofu_fx.testing import EAGER, capture

# As for the other ways to compare tokens: the interpreter and the graph add up in another order.
MEANING_TOLERANCE = 2e-5


def with_matrices(plan: tofu_fx.Plan, columns: int = 7, seed: int = 0, **rows: Any) -> tofu_fx.Plan:
    """The plan with all sites comparing by matrices of small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    sites = [row.model_copy(update={"match": "fisher", **rows}) for row in plan.sites]
    drawn = {(row.graph, row.id): torch.randn(row.dim, columns, generator=generator) for row in sites}
    return tofu_fx.Plan(sites=sites).with_matrices(drawn)


def plan_for(model: nn.Module, *args: Tensor, columns: int = 7, **rows: Any) -> tofu_fx.Plan:
    options = {"r": 1, "unread": "keep", "profitable_only": False}
    return with_matrices(tofu_fx.explain(model, *args, options=options).plan, columns, **rows)


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["prune", "mean", "mlerp"])
@pytest.mark.parametrize("name", ["vit_avg_of_patches", "dinov2_registers", "eva02", "hf_vit_eager"])
def test_outputs_are_those_of_the_interpreter(name: str, strategy: str) -> None:
    entry = ZOO[name]
    model, x = randomise(entry.model()), entry.batch()
    plan = plan_for(model, x, strategy=strategy, r=8)
    found = study(model, x, variants={"fisher": {"plan": plan, "unread": "keep"}}, interpret=("fisher",))
    assert found.undecided == {}
    assert relative_error(found.outputs["fisher"], found.interpreted["fisher"]) < MEANING_TOLERANCE
    assert relative_error(found.outputs["fisher"], found.outputs["plain"]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("spelling", [name for name in ATTEND if name != "after the softmax"])
def test_padding_is_kept_apart_and_goes_first(spelling: str) -> None:
    model = randomise(Masked(lambda m, x, there: there[:, None, None], ATTEND[spelling]))
    there, x = are_there([N - 9, N - 3]), sample()
    other = torch.where(there[..., None], x, sample(seed=7))
    plan = plan_for(model, x, there, strategy="mean", r=3)
    found = study(model, x, there, variants={"fisher": {"plan": plan, "unread": "keep"}}, interpret=("fisher",))
    assert relative_error(found.outputs["fisher"], found.interpreted["fisher"]) < MEANING_TOLERANCE
    call = compiled(model, plan=plan)
    assert torch.equal(call(x, there)[there], call(other, there)[there])


@torch.no_grad()
def test_nothing_reduced_has_the_bits_of_the_untouched_graph() -> None:
    entry = ZOO["vit"]
    model, x = entry.model(), entry.batch()
    assert same_bits(compiled(model, plan=plan_for(model, x, r=0), unread="keep")(x), model(x))


@torch.no_grad()
def test_the_graph_holds_the_matrices_and_groups_by_ward() -> None:
    entry = ZOO["vit"]
    model, x = entry.model(), entry.batch()
    gm, inputs = capture(model, x)
    outcome = rewrite(gm, Options.parse({**EAGER, "plan": plan_for(model, x, r=4)}), inputs)
    assert outcome.compilation is not None
    graph = outcome.compilation.gm.graph
    fused = [node for node in graph.nodes if node.target is torch.ops.tofu.fuse_tokens.default]
    assert [node.args[7:] for node in fused] == [(None, "ward")] * 3
    for node in fused:
        projected = node.args[1]
        assert projected.args[0] is node.args[0]
        held = getattr(outcome.compilation.gm, projected.args[1].target)
        assert (tuple(held.shape), held.dtype) == ((48, 7), torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_matrices_have_the_dtype_of_the_tokens(dtype: torch.dtype) -> None:
    entry = ZOO["vit"]
    model, x = entry.model(), entry.batch()
    plan = plan_for(model, x, r=4)
    expected = compiled(model, plan=plan)(x)
    found = compiled(model.to(dtype), plan=plan)(x.to(dtype))
    assert found.dtype == dtype
    if dtype == torch.float64:  # in the others the tokens are rounded, so that other groups are the nearest
        assert relative_error(found.float(), expected) < 1e-4


@pytest.mark.parametrize("inner_backend", ["aot_eager", "inductor"])
def test_compiled_outputs_and_gradients(inner_backend: str) -> None:
    entry = ZOO["vit"]
    model, x = entry.model(), entry.batch()
    plan = plan_for(model, x, r=4)

    def run(backend: str) -> list[Tensor]:
        inputs = x.clone().requires_grad_()
        out = compiled(model, plan=plan, inner_backend=backend)(inputs)
        out.sum().backward()
        assert inputs.grad is not None
        return [out.detach(), inputs.grad]

    for a, b in zip(run(inner_backend), run("eager"), strict=True):
        assert relative_error(a, b) < 1e-4


@torch.no_grad()
def test_a_plan_is_two_files(tmp_path: Path) -> None:
    entry = ZOO["vit"]
    model, x = entry.model(), entry.batch()
    plan = plan_for(model, x, r=4)
    plan.save(tmp_path / "vit.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit.json", "vit.safetensors"]
    again = tofu_fx.Plan.load(tmp_path / "vit.json")
    assert again == plan
    assert again.matrices.keys() == plan.matrices.keys()
    assert same_bits(compiled(model, plan=str(tmp_path / "vit.json"))(x), compiled(model, plan=plan)(x))
    again.save(tmp_path / "second.json")
    assert (tmp_path / "second.safetensors").read_bytes() == (tmp_path / "vit.safetensors").read_bytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    entry = ZOO["vit"]
    plan_for(entry.model(), entry.batch(), r=4).save(tmp_path / "vit.json")
    return tmp_path / "vit.json"


def test_missing_matrices(saved: Path) -> None:
    saved.with_suffix(".safetensors").unlink()
    with pytest.raises(PlanError, match=r"vit.json.*its matrices are missing: there is no 'vit.safetensors' beside it"):
        tofu_fx.Plan.load(saved)


def test_truncated_matrices(saved: Path) -> None:
    beside = saved.with_suffix(".safetensors")
    beside.write_bytes(beside.read_bytes()[:-3])
    with pytest.raises(PlanError, match=r"'vit.safetensors' is not the file that was saved with it"):
        tofu_fx.Plan.load(saved)


def test_matrices_of_another_plan(saved: Path) -> None:
    entry = ZOO["vit"]
    with_matrices(tofu_fx.Plan.load(saved), seed=1).save(saved.with_name("other.json"))
    shutil.copy(saved.with_name("other.safetensors"), saved.with_suffix(".safetensors"))
    with pytest.raises(PlanError, match="it was damaged, or is of another plan"):
        tofu_fx.explain(entry.model(), entry.batch(), options={"plan": str(saved)})


def test_a_dict_has_no_matrices(saved: Path) -> None:
    with pytest.raises(
        PlanError, match=r"a dict holds no matrices, which its 'projections' asks for; give the plan's path"
    ):
        tofu_fx.Plan.load(json.loads(saved.read_text()))


def test_a_row_that_was_edited_to_fisher_has_no_matrix(saved: Path) -> None:
    content = json.loads(saved.read_text())
    del content["projections"]
    with pytest.raises(
        PlanError, match=r"'blocks.0.attn' compares tokens by 'fisher', but has no matrix: only calibration"
    ):
        tofu_fx.Plan.load(content)


def test_fisher_is_no_option() -> None:
    with pytest.raises(tofu_fx.OptionError, match="option 'match': expected 'auto', 'keys'"):
        Options.parse({"match": "fisher"})


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (torch.full((48, 3), torch.nan), "holds NaN or infinity; calibrate again"),
        (torch.ones(48, 49), r"must be floating point \[C, k\], with k <= C, got float16 \[48, 49\]"),
        (torch.ones(48), r"got float16 \[48\]"),
        (torch.ones(48, 0), r"got float16 \[48, 0\]"),
    ],
)
def test_matrices_that_cannot_be_used(saved: Path, matrix: Tensor, words: str) -> None:
    plan = tofu_fx.Plan.load(saved)
    with pytest.raises(PlanError, match=words):
        plan.with_matrices({**plan.matrices, (0, "blocks.1.attn"): matrix})


def test_matrices_of_another_model_are_refused_by_name(saved: Path) -> None:
    entry = ZOO["vit"]
    plan = tofu_fx.Plan.load(saved)
    wrong = plan.with_matrices({**plan.matrices, (0, "blocks.1.attn"): torch.ones(32, 3)})
    with pytest.raises(
        PlanError, match=r"at blocks.1.attn its projection is for tokens of 32 features, the graph's have 48"
    ):
        tofu_fx.explain(entry.model(), entry.batch(), options={"plan": wrong})


def test_a_plan_is_no_safetensors_file(saved: Path) -> None:
    with pytest.raises(PlanError, match=r"a plan is JSON, its matrices are in the .safetensors file beside it"):
        tofu_fx.Plan.load(saved).save(saved.with_name("plan.safetensors"))


@torch.no_grad()
def test_a_cached_graph_is_not_taken_for_one_with_other_matrices() -> None:
    entry = ZOO["vit"]
    model, x = entry.model(), entry.batch()
    first = plan_for(model, x, r=8)
    second = with_matrices(first, seed=1)
    expected = [compiled(model, plan=plan)(x) for plan in (first, second)]
    assert relative_error(expected[0], expected[1]) > 1e-4
    with fresh_cache():
        for plan, wanted in zip((first, second, first), (*expected, expected[0]), strict=True):
            torch._dynamo.reset()  # inductor's caches stay
            assert relative_error(compiled(model, plan=plan, inner_backend="inductor")(x), wanted) < 1e-5


def test_plans_that_differ_by_their_matrices_alone_differ(saved: Path) -> None:
    plan = tofu_fx.Plan.load(saved)
    assert differences(plan, tofu_fx.Plan.load(saved)) == []
    other = plan.with_matrices({**plan.matrices, (0, "blocks.1.attn"): torch.ones(48, 5)})
    assert plan != other
    ((site, first, second),) = differences(plan, other)
    assert site == "blocks.1.attn"
    assert "by fisher (7 columns, " in first
    assert "by fisher (5 columns, " in second
