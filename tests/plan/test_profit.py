"""Sites whose reduction would cost more time than it saves are declined, and it is said."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch

import tofu_fx
from tests.harness import same_bits
from tests.zoo import ZOO
from tofu_fx.errors import TofuWarning
from tofu_fx.plan import profit

WORDS = "would cost more time than it saves"


def _explained(name: str, batch: int = 2, **options: object) -> tofu_fx.Explanation:
    entry = ZOO[name]
    return tofu_fx.explain(entry.model(), entry.batch(batch), options={"unread": "keep", **options})


@pytest.mark.true_rates
def test_tiny_model_is_left_alone_and_says_why() -> None:
    entry = ZOO["vit"]
    model, x = entry.model(), entry.batch()
    explained = tofu_fx.explain(model, x, options={"unread": "keep"})
    assert [WORDS in row.reason for row in explained.sites] == [True] * entry.sites
    assert "removing 6 of 37 tokens" in explained.sites[0].reason
    call = torch.compile(model, backend="tofu", options={"inner_backend": "eager", "unread": "keep"})
    with pytest.warns(TofuWarning, match=WORDS):
        found = call(x)
    assert same_bits(found, model(x))


@pytest.mark.true_rates
def test_tiny_model_is_reduced_where_it_is_wanted() -> None:
    assert _explained("vit", profitable_only=False).matched == ZOO["vit"].sites
    explained = _explained("vit")
    rows = [row.model_copy(update={"r": 4}) for row in explained.plan.sites]
    assert _explained("vit", plan=tofu_fx.Plan(sites=rows)).tokens_after == ZOO["vit"].tokens - 4 * len(rows)


@pytest.mark.true_rates
def test_the_same_model_pays_in_a_large_batch() -> None:
    assert _explained("vit", batch=256).matched == ZOO["vit"].sites


@pytest.mark.true_rates
def test_every_site_of_a_real_vit_pays() -> None:
    model = timm.create_model("vit_small_patch16_224").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TofuWarning)
        assert tofu_fx.explain(model, torch.randn(1, 3, 224, 224), options={"unread": "keep"}).matched == 12


def test_sites_behind_a_declined_one_keep_their_own_r(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is gained after the last site, whose tokens meet one small MLP only.
    monkeypatch.setattr(profit, "unprofitable", lambda sites, tracer, graph: [sites[1]])
    monkeypatch.setattr("tofu_fx.passes.decline_unprofitable.unprofitable", profit.unprofitable)
    explained = _explained("vit", r=4)
    assert [(row.tokens_in, row.tokens_out) for row in explained.sites] == [(37, 33), (37, 37), (33, 29)]
    assert [row.r for row in explained.plan.sites] == [4, 0, 4]


def test_site_is_declined_where_its_constant_is_above_what_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    explained = _explained("vit", r=4)
    saved = (explained.flops_before - explained.flops_after) / 1e9  # seconds at 1 GFLOP/s, the matching counted
    for constant, matched in ((saved / 3 * 0.2, 3), (saved * 2, 0)):
        rates = profit.Rates(1e9, float("inf"), constant)
        monkeypatch.setattr(profit, "rates_of", lambda *device, rates=rates: rates)
        assert _explained("vit", r=4).matched == matched
