"""Every model of the zoo: what the compiler finds in it, and the proofs of the rewrite."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import tofu_fx  # noqa: F401 - registers torch.ops.tofu
from tests.harness import (
    MEANING_TOLERANCE,
    NIGHTLY,
    PERMUTATION_TOLERANCE,
    Study,
    meaning_errors,
    relative_error,
    same_bits,
    study,
    tensors,
)
from tests.oracle.stream import Reducer, reference_vit
from tests.zoo import ZOO

R = 4
STRATEGIES = ("prune", "mean", "mlerp", "auto")
INTERPRETED = STRATEGIES if NIGHTLY else ("mlerp", "auto")  # auto prunes ahead and merges behind
#: What is made of these by the same code as of those: the nightly profile has them too.
LIKE = {
    "vit_augreg_224": "vit", "deit": "vit", "hf_deit": "hf_vit", "hf_vit_classifier": "hf_vit", "hf_dinov2": "dinov2",
    "hf_clip": "clip", "hf_siglip": "siglip",
}  # fmt: skip
NAMES = [name for name in ZOO if NIGHTLY or name not in LIKE]
# timm's plain VisionTransformer, for which the reference is written out. (BEiT, EVA, rope and relpos have companions
# indexed by token: the generated transformers of tests/properties have the same, with a reference.)
PLAIN_VITS = [
    "vit", *(["vit_augreg_224", "deit"] if NIGHTLY else []), "vit_augreg_384", "vit_gap", "vit_avg_of_patches",
    "deit_distilled", "deit3", "dinov2", "dinov2_registers", "clip", "siglip",
]  # fmt: skip


@functools.cache
def studied(name: str) -> Study:
    """The model traced once and compiled under every strategy; shared by all the tests below."""
    entry = ZOO[name]
    with torch.no_grad():
        variants = {strategy: {"r": R, "strategy": strategy} for strategy in STRATEGIES}
        return study(entry.model(), entry.batch(), variants=variants, interpret=INTERPRETED)


@functools.cache
def features_studied(name: str) -> Study:
    """The same for ``forward_features``, which returns the tokens."""
    entry = ZOO[name]
    with torch.no_grad():
        variants = {strategy: {"r": R, "strategy": strategy} for strategy in STRATEGIES}
        return study(entry.model().forward_features, entry.batch(), variants=variants)


def rows(sites: list[Any]) -> list[tuple[str, int]]:
    return [(site.strategy, site.r) for site in sites]


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_make_outputs_that_depend_on_everything(name: str) -> None:
    for output in tensors(studied(name).outputs["plain"]):
        assert (output[0] - output[1]).abs().max() > 1e-2 * output.abs().max()
        assert output.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_over_tokens_is_matched_and_every_other_declined_with_its_reason(name: str) -> None:
    entry, sites = ZOO[name], studied(name).sites("auto")
    matched = [site for site in sites if site.matched]
    assert [(site.tokens, site.prefix, site.suffix) for site in matched] == [
        (entry.tokens, *entry.protected)
    ] * entry.sites
    assert len({site.id for site in sites}) == len(sites)
    reasons = [str(site.decline) for site in sites if not site.matched]
    assert len(reasons) == len(entry.declined)
    assert all(word in reason for word, reason in zip(entry.declined, reasons, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graph_has_one_fused_node_per_site_on_ever_fewer_tokens(name: str, strategy: str) -> None:
    entry, found = ZOO[name], studied(name)
    fused = found.nodes(strategy, torch.ops.tofu.fuse_tokens.default)
    tokens = [node.args[0].meta["val"].shape[1] for node in fused]
    assert tokens == [entry.tokens - R * depth for depth in range(entry.sites)]
    assert {node.args[0].meta["val"].shape[0] for node in fused} == {2}, "the batch must not be folded into features"
    wanted = [strategy] * 3 if strategy != "auto" else ["prune", "prune", "mlerp"]
    assert [node.args[3:] for node in fused] == [(R, name, *entry.protected) for name in wanted]
    restored = found.nodes(strategy, torch.ops.tofu.restore_tokens.default)
    assert len(restored) == (entry.sites if entry.whole else 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_outputs_are_finite_of_the_traced_form_and_changed_by_the_reduction(name: str, strategy: str) -> None:
    found = studied(name)
    outputs, plain = found.outputs[strategy], found.outputs["plain"]
    assert type(outputs) is type(plain)
    assert all(output.isfinite().all() for output in tensors(outputs))
    assert 1e-3 < relative_error(outputs, plain) < 2  # checks shapes and dtypes too


@pytest.mark.parametrize("name", NAMES)
def test_polymorphic_graph_without_reductions_gives_the_same_bits(name: str) -> None:
    found = studied(name)
    assert same_bits(found.outputs["polymorphic"], found.outputs["plain"])
    for compilation in found.polymorphic:
        sizes = [node for node in compilation.gm.graph.nodes if node.meta.get("tofu_literal")]
        assert sizes, "a graph without a literal token count would prove nothing"


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_tokens_at_every_site_loses_nothing(name: str) -> None:
    entry, found = ZOO[name], studied(name)
    assert len(found.nodes("permute", torch.ops.tofu.permute_tokens.default)) == entry.sites
    assert relative_error(found.outputs["permute"], found.outputs["plain"]) < PERMUTATION_TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_merged_tokens_are_worth_what_they_stand_for(name: str) -> None:
    errors = meaning_errors(studied(name))
    assert set(errors) == set(INTERPRETED)
    assert max(errors.values()) < MEANING_TOLERANCE


@pytest.mark.parametrize("name", PLAIN_VITS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reduced_vit_equals_the_eager_reference(name: str, strategy: str) -> None:
    entry, found = ZOO[name], studied(name)
    with torch.no_grad():
        reducer = Reducer(rows(found.reducing(strategy)), *entry.protected)
        expected = reference_vit(entry.model(), entry.batch(), reducer)
    assert relative_error(found.outputs[strategy], expected) < MEANING_TOLERANCE


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "dinov2_registers", "siglip"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_returned_tokens_equal_the_reference_restored_ahead_of_the_final_norm(name: str, strategy: str) -> None:
    entry, found = ZOO[name], features_studied(name)
    with torch.no_grad():
        reducer = Reducer(rows(found.reducing(strategy)), *entry.protected)
        expected = reference_vit(entry.model(), entry.batch(), reducer, features=True)
    assert relative_error(found.outputs[strategy], expected) < MEANING_TOLERANCE
