"""Random transformers through the whole backend: the three proofs, whatever way the model is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from tests.eager_reference import Reducer, Undecided
from tests.harness import MEANING_TOLERANCE, PERMUTATION_TOLERANCE, randomise, relative_error, same_bits, study, tensors
from tests.zoo.blocks import Spec, Transformer

flags = st.booleans()


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any way to write a transformer that the compiler is meant to take."""
    prefix = draw(st.integers(0, 5))
    pooling = draw(st.sampled_from(["class", "mean", "mean_patches", "tokens", "conv", "attention"]))
    return Spec(
        layout=draw(st.sampled_from(["BNC", "NBC", "merged"])),
        post_norm=draw(flags),
        fused_qkv=draw(flags),
        attention=draw(st.sampled_from(["sdpa", "matmul", "einsum", "bmm"])),
        residual=draw(st.sampled_from(["plain", "branch_scaled", "stream_scaled"])),
        layer_scale=draw(flags),
        dropout=draw(flags),
        qk_norm=draw(flags),
        mask=draw(st.sampled_from(["none", "additive", "bool", "relative"])),
        rotary=draw(flags),
        prefix=max(prefix, 1) if pooling == "class" else prefix,
        suffix=draw(st.integers(0, 2)) if pooling in ("class", "tokens") else 0,
        pooling=pooling,
        in_place=draw(flags),
        depth=draw(st.integers(1, 3)),
        grid=draw(st.sampled_from([(3, 4), (2, 5), (4, 4), (3, 3)])),
    )


def prove(spec: Spec, strategy: str = "mlerp", r: int = 2, batch: int = 2, seed: int = 0) -> None:
    """All proofs of one transformer under one strategy."""
    torch.manual_seed(seed)
    model = randomise(Transformer(spec), seed)
    x = torch.randn(batch, spec.patches, 5)
    with torch.no_grad():
        found = study(model, x, variants={"reduced": {"r": r, "strategy": strategy}})
        plain = found.outputs["plain"]
        assert same_bits(found.outputs["polymorphic"], plain)
        assert relative_error(found.outputs["permute"], plain) < PERMUTATION_TOLERANCE
        assert [output.shape for output in tensors(found.outputs["reduced"])] == [t.shape for t in tensors(plain)]
        sites = found.sites("reduced")
        assert len(found.reducing("reduced")) == expected_sites(spec), [str(site.decline) for site in sites]
        done = [(site.strategy, site.r) for site in sites if site.matched]
        rows = done + [("prune", 0)] * (spec.depth - len(done))
        lead, tail = (sites[0].lead, sites[0].tail) if done else (spec.prefix, spec.suffix)
        assert (lead, tail) == (spec.prefix, spec.suffix)
        try:
            expected = model(x, Reducer(rows, lead, tail))
        except Undecided:
            event("a decision too close to rounding")
            return
        assert relative_error(found.outputs["reduced"], expected) < MEANING_TOLERANCE
        event("equal to the reference")


def expected_sites(spec: Spec) -> int:
    """Every attention; nothing else is a reason to decline."""
    return spec.depth


@given(
    spec=specs(),
    strategy=st.sampled_from(["prune", "mean", "mlerp", "auto"]),
    r=st.integers(1, 2),
    batch=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_any_transformer_keeps_its_bits_its_outputs_and_its_meaning(
    spec: Spec, strategy: str, r: int, batch: int, seed: int
) -> None:
    prove(spec, strategy, r, batch, seed)


@pytest.mark.parametrize("pooling", ["class", "mean", "mean_patches", "tokens", "conv", "attention"])
@pytest.mark.parametrize("layout", ["BNC", "NBC", "merged"])
def test_every_layout_with_every_pooling(layout: str, pooling: str) -> None:
    prove(Spec(layout=layout, pooling=pooling))
