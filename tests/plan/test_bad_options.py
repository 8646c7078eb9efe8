"""Options of branches that cannot be served as asked: each ends in its own words or its documented result."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tofu_fx
from tests.harness import EAGER, compiled, randomise, same_bits, study
from tests.oracle.branches import cells_of
from tests.rewriting.branching import DEPTH, PATCHES, SIDE, Ready, ViT, branch, images
from tests.zoo.diffusion_catalogue import DIFFUSION_CASES
from tofu_fx import OptionError, Options, PlanError, TofuWarning
from tofu_fx.testing.graphs import difference

FUSE = torch.ops.tofu.fuse_tokens.default
TOKENS = torch.randn(2, PATCHES, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def told(model: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, list[str]]:
    """The outputs, and what is reported as a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = compiled(model, **options)(x)
    return outputs, [str(w.message) for w in caught if issubclass(w.category, TofuWarning)]


def failure(model: nn.Module, x: Tensor, **options: Any) -> BaseException:
    """What the backend raised, as torch.compile's user finds it inside BackendCompilerFailed."""
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(model, **options)(x)
    assert caught.value.inner_exception is not None
    return caught.value.inner_exception


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_downsample": 3}, ["'max_downsample'", "1, 2, 4 or 8", "3"]),
        ({"cell": 1}, ["'cell'", "2", "1"]),
        ({"cell": 2.0}, ["'cell'", "integer", "2.0"]),
        ({"seed": -1}, ["'seed'", "0", "-1"]),
        ({"branches": ["mlp"]}, ["'branches'", "'attention'"]),
        ({"branches": []}, ["'branches'", "'attention'"]),
        ({"branches": ["attention", "ffn"]}, ["'branches'", "'mlp'", "'cross'", "'ffn'"]),
        ({"reuse": "always"}, ["'reuse'", "'none'", "'block'", "'resolution'", "'always'"]),
        ({"placement": "inside"}, ["'placement'", "'branch'", "'stream'", "'inside'"]),
        ({"grid": 6}, ["'grid'", "6"]),
        ({"grid": (6, 6, 6)}, ["'grid'", "(6, 6, 6)"]),
        ({"grid": (6, 0)}, ["'grid'"]),
        ({"grid": (-6, -6)}, ["'grid'"]),
        ({"max_downsampel": 2}, ["unknown option 'max_downsampel'", "did you mean 'max_downsample'"]),
    ],
)
def test_wrong_options_are_refused_before_any_compiling(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse(options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_ratio_over_the_cap_is_capped_and_the_warning_says_cap_and_remedy() -> None:
    model = randomise(ViT(prefix=1))
    outputs, messages = told(model, images(), **branch(0.9))
    # 36 places in 9 cells: 27 may go.
    capped = [message for message in messages if "r = 32 capped at 27" in message]
    assert len(capped) == DEPTH
    assert all(word in capped[0] for word in ("2 x 2", "0.75", "'cell'")), capped[0]
    assert same_bits(outputs, compiled(model, **branch(0.75))(images()))
    _, silent = told(model, images(), **branch(0.9, cell=4))
    assert not any("capped" in message for message in silent), silent


@pytest.mark.parametrize(("cell", "stays"), [(2, 9), (4, 4), (5, 4), (9, 1)])
def test_cells_that_do_not_divide_the_image_are_smaller_at_the_border(cell: int, stays: int) -> None:
    model = randomise(ViT())
    found = study(model, images(), variants={"cells": branch(0.99, cell=cell)}, proofs=False)
    assert len(cells_of(1, SIDE, SIDE, cell)) == stays
    assert [site.tokens_out for site in found.reducing("cells")] == [stays] * DEPTH
    kept = [node.meta["val"].shape[1] for node in found.nodes("cells") if _is_kept(node)]
    assert kept == [stays] * len(kept)
    assert found.outputs["cells"].isfinite().all()


def _is_kept(node: Any) -> bool:
    return bool(node.op == "call_function" and node.args and getattr(node.args[0], "target", None) == FUSE
                and node.args[1] in (0, 1, 3))  # fmt: skip


def test_a_grid_that_is_nobodys_is_an_error_that_says_how_many_tokens_there_are() -> None:
    error = failure(randomise(Ready()), TOKENS, **branch(grid=(5, 7)))
    assert isinstance(error, OptionError)
    assert all(word in str(error) for word in ("'grid'", "5 x 7 is 35 tokens", "36")), str(error)


def test_any_grid_of_as_many_tokens_is_taken_as_told() -> None:
    found = study(randomise(Ready()), TOKENS, variants={"wide": branch(grid=(4, 9))}, proofs=False)
    assert {site.grid for site in found.reducing("wide")} == {(1, 4, 9)}
    assert [list(node.args[7]) for node in found.nodes("wide", FUSE)] == [[1, 4, 9, 2, 0]] * DEPTH


def test_tokens_of_no_image_are_reduced_by_half_at_most_and_it_is_said_once() -> None:
    outputs, messages = told(randomise(Ready()), TOKENS, **branch(0.75))
    assert outputs.isfinite().all()
    notes = [message for message in messages if "no image is found" in message]
    assert len(notes) == 1
    assert f"{DEPTH} sites" in notes[0]
    assert "'grid': (height, width)" in notes[0]
    assert len([message for message in messages if "capped at 18" in message]) == DEPTH
    _, said = told(randomise(Ready()), TOKENS, **branch(0.75, grid=(SIDE, SIDE)))
    assert len(said) == 1
    assert "6 x 6 could not be checked" in said[0]


def test_a_linear_attention_only_model_is_left_alone_whatever_the_options() -> None:
    case = DIFFUSION_CASES["SanaTransformer2DModel"]
    args, kwargs = case.inputs()
    model = case.model()
    expected = model(*args, **kwargs)
    for options in (branch(branches=["attention", "mlp", "cross"], cell=4, seed=1), branch(reuse="resolution")):
        with pytest.warns(TofuWarning, match=r"nothing was accelerated.*linear attention"):
            outputs = compiled(model, **options)(*args, **kwargs)
        assert same_bits(outputs, expected)


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"branches": ["attention", "mlp"]}, {"cell": 3}, {"match": "keys"}, {"strategy": "mlerp"},
     {"branches": ["attention", "mlp"], "reuse": "resolution"}],
)  # fmt: skip
def test_a_plan_of_branches_survives_json_and_gives_the_same_graph_and_bits(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model, wanted = randomise(ViT(prefix=1)), branch(0.6, **options)
    plan = tofu_fx.explain(model, images(), options={**EAGER, **wanted}).plan
    assert {(row.placement, row.cell) for row in plan.sites} == {("branch", options.get("cell", 2))}
    plan.save(tmp_path / "plan.json")
    read = tofu_fx.Plan.load(tmp_path / "plan.json")
    assert read == plan
    # How a match is shared is no decision about a site: the option is given beside the plan.
    beside = {key: value for key, value in options.items() if key == "reuse"}
    variants = {"options": wanted, "plan": {"plan": str(tmp_path / "plan.json"), **beside}}
    found = study(model, images(), variants=variants, proofs=False)
    graphs = [found.compilations(name)[0].gm.graph for name in variants]
    assert not difference(*graphs)
    assert same_bits(found.outputs["plan"], found.outputs["options"])


def test_a_plan_for_flattened_tokens_brings_its_grid() -> None:
    model = randomise(Ready())
    wanted = branch(0.75, grid=(SIDE, SIDE))
    plan = tofu_fx.explain(model, TOKENS, options={**EAGER, **wanted}).plan
    assert [row.grid for row in plan.sites] == [[SIDE, SIDE]] * DEPTH
    outputs, messages = told(model, TOKENS, plan=plan)
    assert messages == []
    assert same_bits(outputs, compiled(model, **wanted)(TOKENS))


def test_a_seeded_choice_is_repeated_by_a_plan_with_the_seed() -> None:
    model, wanted = randomise(ViT()), branch(seed=5)
    plan = tofu_fx.explain(model, images(), options={**EAGER, **wanted}).plan
    assert same_bits(compiled(model, plan=plan, seed=5)(images()), compiled(model, **wanted)(images()))


def test_a_row_that_takes_more_than_its_cells_allow_is_refused_with_the_cap() -> None:
    model = randomise(ViT())
    plan = tofu_fx.explain(model, images(), options={**EAGER, **branch()}).plan
    rows = [row.model_copy(update={"r": 28}) for row in plan.sites]
    error = failure(model, images(), plan=tofu_fx.Plan(sites=rows))
    assert isinstance(error, PlanError)
    assert "takes 28 tokens" in str(error)
    assert "at most 27" in str(error)


def test_a_plan_of_streams_stays_one_where_branches_are_the_default() -> None:
    model = randomise(ViT(depth=2))  # its default placement is in the branches
    plan = tofu_fx.explain(model, images(), options={**EAGER, "ratio": 0.3, "placement": "stream"}).plan
    assert {row.placement for row in plan.sites} == {"stream"}
    again = tofu_fx.explain(model, images(), options={**EAGER, "plan": plan}).plan
    assert [row.placement for row in again.sites] == ["stream"] * 2
    expected = compiled(model, ratio=0.3, placement="stream")(images())
    assert same_bits(compiled(model, plan=plan)(images()), expected)
