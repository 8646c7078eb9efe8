"""What the user says of the image is held against what the graph shows; what decides nothing is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tofu_fx
from tests.harness import EAGER, compiled, randomise
from tests.rewriting.branching import PATCHES, SIDE, Ready, ViT, branch, images
from tests.zoo.handwritten import DIM, EinsumAttention, Plain
from tofu_fx import OptionError, Plan, PlanError, TofuError, TofuWarning

TOKENS = torch.randn(2, PATCHES, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def told(model: nn.Module, x: Tensor, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(model, **options)(x)
    return [str(w.message) for w in caught if issubclass(w.category, TofuWarning)]


def refused(model: nn.Module, x: Tensor, **options: Any) -> str:
    with pytest.raises(TofuError) as caught:
        tofu_fx.explain(model, x, options={**EAGER, **options})
    assert isinstance(caught.value, (OptionError, PlanError))
    return str(caught.value)


@pytest.mark.parametrize("placement", ["stream", "branch"])
def test_a_grid_of_another_number_of_tokens_is_refused_in_either_placement(placement: str) -> None:
    model = randomise(ViT(depth=3))
    options = branch(grid=(7, 7)) if placement == "branch" else {"grid": (7, 7)}
    message = refused(model, images(), **options)
    assert all(word in message for word in ("'grid'", "7 x 7 is 49 tokens", "36", "6 x 6")), message


def test_a_grid_of_as_many_tokens_and_another_shape_is_refused_where_the_graph_shows_the_image() -> None:
    message = refused(randomise(ViT(prefix=1)), images(), **branch(grid=(4, 9)))
    assert all(word in message for word in ("4 x 9", "at 'blocks.0", "an image of 6 x 6", "leave the option out")), (
        message
    )


def test_the_grid_that_the_graph_shows_is_taken_without_a_word() -> None:
    assert told(randomise(ViT()), images(), **branch(grid=(SIDE, SIDE))) == []


def test_a_grid_that_nothing_can_be_held_against_is_said_once() -> None:
    messages = told(randomise(Ready()), TOKENS, **branch(grid=(4, 9)))
    assert len(messages) == 1
    assert all(word in messages[0] for word in ("option 'grid'", "4 x 9 could not be checked", "36"))


def test_the_grid_of_a_row_is_held_against_the_graph_and_the_option() -> None:
    model = randomise(ViT())
    plan = tofu_fx.explain(model, images(), options={**EAGER, **branch()}).plan
    assert plan.sites[0].grid == [SIDE, SIDE]
    turned = Plan(sites=[row.model_copy(update={"grid": [9, 4]}) for row in plan.sites])
    assert "9 x 4, but the graph shows an image of 6 x 6" in refused(model, images(), plan=turned)
    flat = tofu_fx.explain(randomise(Ready()), TOKENS, options={**EAGER, **branch(grid=(SIDE, SIDE))}).plan
    assert "option 'grid' is 4 x 9: leave the option out" in refused(randomise(Ready()), TOKENS, plan=flat, grid=(4, 9))
    small = Plan(sites=[row.model_copy(update={"grid": [3, 4]}) for row in flat.sites])
    assert "which is 12 tokens, but 36 can go there" in refused(randomise(Ready()), TOKENS, plan=small)


@pytest.mark.parametrize(
    ("key", "value"),
    [("branches", ["attention", "mlp"]), ("cell", 4), ("seed", 0), ("max_downsample", 2), ("reuse", "none")],
)
def test_options_of_branches_that_decide_nothing_under_auto_are_said(key: str, value: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 24, DIM, generator=torch.Generator().manual_seed(3))
    messages = told(Plain(EinsumAttention).eval(), x, r=4, **{key: value})
    assert len(messages) == 1
    assert f"option {key!r} decides nothing: no site is reduced in the branches" in messages[0]


def test_cells_without_an_image_decide_nothing_and_it_is_said() -> None:
    messages = told(randomise(Ready()), TOKENS, **branch(cell=4, seed=3))
    assert [m for m in messages if "options 'cell', 'seed' decide nothing: no image is known" in m], messages
