"""A rehearsed graph computes what the compiled one does, for any plan; and its costs are those of the graph."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tofu_fx
from tests.harness import NIGHTLY, compiled, randomise, relative_error, same_bits, tensors
from tests.zoo import ZOO
from tofu_fx import Plan
from tofu_fx.calibration.batches import Batch, read_batches
from tofu_fx.calibration.cost import CostModel, fit_weights
from tofu_fx.calibration.rehearsal import Choice
from tofu_fx.calibration.trial import Trial
from tofu_fx.calibration.uniform import UNIFORM, rows_of, uniform_plans
from tofu_fx.plan.options import Options

# One of each kind of output, companion and layout; the others are the compiler's own tests.
NAMES = ("vit_avg_of_patches", "dinov2_registers", "siglip", "beit", "eva02", "hf_vit", "relpos")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        *((name, "keys") for name in NAMES),
        ("dinov2_registers", "heads"),
        ("eva02", "queries_keys"),
        ("hf_vit", "heads"),
    ],
)
def test_rehearsed_plan_has_the_bits_of_the_compiled_one(name: str, match: str) -> None:
    entry = ZOO[name]
    model, x = entry.model(), entry.batch()
    with Trial(model, Options(unread="keep")) as trial:
        batch = Batch((x,))
        plain = trial.plain(batch)
        assert relative_error(trial.record(batch), plain) < 1e-5
        kinds = [("mlerp", 5), ("prune", 0), ("mean", 7)]
        choices = {s.id: Choice(kind, match, r) for s, (kind, r) in zip(trial.sites, kinds, strict=True)}
        whole = trial.reduced(batch, choices)
        trial.forget()
        again = trial.reduced(batch, choices)
        plan = Plan(sites=rows_of(trial, choices))
    assert same_bits(whole, again)  # from recorded values, and from the start
    with torch.no_grad():
        expected = compiled(model, plan=plan)(x)
    # r = 0 leaves the graph alone when compiled; here log(1) = 0 joins the logits, which may choose another kernel.
    assert relative_error(whole, expected) < 1e-5


def test_any_plan_rehearsed_from_any_recorded_run() -> None:
    model = randomise(ZOO["vit_avg_of_patches"].model())
    batch = Batch((ZOO["vit_avg_of_patches"].batch(),))
    with Trial(
        model, Options(unread="keep")
    ) as trial:  # once for all examples: each time it is entered the model is traced anew
        trial.plain(batch)

        @given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=3, max_size=3), st.integers(0, 2))
        def has_the_same_bits(rows: list[tuple[int, int]], skipped: int) -> None:
            choices = {}
            count = 37
            for number, (site, (strategy, r)) in enumerate(zip(trial.sites, rows, strict=True)):
                r = 0 if number < skipped else min(r, site.cap(count))
                choices[site.id] = Choice(("prune", "mean", "mlerp")[strategy], "keys", r)
                count -= r
            trial.record(batch)
            resumed = trial.reduced(batch, choices)
            trial.forget()
            assert same_bits(resumed, trial.reduced(batch, choices))

        has_the_same_bits()


@pytest.mark.parametrize("name", NAMES if NIGHTLY else ("dinov2_registers", "siglip", "eva02", "relpos"))
def test_cost_of_any_counts_is_that_of_the_graph(name: str) -> None:
    entry = ZOO[name]
    model, x = entry.model(), entry.batch()
    with Trial(model, Options(unread="keep")) as trial:
        trial.plain(Batch((x,)))
        (rehearsal,) = trial.rehearsals
        cost = CostModel.of(rehearsal)
        kinds = (("keys", 6), ("keys", 0), ("queries_keys", 9))
        choices = {s.id: Choice("mlerp", match, r) for s, (match, r) in zip(trial.sites, kinds, strict=True)}
        counts, plan = [passage.leaving for passage in rehearsal.passages(choices)], Plan(sites=rows_of(trial, choices))
        arriving = (trial.sites[0].tokens, counts[1])
        fuse = (cost.reduction(0, "keys", arriving[0]), cost.reduction(2, "queries_keys", arriving[1]))
    explained = tofu_fx.explain(model, x, options={"plan": plan, "unread": "keep"})
    assert cost.operations({}) == explained.flops_before
    assert cost.operations(choices) == explained.flops_after
    assert cost.total(choices) == explained.flops_after
    parts = sum(cost.segment(i, numpy.array([n]))[0] for i, n in enumerate(counts))
    assert cost.fixed + parts + sum(fuse) == pytest.approx(explained.flops_after, rel=0.02)
    assert 0 < sum(fuse) < 0.1 * explained.flops_after


def test_weights_of_known_costs_are_found_again() -> None:
    rows = [[1e9, 2e6, 0, 1], [5e8, 1.4e6, 3, 1], [2e8, 9e5, 3, 1], [7e8, 1.1e6, 1, 1], [6e8, 2.5e6, 2, 1]]
    true = [2e-10, 3e-8, 0.004, 0.05]
    seconds = [sum(a * b for a, b in zip(row, true, strict=True)) for row in rows]
    assert fit_weights(rows, seconds) == pytest.approx(true, rel=1e-6)


def test_weights_are_never_negative() -> None:
    rows = [[1.0, 5.0, 1.0], [2.0, 4.0, 1.0], [3.0, 3.0, 1.0], [4.0, 1.0, 1.0]]
    weights = fit_weights(rows, [1.0, 2.1, 2.9, 4.0])
    assert min(weights) >= 0
    assert weights[0] == pytest.approx(1.0, rel=0.1)


def test_uniform_plans_use_what_they_may_and_no_more() -> None:
    model, x = ZOO["vit_avg_of_patches"].model(), ZOO["vit_avg_of_patches"].batch()
    plans = uniform_plans(model, x, [0.8, 0.01])
    assert set(plans) == {(name, 0.8) for name in UNIFORM}  # nothing reaches one hundredth
    for (name, _), plan in plans.items():
        explained = tofu_fx.explain(model, x, options={"plan": plan, "unread": "keep"})
        assert 0.75 < explained.flops_after / explained.flops_before <= 0.8
        removed = [row.r for row in plan.sites]
        assert max(removed) - min(removed) <= 1
        strategies = [row.strategy for row in plan.sites]
        expected = ["prune", "prune", "mlerp"] if name == "depth rule" else [name.split()[1]] * 3
        assert strategies == expected


def test_labels_are_left_out_and_arguments_kept() -> None:
    x, mask, labels = torch.randn(4, 6, 8), torch.ones(4, 6, dtype=torch.bool), torch.arange(4)
    with pytest.warns(tofu_fx.TofuWarning, match="taken for labels"):
        assert [len(b.args) for b in read_batches([(x, labels), [x, labels]], 16)] == [1, 1]
    assert [len(b.args) for b in read_batches([(x, mask)], 16)] == [2]
    assert [len(b.args) for b in read_batches([(x, torch.rand(4))], 16)] == [2]  # timesteps are no labels

    def timed(x: Tensor, t: Tensor) -> Tensor:
        return x

    def plain(x: Tensor) -> Tensor:
        return x

    assert [len(b.args) for b in read_batches([(x, labels)], 16, timed)] == [2]  # it asks for them
    assert [len(b.args) for b in read_batches([(x, torch.rand(4))], 16, plain)] == [1]  # it has no place for them
    assert [len(b.args) for b in read_batches((x, labels), 16)] == [2]  # a tuple is a call's arguments as they stand
    (batch,) = read_batches([{"x": x, "labels": labels}], 16)
    assert list(batch.kwargs) == ["x"]


def test_large_batches_are_split_along_their_samples() -> None:
    x, scale = torch.randn(10, 3), torch.randn(3)
    parts = read_batches((x, scale), 4)
    assert [part.samples for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part.args[0] for part in parts]), x)
    assert all(part.args[1] is scale for part in parts)


def test_model_with_keyword_arguments_and_padding_is_rehearsed() -> None:
    entry = ZOO["hf_vit"]
    model, x = entry.model(), entry.batch()

    def call(pixel_values: Tensor) -> Any:
        return model(pixel_values=pixel_values)

    with Trial(call, Options(unread="keep")) as trial:
        batch = Batch((), {"pixel_values": x})
        plain = trial.plain(batch)
        reduced = trial.reduced(batch, {site.id: Choice("mlerp", "keys", 4) for site in trial.sites})
    assert [t.shape for t in tensors(reduced)] == [t.shape for t in tensors(plain)]
    assert relative_error(reduced, plain) > 1e-4
