"""Random transformers through the whole backend: the three proofs, whatever way the model is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.harness import MEANING_TOLERANCE, PERMUTATION_TOLERANCE, randomise, relative_error, same_bits, study, tensors
from tests.oracle.stream import Reducer, Undecided
from tofu_fx.testing import Spec, Transformer

flags = st.booleans()
#: Each takes a second, and outside of the nightly run they are the same ones every time.
few = settings(max_examples=15) if settings.get_current_profile_name() == "ci" else settings()


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any way to write a transformer that the compiler is meant to take and the reference can follow."""
    prefix = draw(st.integers(0, 5))
    layout = draw(st.sampled_from(["BNC", "NBC", "merged"]))
    pooling = draw(st.sampled_from(["class", "mean", "mean_patches", "max", "tokens", "conv", "attention"]))
    whole = pooling in ("tokens", "conv")
    return Spec(
        layout=layout,
        norm=draw(st.sampled_from(["pre", "post", "sandwich"])),
        fused_qkv=draw(flags),
        attention=draw(st.sampled_from(["sdpa", "matmul", "einsum", "bmm"])),
        residual=draw(st.sampled_from(["plain", "branch_scaled", "stream_scaled"])),
        layer_scale=draw(flags),
        dropout=draw(flags),
        qk_norm=draw(flags),
        mask=draw(st.sampled_from(["none", "additive", "bool", "relative"])),
        rotary=draw(flags),
        # A table that meets tokens merged with the batch is a barrier: fewer sites, nothing to compare.
        positions="once" if layout == "merged" else draw(st.sampled_from(["once", "every block", "queries and keys"])),
        prefix=max(prefix, 1) if pooling == "class" else prefix,
        suffix=draw(st.integers(0, 2)) if pooling in ("class", "tokens") else 0,
        pooling=pooling,
        # After a view whole tokens are restored as copies, which the reference does for post-norm only.
        alias=draw(st.sampled_from(["none", "clone", "slice"] + ([] if whole else ["view_as", "detach", "identity"]))),
        reshape="none" if whole else draw(st.sampled_from(["none", "flatten", "features", "swap"])),
        in_place=draw(flags),
        dead_code=draw(flags),
        depth=draw(st.integers(1, 3)),
        grid=draw(st.sampled_from([(3, 4), (2, 5), (4, 4), (3, 3)])),
    )


def prove(spec: Spec, strategy: str = "mlerp", r: int = 2, batch: int = 2, seed: int = 0) -> str:
    """All proofs of one transformer under one strategy; says whether the last one could be made."""
    torch.manual_seed(seed)
    model = randomise(Transformer(spec), seed)
    (x,) = model.example_inputs(batch, seed)
    with torch.no_grad():
        # The reference reduces the stream; the branches of blocks have theirs in tests/rewriting/test_branches.py.
        stream = {"placement": "stream"}
        found = study(model, x, variants={"reduced": {"r": r, "strategy": strategy, **stream}}, base=stream)
        plain = found.outputs["plain"]
        assert same_bits(found.outputs["polymorphic"], plain)
        assert relative_error(found.outputs["permute"], plain) < PERMUTATION_TOLERANCE
        assert [output.shape for output in tensors(found.outputs["reduced"])] == [t.shape for t in tensors(plain)]
        sites = found.sites("reduced")
        assert len(found.reducing("reduced")) == spec.depth, [str(site.decline) for site in sites]
        done = [(site.strategy, site.r) for site in sites if site.matched]
        rows = done + [("prune", 0)] * (spec.depth - len(done))
        prefix, suffix = (sites[0].prefix, sites[0].suffix) if done else (spec.prefix, spec.suffix)
        assert (prefix, suffix) == (spec.prefix, spec.suffix)
        try:
            expected = model(x, reducer=Reducer(rows, prefix, suffix))
        except Undecided:
            return "a decision too close to rounding"
        assert relative_error(found.outputs["reduced"], expected) < MEANING_TOLERANCE
        return "equal to the reference"


@few
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
    event(prove(spec, strategy, r, batch, seed))


@pytest.mark.parametrize("pooling", ["class", "mean", "mean_patches", "tokens", "conv", "attention"])
@pytest.mark.parametrize("layout", ["BNC", "NBC", "merged"])
def test_every_layout_with_every_pooling(layout: str, pooling: str) -> None:
    assert prove(Spec(layout=layout, pooling=pooling)) == "equal to the reference"


@pytest.mark.parametrize("mask", ["none", "additive", "bool", "relative"])
@pytest.mark.parametrize("attention", ["sdpa", "matmul", "einsum", "bmm"])
def test_every_attention_with_every_mask(attention: str, mask: str) -> None:
    assert prove(Spec(attention=attention, mask=mask, pooling="mean"), "auto") == "equal to the reference"


@pytest.mark.parametrize("strategy", ["prune", "mean", "mlerp"])
@pytest.mark.parametrize("skip", ["concatenate", "add"])
def test_features_of_a_long_skip_are_merged_with_their_sizes_as_the_stream_was(skip: str, strategy: str) -> None:
    spec = Spec(skip=skip, depth=4, grid=(4, 4), pooling="mean")
    assert prove(spec, strategy, r=3) == "equal to the reference"


# What the generator found, once each.


def test_an_empty_slice_behind_the_last_token_stays_empty() -> None:
    prove(Spec(rotary=True, prefix=1, suffix=0))


def test_keys_of_bmm_are_averaged_over_the_heads_that_share_a_dim_with_the_batch() -> None:
    prove(Spec(attention="bmm", layout="NBC", fused_qkv=False), "mean")


def test_scores_reached_through_flatten_and_unflatten_are_an_attention() -> None:
    prove(Spec(attention="bmm", mask="bool"))


def test_dense_head_behind_prefix_tokens_gets_tokens_restored_ahead_of_the_norm() -> None:
    prove(Spec(pooling="conv", prefix=4, depth=3), "auto")


def test_dense_head_behind_prefix_tokens_of_a_post_norm_stream_gets_copies() -> None:
    prove(Spec(pooling="conv", prefix=2, depth=3, norm="post", rotary=True), "auto")


def test_output_of_a_convolution_has_the_traced_memory_layout() -> None:
    spec = Spec(layout="NBC", norm="post", attention="bmm", qk_norm=True, prefix=5, pooling="conv", depth=3)
    prove(spec, "prune")


def test_mask_that_requires_a_gradient_does_not_fail_the_verification() -> None:
    prove(Spec(mask="relative", attention="sdpa"))


def test_stream_of_batch_times_tokens_is_changed_in_place() -> None:
    prove(Spec(layout="merged", in_place=True, pooling="conv", attention="einsum", depth=1))


def test_output_that_was_traced_channels_last_stays_so_at_batch_one() -> None:
    spec = Spec(
        layout="merged", norm="post", attention="matmul", residual="stream_scaled", dropout=True, mask="bool",
        rotary=True, prefix=5, pooling="conv", in_place=True, depth=3, grid=(3, 4),
    )  # fmt: skip
    prove(spec, "auto", r=1, batch=1, seed=3)


def test_layout_that_hangs_on_the_attention_kernel_is_not_held_against_the_graph() -> None:
    spec = Spec(
        layout="NBC", norm="post", attention="sdpa", residual="branch_scaled", dropout=True, qk_norm=True,
        mask="bool", prefix=1, pooling="conv", in_place=True, depth=1, grid=(2, 5),
    )  # fmt: skip
    prove(spec, "auto", r=1, batch=1, seed=1)
