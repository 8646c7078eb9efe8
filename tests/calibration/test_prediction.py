"""Error curves, and the prediction that is corrected by measured plans."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch

from tofu_fx.calibration.output_error import METRICS, choose_metric, kl_divergence, relative_l2
from tofu_fx.calibration.recording import Rehearsed
from tofu_fx.calibration.rehearsal import Choice
from tofu_fx.calibration.sensitivity import Curve, Predictor, Sensitivity, first_kind, kinds
from tofu_fx.plan.schedule import default_match
from tofu_fx.sites.site import Planned


def _site(name: str, tokens: int = 41) -> Planned:
    attention: Any = None
    place: Any = {"reduce_at": None, "prefix": 1, "suffix": 0, "tokens_in": tokens, "tokens_out": tokens}
    return Planned(name, name, attention, tokens, 3, 48, stream=0, **place)


FIRST = first_kind(_site("any"))


@pytest.mark.parametrize(
    ("placement", "dim", "expected"),
    [
        ("stream", 48, [("mlerp", "keys"), ("mlerp", "features"), ("prune", "keys")]),
        ("branch", 48, [("mean", "features"), ("mean", "keys"), ("mlerp", "features"), ("prune", "features")]),
        ("branch", 384, [(m, "sketch") for m in ("mean", "mlerp", "prune")]),
    ],
)  # fmt: skip
def test_candidates_of_a_branch_merge_by_the_mean_of_what_goes_in(
    placement: Any, dim: int, expected: list[tuple[str, str]]
) -> None:
    node: Any = None
    site = replace(_site("a"), placement=placement, width=dim)
    own = default_match(site)
    entry = Rehearsed(site, node, dict.fromkeys((own, *(kind for kind in ("keys", "features") if kind != own)), node))
    assert [kind for kind in kinds(entry) if dim < 384 or kind[1] == "sketch"] == expected
    assert first_kind(site) == expected[0]


def test_curve_goes_through_what_was_measured_and_through_nothing() -> None:
    curve = Curve((0.1, 0.2, 0.5), (0.01, 0.03, 0.2))
    assert curve(numpy.array([0.0, 0.1, 0.2, 0.5])) == pytest.approx([0.0, 0.01, 0.03, 0.2])


def test_power_law_is_interpolated_exactly() -> None:
    curve = Curve((0.1, 0.2, 0.5), tuple(3 * share**1.7 for share in (0.1, 0.2, 0.5)))
    shares = numpy.array([0.02, 0.05, 0.15, 0.3, 0.45])
    assert curve(shares) == pytest.approx(3 * shares**1.7, rel=1e-9)


def test_curve_never_falls_although_a_measurement_does() -> None:
    values = Curve((0.1, 0.2, 0.5), (0.02, 0.01, 0.05))(numpy.linspace(0, 0.5, 60))
    assert (numpy.diff(values) >= -1e-12).all()


def test_other_kinds_have_the_form_of_the_first_at_their_height() -> None:
    found = Sensitivity(_site("a"), ("mlerp", "keys"))
    found.measured = {
        Choice(*FIRST, 4): 0.01, Choice(*FIRST, 8): 0.02, Choice(*FIRST, 20): 0.05,
        Choice("prune", "keys", 8): 0.06, Choice("mlerp", "heads", 8): math.inf,
    }  # fmt: skip
    curves = found.curves()
    assert set(curves) == {FIRST, ("prune", "keys")}  # what gave no number is no candidate
    shares = numpy.array([0.1, 0.2, 0.5])
    assert curves["prune", "keys"](shares) == pytest.approx(3 * curves[FIRST](shares))


def test_prediction_adds_up_the_shares_of_what_arrives() -> None:
    sites = [_site("a"), _site("b")]
    line = Curve((0.1, 0.5), (0.1, 0.5))
    predictor = Predictor(sites, {"a": 0, "b": 0}, {"a": line, "b": line}, {"a": 1.0, "b": 2.0})
    found = predictor.contributions({"a": Choice(*FIRST, 20), "b": Choice(*FIRST, 5)})
    assert found == pytest.approx([20 / 40, 2 * 5 / 20])  # of 40 free tokens, then of the 20 that are left


def test_fit_finds_the_factor_of_each_site() -> None:
    sites = [_site("a"), _site("b"), _site("c")]
    curves = {name: Curve((0.1, 0.5), (0.1, 0.5)) for name in "abc"}
    start = Predictor(sites, dict.fromkeys("abc", 0), curves, dict.fromkeys("abc", 1.0))
    truth = Predictor(sites, dict.fromkeys("abc", 0), curves, {"a": 0.5, "b": 0.7, "c": 0.6})
    rng = numpy.random.default_rng(0)
    plans = []
    for _ in range(30):
        choices = {name: Choice(*FIRST, int(r)) for name, r in zip("abc", rng.integers(0, 6, 3), strict=True)}
        if any(choice.r for choice in choices.values()):
            plans.append((choices, sum(truth.contributions(choices))))
    fitted = start.fitted(plans, trust=0.01)
    assert [fitted.weights[name] for name in "abc"] == pytest.approx([0.5, 0.7, 0.6], rel=0.01)
    # With one plan only the common factor is learnt.
    once = start.fitted(plans[:1])
    assert sum(once.contributions(plans[0][0])) == pytest.approx(plans[0][1], rel=0.05)


def test_relative_l2_is_the_mean_over_tensors_of_each_samples_distance() -> None:
    plain = {"a": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "b": torch.ones(2, 1, 1), "n": torch.tensor([1, 2])}
    other = {"a": torch.tensor([[3.0, 5.0], [0.0, 2.0]]), "b": torch.ones(2, 1, 1), "n": torch.tensor([1, 2])}
    # |d| / |plain| = 1/5 of the first; the second's plain is zero, so |d| itself; b agrees.
    assert relative_l2(other, plain).tolist() == pytest.approx([0.1, 1.0])


def test_divergence_is_that_of_the_distributions() -> None:
    plain, other = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
    p = torch.softmax(plain, -1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=plain), torch.distributions.Categorical(logits=other)
    )
    assert kl_divergence(other, plain).item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl_divergence(plain + 3, plain).item() == pytest.approx(0.0, abs=1e-7)
    assert p.sum().item() == pytest.approx(1.0)


def test_divergences_add_up_as_their_roots() -> None:
    metric = METRICS["kl"]
    assert metric.loss([0.04, 0.12]) == pytest.approx(0.08**0.5)
    assert metric.error(metric.loss([0.04, 0.12])) == pytest.approx(0.08)
    assert metric.loss([math.nan, 1.0]) == math.inf


def test_embedding_is_not_taken_for_class_scores() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.layer_norm.default, (x, [10])),))
    assert choose_metric(None, torch.randn(2, 10), graph).name == "relative_l2"
    assert choose_metric(None, torch.randn(2, 5, 10), None).name == "relative_l2"
