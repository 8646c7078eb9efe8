"""A plan can be saved, read, edited and passed back, and says everything that the options would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tofu_fx
from tests.harness import MEANING_TOLERANCE, compiled, relative_error, same_bits
from tests.oracle.stream import Reducer, reference_vit
from tests.zoo import ZOO
from tofu_fx import Plan, PlanError

ENTRY = ZOO["vit_avg_of_patches"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    with torch.no_grad():
        return tofu_fx.explain(ENTRY.model(), ENTRY.batch(), options={"r": 4}).plan


@pytest.mark.parametrize("strategy", ["permute", "duplicate", "shuffle"])
def test_strategies_of_the_proofs_are_none_that_a_plan_can_have(plan: Plan, strategy: str) -> None:
    written = plan.model_dump()
    written["sites"][1]["strategy"] = strategy
    with pytest.raises(PlanError, match=r"sites.1.strategy"):
        Plan.load(written)


def test_saved_plan_reads_back_equal(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(str(tmp_path / "plan.json")) == plan
    assert Plan.load(plan.model_dump()) == plan


def test_plan_gives_the_bits_of_the_options_it_was_made_from(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    model, x = ENTRY.model(), ENTRY.batch()
    with torch.no_grad():
        from_options = compiled(model, r=4)(x)
        assert same_bits(compiled(model, plan=str(tmp_path / "plan.json"))(x), from_options)


def test_edited_plan_is_carried_out_row_by_row(plan: Plan) -> None:
    wanted = [("mlerp", 0), ("mean", 7), ("prune", 2)]
    rows = [
        row.model_copy(update={"strategy": strategy, "r": r})
        for row, (strategy, r) in zip(plan.sites, wanted, strict=True)
    ]
    model, x = ENTRY.model(), ENTRY.batch()
    with torch.no_grad():
        expected = reference_vit(model, x, Reducer(wanted, 1))
        assert relative_error(compiled(model, plan=Plan(sites=rows))(x), expected) < MEANING_TOLERANCE


def test_plan_that_takes_nothing_gives_the_plain_bits_and_says_so(plan: Plan) -> None:
    rows = [row.model_copy(update={"r": 0}) for row in plan.sites]
    model, x = ENTRY.model(), ENTRY.batch()
    with torch.no_grad(), pytest.warns(tofu_fx.TofuWarning, match="take no token"):
        assert same_bits(compiled(model, plan=Plan(sites=rows))(x), model(x))


def test_row_knows_its_site(plan: Plan) -> None:
    assert [row.id for row in plan.sites] == [f"blocks.{i}.attn" for i in range(3)]
    assert {(row.tokens, row.heads) for row in plan.sites} == {(37, 3)}


def test_negative_r_in_a_plan_is_refused(plan: Plan) -> None:
    content = plan.model_dump()
    content["sites"][1]["r"] = -1
    with pytest.raises(PlanError, match=r"sites\.1\.r"):
        Plan.load(content)
