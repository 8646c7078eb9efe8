"""How many tokens arrive and stay at each site, in both placements; counted by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import nn

import tofu_fx
from tests.harness import EAGER, randomise
from tests.rewriting.branching import ViT, branch, images
from tofu_fx import Plan
from tofu_fx.plan.counts import streams, walk
from tofu_fx.plan.records import PlanRow
from tofu_fx.plan.schedule import schedule
from tofu_fx.plan.sharing import shared_matches
from tofu_fx.plan.table import follow_tokens
from tofu_fx.sites.site import Planned


def row(
    name: str, r: int, tokens: int = 1024, placement: Literal["stream", "branch"] = "stream", **more: Any
) -> PlanRow:
    more = {"strategy": "mean", **more}
    return PlanRow(id=name, module_path=name, tokens=tokens, heads=2, dim=8, r=r, placement=placement, **more)


def site(name: str, tokens: int, stream: int, **more: Any) -> Planned:
    attention: Any = SimpleNamespace(node=None)
    more = {"reduce_at": None, "prefix": 0, "suffix": 0, "tokens_in": tokens, "tokens_out": tokens, **more}
    return Planned(name, name, attention, tokens, 2, 8, stream=stream, **more)


def counts(sites: Any, removes: Any) -> list[tuple[int, int]]:
    return [(passage.arriving, passage.leaving) for _, passage in walk(sites, removes)]


def test_on_a_stream_what_one_site_leaves_arrives_at_the_next() -> None:
    rows = [row("a", 500), row("b", 0), row("c", 24)]
    assert counts(rows, lambda row, _: row.r) == [(1024, 524), (524, 524), (524, 500)]


def test_in_branches_each_site_starts_from_all_of_its_tokens() -> None:
    rows = [row(name, 512, placement="branch") for name in "abc"]
    assert counts(rows, lambda row, _: row.r) == [(1024, 512)] * 3


def test_streams_side_by_side_are_counted_apart() -> None:
    sites = [site("a", 40, 0), site("b", 24, 1), site("c", 40, 0), site("d", 24, 2), site("e", 24, 1)]
    assert counts(sites, lambda site, _: 4) == [(40, 36), (24, 20), (36, 32), (24, 20), (20, 16)]
    assert [[site.id for site in members] for members in streams(sites)] == [["a", "c"], ["b", "e"], ["d"]]


def test_what_goes_may_be_decided_by_what_arrives() -> None:
    sites = [site(name, 40, 0, prefix=1) for name in "abc"]
    # 39 are free, so 19 may go; of 21 then 20 are free: 10; of 11 then 10: 5
    assert counts(sites, lambda site, arriving: site.cap(arriving)) == [(40, 21), (21, 11), (11, 6)]


def test_rows_that_name_their_streams_are_not_taken_for_one() -> None:
    named = [row("a", 4, 24, stream=0), row("b", 3, 24, stream=1), row("c", 2, 24, stream=0)]
    assert counts(named, lambda row, _: row.r) == [(24, 20), (24, 21), (20, 18)]
    unnamed = [row("a", 4, 24), row("b", 3, 24), row("c", 2, 24, graph=1)]
    assert counts(unnamed, lambda row, _: row.r) == [(24, 20), (20, 17), (24, 22)]


def test_sites_that_share_a_match_are_counted_like_any_other() -> None:
    grid = {"placement": "branch", "grid": (1, 6, 6)}
    sites = [site(name, 36, number, **grid) for number, name in enumerate("abc")]  # type: ignore[arg-type]
    planned = schedule(sites, tofu_fx.Options(r=9, placement="branch"))
    assert shared_matches(planned, "resolution") == {"b": "a", "c": "a"}
    assert [(site.tokens_in, site.tokens_out) for site in planned] == [(36, 27)] * 3


def test_a_report_of_branches_starts_from_all_tokens_at_each_row() -> None:
    plan = Plan(sites=[row(name, 512, placement="branch") for name in "abc"])
    assert [(step.arriving, step.leaving) for step in follow_tokens(plan)] == [(1024, 512)] * 3
    cells = [list(column.cells) for column in plan.table().columns]
    assert [str(cell) for cell in cells[1]] == ["1024 → 512"] * 3


@pytest.mark.parametrize("placement", ["stream", "branch"])
def test_the_report_of_a_plan_agrees_with_the_graph_that_was_rewritten(placement: str) -> None:
    model = randomise(ViT(depth=3))
    options = {**EAGER, **branch(0.5)} if placement == "branch" else {**EAGER, "r": 5, "placement": "stream"}
    with torch.no_grad():
        explained = tofu_fx.explain(model, images(), options=options)
    steps = [(step.arriving, step.leaving) for step in follow_tokens(explained.plan)]
    assert steps == [(site.tokens_in, site.tokens_out) for site in explained.sites]
    assert steps == ([(36, 18)] * 3 if placement == "branch" else [(36, 31), (31, 26), (26, 21)])
    assert explained.tokens_of_streams == ([(36, 18)] if placement == "branch" else [(36, 21)])


class Towers(nn.Module):
    """Two streams of equally many tokens, their layers in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleList(nn.Linear(16, 48) for _ in range(2)) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for i in range(2):
            x, y = self.block(self.left[i], self.mlps[i], x), self.block(self.right[i], self.mlps[2 + i], y)
        return x.mean(1) + y.mean(1)

    def block(self, qkv: nn.Module, mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(x).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x + mlp(x)


def test_two_towers_of_equally_many_tokens_are_reported_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 24, 16, generator=generator) for _ in range(2))
    with torch.no_grad():
        explained = tofu_fx.explain(Towers().eval(), x, y, options={**EAGER, "r": 3, "placement": "stream"})
    found = [(step.arriving, step.leaving) for step in follow_tokens(explained.plan)]
    assert found == [(24, 21), (24, 21), (21, 18), (21, 18)]
    assert (explained.tokens_before, explained.tokens_after) == (24, 18)
