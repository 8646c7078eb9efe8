"""What tokens are compared by: keys averaged over heads, keys of all heads, or queries and keys of all heads."""

from __future__ import annotations

import pytest
import torch

import tofu_fx
from tests.harness import MEANING_TOLERANCE, compiled, relative_error, same_bits, tensors
from tests.oracle.stream import Reducer, reference_vit
from tests.zoo import ZOO
from tofu_fx.calibration.batches import Batch
from tofu_fx.calibration.trial import Trial
from tofu_fx.plan.options import Options

ROWS = [("mlerp", 6), ("prune", 5), ("mean", 4)]


@torch.no_grad()
@pytest.mark.parametrize("match", ["keys", "heads", "queries_keys", "features"])
@pytest.mark.parametrize("name", ["vit_avg_of_patches", "deit_distilled", "dinov2_registers"])
def test_reduced_model_equals_the_reference(name: str, match: str) -> None:
    entry = ZOO[name]
    model, x = entry.model(), entry.batch()
    plan = tofu_fx.explain(model, x, options={"r": 1, "unread": "keep"}).plan
    rows = [
        row.model_copy(update={"strategy": strategy, "r": r, "match": match})
        for row, (strategy, r) in zip(plan.sites, ROWS, strict=True)
    ]
    expected = reference_vit(model, x, Reducer(ROWS, *entry.protected, match=match))
    found = compiled(model, plan=tofu_fx.Plan(sites=rows))(x)
    assert relative_error(found, expected) < MEANING_TOLERANCE


@torch.no_grad()
def test_option_is_the_same_as_a_plans_rows() -> None:
    entry = ZOO["vit_avg_of_patches"]
    model, x = entry.model(), entry.batch()
    plan = tofu_fx.explain(model, x, options={"r": 5, "match": "heads", "unread": "keep"}).plan
    assert {row.match for row in plan.sites} == {"heads"}
    with_option = compiled(model, r=5, match="heads")(x)
    assert same_bits(compiled(model, plan=plan)(x), with_option)
    assert not same_bits(compiled(model, r=5)(x), with_option)  # it makes a difference


# Layouts of keys and queries that differ: fused, written out, batch first or last, heads merged with the batch, einsum.
LAYOUTS = (
    "vit", "eva02", "hf_vit_eager", "einops_class", "grouped_query", "multihead_weights", "encoder_tokens_first",
    *(pytest.param(name, marks=pytest.mark.nightly("it has another's layout"))
      for name in ("beit", "einsum", "encoder_batch_first")),
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_kinds_are_of_the_same_keys_in_every_layout(name: str) -> None:
    entry = ZOO[name]
    with Trial(entry.model(), Options(unread="keep")) as trial:
        batch = Batch((entry.batch(),), {})
        plain = trial.plain(batch)
        assert tensors(plain)
        trial.record(batch)
        for site in trial.sites:
            recorded = trial.recorded(site.id)
            assert recorded is not None
            rehearsal, entry_, inputs, start = recorded
            _, values = rehearsal.run(inputs, {}, start, list(entry_.metrics.values()))
            keys, heads, both = (values[entry_.metrics[kind]] for kind in ("keys", "heads", "queries_keys"))
            features = values[entry_.metrics["features"]]
            assert features.shape[:2] == keys.shape[:2]
            assert features.mean(2).abs().max() < 1e-5 * features.abs().max()
            batch_size, tokens, width = keys.shape
            apart = heads.view(batch_size, tokens, -1, width)
            assert torch.allclose(apart.mean(2), keys, rtol=1e-4, atol=1e-5)
            assert torch.equal(both[..., -heads.shape[2] :], heads)
            queries = both[..., : -heads.shape[2]]
            assert queries.shape[2] % width == 0
            assert queries.std() > 0
