"""Branches on fewer tokens, the residual on all: structure, identity, and meaning against a reference in eager mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import tofu_fx
from tests.harness import EAGER, MEANING_TOLERANCE, Study, compiled, prove, randomise, relative_error, same_bits, study
from tests.oracle.branches import Step
from tests.rewriting.branching import (
    BATCH,
    BRANCHES,
    DEPTH,
    DIM,
    HEADS,
    MODELS,
    PATCHES,
    SIDE,
    TEXT,
    Block,
    R,
    Ready,
    ViT,
    branch,
    images,
    reference,
)
from tests.zoo import CATALOGUE
from tofu_fx.backend import tofu

# A gradient is a longer chain of the same sums than the output (as in tests/front/test_training.py).
GRADIENT_TOLERANCE = 4 * MEANING_TOLERANCE

ops, aten = torch.ops.tofu, torch.ops.aten
FUSE, REBASE, RESTORE = ops.fuse_tokens.default, ops.rebase.default, ops.restore_tokens.default


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest) -> Any:
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


_studied: dict[str, Study] = {}


def studied(name: str) -> Study:
    """A model under the options that the tests below look at, traced once."""
    if name not in _studied:
        variants = {f"{b}, {s}": branch(branches=BRANCHES[b], strategy=s) for b in BRANCHES for s in ("mean", "prune")}
        variants |= {
            f"reuse {reuse}": branch(branches=BRANCHES["both"], reuse=reuse) for reuse in ("none", "resolution")
        }
        _studied[name] = study(randomise(MODELS[name]()), images(), variants=variants, proofs=False)
    return _studied[name]


@pytest.mark.parametrize("strategy", ["mean", "prune"])
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("name", MODELS)
def test_output_equals_the_reference_written_by_hand(name: str, branches: str, strategy: str) -> None:
    found, model = studied(name), randomise(MODELS[name]())
    expected = model.norm(reference(model, images(), BRANCHES[branches], strategy=strategy)[-1])
    output = found.outputs[f"{branches}, {strategy}"]
    assert len(found.reducing(f"{branches}, {strategy}")) == DEPTH
    assert relative_error(output, expected) < MEANING_TOLERANCE
    assert relative_error(output, found.outputs["plain"]) > 1e-3


@pytest.mark.parametrize("reuse", ["none", "resolution"])
@pytest.mark.parametrize("name", ["pre-norm", "rotary, class token", "post-norm"])
def test_other_reuse_equals_the_reference_too(name: str, reuse: str) -> None:
    found, model = studied(name), randomise(MODELS[name]())
    expected = model.norm(reference(model, images(), BRANCHES["both"], reuse=reuse)[-1])
    assert relative_error(found.outputs[f"reuse {reuse}"], expected) < MEANING_TOLERANCE
    assert relative_error(found.outputs[f"reuse {reuse}"], found.outputs["both, mean"]) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_all_proofs_hold(name: str) -> None:
    options = {"placement": "branch", "branches": ["attention", "mlp"]}
    proofs = prove(randomise(MODELS[name]()), images(), r=R, options=options).check()
    prefix = MODELS[name]().prefix
    assert [(site.prefix, site.suffix, site.grid) for site in proofs.matched] == [(prefix, 0, (1, SIDE, SIDE))] * DEPTH


@pytest.mark.parametrize("name", ["pre-norm", "class token", "post-norm"])
def test_a_block_has_one_match_and_all_branches_end_ahead_of_their_residual_add(name: str) -> None:
    found, prefix = studied(name), MODELS[name]().prefix
    whole = (BATCH, prefix + PATCHES, DIM)
    for branches, each in (("attention", 1), ("both", 2)):
        variant = f"{branches}, mean"
        fused, restored = found.nodes(variant, FUSE), found.nodes(variant, RESTORE)
        assert [node.args[3:7] for node in fused] == [(R, "mean", prefix, 0)] * DEPTH
        assert [list(node.args[7]) for node in fused] == [[1, SIDE, SIDE, 2, 0]] * DEPTH
        assert len(found.nodes(variant, REBASE)) == DEPTH * (each - 1)
        assert len(restored) == DEPTH * each
        for node in restored:
            assert node.args[2:] in ((), (None, None)), "a copy of each token's representative"
            assert {user.target for user in node.users} == {aten.add.Tensor}
        # Every addition of two streams is on whole tokens: the residual itself is never reduced.
        adds = [node for node in found.nodes(variant, aten.add.Tensor) if node.meta["val"].shape[-1] == DIM]
        assert {tuple(node.meta["val"].shape) for node in adds} == {whole}
        reduced = [n for n in found.nodes(variant, aten.linear.default) if n.meta["val"].shape[1] == whole[1] - R]
        assert len(reduced) == DEPTH * 2 * each


def test_blocks_share_a_match_by_resolution_or_have_one_for_each_branch() -> None:
    found = studied("pre-norm")
    assert len(found.nodes("reuse resolution", FUSE)) == 1
    assert len(found.nodes("reuse resolution", REBASE)) == 2 * DEPTH - 1
    first, *later = found.reducing("reuse resolution")
    assert first.shares is None
    assert all(site.shares == first.id for site in later)
    assert len(found.nodes("reuse none", FUSE)) == 2 * DEPTH
    assert found.nodes("reuse none", REBASE) == []


def test_sites_without_an_image_never_share_and_those_told_of_one_do() -> None:
    x = torch.randn(BATCH, PATCHES, DIM, generator=torch.Generator().manual_seed(3))
    variants = {
        "without": branch(reuse="resolution"),
        "with": branch(reuse="resolution", grid=(SIDE, SIDE)),
        "three quarters": branch(0.75, grid=(SIDE, SIDE)),
    }
    found = study(randomise(Ready()), x, variants=variants, proofs=False)
    assert len(found.nodes("without", FUSE)) == DEPTH
    assert {site.shares for site in found.reducing("without")} == {None}
    assert len(found.nodes("with", FUSE)) == 1
    assert [site.r for site in found.reducing("three quarters")] == [27] * DEPTH


# ---- where the placement comes from ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "placement"),
    [
        (lambda: ViT(depth=3), "stream"),
        (lambda: ViT(depth=2), "branch"),
        (lambda: ViT(depth=3, out="image"), "branch"),
        (lambda: ViT(depth=3, out="layers"), "stream"),
        (lambda: ViT(depth=2, prefix=1, out="class"), "stream"),
    ],
)  # fmt: skip
def test_auto_takes_branches_behind_few_sites_and_where_the_input_is_given_back(
    model: Callable[[], ViT], placement: str
) -> None:
    explained = tofu_fx.explain(randomise(model()), images(), options={**EAGER, "ratio": 0.3})
    assert {row.placement for row in explained.plan.sites} == {placement}


def test_layers_that_a_dense_head_reads_come_out_whole_and_right() -> None:
    model = randomise(ViT(prefix=1, out="layers"))
    found = study(model, images(), variants={"branch": branch(branches=["attention", "mlp"])}, proofs=False)
    expected = reference(model, images(), ["attention", "mlp"])
    assert isinstance(found.outputs["branch"], tuple)
    assert relative_error(found.outputs["branch"], expected) < MEANING_TOLERANCE
    assert len(found.nodes("branch", RESTORE)) == 2 * DEPTH, "none for the outputs: the residual is whole"


def test_sams_global_blocks_are_reduced_by_default_and_its_windows_declined() -> None:
    case = CATALOGUE["timm: samvit"]
    (x,), _ = case.inputs()
    found = study(case.model(), x, variants={"auto": {"ratio": 0.5}}, proofs=False)
    sites = found.sites("auto")
    assert [site.matched for site in sites] == [False, True, False, True]
    assert [(site.placement, site.grid, site.r) for site in sites if site.matched] == [("branch", (1, 8, 8), 32)] * 2
    assert all(site.decline is not None and site.decline.reason for site in sites if not site.matched)
    assert 1e-3 < relative_error(found.outputs["auto"], found.outputs["plain"]) < 1


class Pyramid(nn.Module):
    """Attention at images that get smaller, and (a UNet's) larger again; skips are added."""

    def __init__(self, sides: Sequence[int]) -> None:
        super().__init__()
        self.sides, self.blocks = tuple(sides), nn.ModuleList(Block() for _ in sides)

    def forward(self, x: Tensor) -> Tensor:
        for side, block in zip(self.sides, self.blocks, strict=True):
            x = F.interpolate(x, size=(side, side), mode="bilinear")
            x = block(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (side, side))
        return x


def test_resolutions_are_limited_in_a_unet_and_only_on_demand_in_a_pyramid() -> None:
    x = torch.randn(BATCH, DIM, 16, 16, generator=torch.Generator().manual_seed(2))
    limits = {str(limit): branch(max_downsample=limit) for limit in (1, 2, 4, 8)}
    shared = {"shared": branch(max_downsample=8, reuse="resolution")}
    found = study(
        randomise(Pyramid([16, 8, 4, 8, 16])), x, variants={"none": branch(), **limits, **shared}, proofs=False
    )
    sides = {name: [site.grid[1] for site in found.reducing(name)] for name in found.outcomes}  # type: ignore[index]
    assert sides["none"] == sides["1"] == [16, 16]
    assert sides["2"] == [16, 8, 8, 16]
    assert sides["4"] == sides["8"] == [16, 8, 4, 8, 16]
    owners = [site.shares for site in found.reducing("shared")]
    ids = [site.id for site in found.reducing("shared")]
    assert owners == [None, None, None, ids[1], ids[0]]
    down = study(randomise(Pyramid([16, 8, 4])), x, variants={"none": branch(), "1": limits["1"]}, proofs=False)
    assert [len(down.reducing(name)) for name in ("none", "1")] == [3, 1]


# ---- text and image attended to as one -------------------------------------------------------------------------------


class Joint(nn.Module):
    """Two streams with weights of their own that meet in one attention, the text first or last."""

    def __init__(self, text_first: bool) -> None:
        super().__init__()
        self.text_first = text_first
        self.embed = nn.Conv2d(3, DIM, 4, 4)
        self.images, self.texts = (nn.ModuleList(Block() for _ in range(DEPTH)) for _ in range(2))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(images).flatten(2).transpose(1, 2)
        for own, other in zip(self.images, self.texts, strict=True):
            parts = [other.attention.heads(other.norm1(text)), own.attention.heads(own.norm1(x))]
            q, k, v = (torch.cat(both if self.text_first else both[::-1], 2) for both in zip(*parts, strict=True))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            if self.text_first:
                a, b = y.split([text.shape[1], x.shape[1]], 1)
            else:
                b, a = y.split([x.shape[1], text.shape[1]], 1)
            x, text = x + own.attention.proj(b), text + other.attention.proj(a)
            x, text = x + own.mlp(own.norm2(x)), text + other.mlp(other.norm2(text))
        return self.norm(x), text


def joint_reference(model: Joint, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The image's tokens merged on their way into the attention, the text's never."""
    x = model.embed(images).flatten(2).transpose(1, 2)
    for own, other in zip(model.images, model.texts, strict=True):
        h = own.norm1(x)
        step = Step.of(h, R, 0, SIDE)
        ours, theirs = own.attention.heads(step.merge(h)), other.attention.heads(other.norm1(text))
        q, k, v = (torch.cat(both, 2) for both in zip(theirs, ours, strict=True))
        logits = torch.cat([torch.zeros(len(text), text.shape[1]), step.size.log()], 1)
        weights = (q @ k.transpose(-1, -2) * (DIM // HEADS) ** -0.5 + logits[:, None, None]).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        text = text + other.attention.proj(y[:, : text.shape[1]])
        x = x + step.back(own.attention.proj(y[:, text.shape[1] :]))
        x, text = x + own.mlp(own.norm2(x)), text + other.mlp(other.norm2(text))
    return model.norm(x), text


@pytest.mark.parametrize("text_first", [True, False])
def test_text_beside_the_image_is_never_merged(text_first: bool) -> None:
    model = randomise(Joint(text_first))
    text = torch.randn(BATCH, TEXT, DIM, generator=torch.Generator().manual_seed(9))
    found = study(model, images(), text, variants={"branch": branch()}, proofs=False)
    assert [(site.tokens, site.prefix, site.suffix, site.r) for site in found.reducing("branch")] == [
        (PATCHES, 0, 0, R)
    ] * 3
    assert relative_error(found.outputs["branch"], joint_reference(model, images(), text)) < MEANING_TOLERANCE
    assert relative_error(found.outputs["branch"], found.outputs["plain"]) > 1e-3
    prove(model, images(), text, r=R, options={"placement": "branch", "branches": ["attention", "mlp"]}).check()


# ---- circumstances ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placing", [{}, {"seed": 3}, {"cell": 3}, {"match": "keys"}])
def test_no_token_removed_gives_the_bits_of_the_untouched_model(placing: dict[str, Any]) -> None:
    model = randomise(ViT(prefix=1))
    plan = tofu_fx.explain(model, images(), options={**EAGER, **branch(0.5, **placing)}).plan
    rows = [row.model_copy(update={"r": 0}) for row in plan.sites]
    expected = model(images())
    assert same_bits(compiled(model, **branch(0.0, **placing))(images()), expected)
    assert same_bits(compiled(model, plan=tofu_fx.Plan(sites=rows))(images()), expected)


def test_a_seed_keeps_other_tokens_and_the_same_on_every_run() -> None:
    model = randomise(ViT())
    variants = {str(seed): branch(seed=seed) for seed in (None, 0, 1)}
    found = study(model, images(), variants=variants, proofs=False)
    assert [node.args[7][4] for name in variants for node in found.nodes(name, FUSE)[:1]] == [0, 1, 2]
    outputs = [found.outputs[name] for name in variants]
    assert all(relative_error(a, b) > 1e-3 for a, b in itertools.pairwise(outputs))
    again = study(model, images(), variants=variants, proofs=False)
    assert all(same_bits(again.outputs[name], found.outputs[name]) for name in variants)


def test_a_batch_of_one_equals_the_reference() -> None:
    model = randomise(ViT(prefix=1))
    expected = model.norm(reference(model, images(1))[-1])
    assert relative_error(compiled(model, **branch())(images(1)), expected) < MEANING_TOLERANCE


def test_a_symbolic_batch_compiles_once_and_is_right_at_every_size() -> None:
    model, counter = randomise(ViT(prefix=1)), CompileCounterWithBackend("eager")

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        counter.frame_count += 1
        return tofu(gm, inputs, options={**EAGER, **branch(branches=["attention", "mlp"])})

    call = torch.compile(model, backend=backend)
    for batch in (3, 2, 5):
        x = images(batch, seed=1)
        torch._dynamo.mark_dynamic(x, 0)
        expected = model.norm(reference(model, images(batch, seed=1), ["attention", "mlp"])[-1])
        assert relative_error(call(x), expected) < MEANING_TOLERANCE
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("inner_backend", "branches"),
    [("aot_eager", ["attention", "mlp"]), ("inductor", ["attention"])],  # inductor takes 10 s for each branch
)
def test_other_compilers_behind_it_agree(inner_backend: str, branches: list[str]) -> None:
    model = randomise(ViT(prefix=1, depth=1))
    options = branch(branches=branches, inner_backend=inner_backend)
    expected = model.norm(reference(model, images(), branches)[-1])
    assert relative_error(compiled(model, **options)(images()), expected) < MEANING_TOLERANCE


def _gradients(call: Callable[[Tensor], Tensor], model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    x = images(seed=1).requires_grad_()
    out = call(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert x.grad is not None
    return {"input": x.grad, **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(("kind", "branches"), [("pre", "both"), ("post", "attention"), ("post", "both")])
def test_gradient_equals_autograd_through_the_reference(kind: str, branches: str) -> None:
    model = randomise(ViT(kind, prefix=1)).train()
    options = branch(branches=BRANCHES[branches], inner_backend="aot_eager")
    found = _gradients(compiled(model, **options), model)
    expected = _gradients(lambda x: model.norm(reference(model, x, BRANCHES[branches])[-1]), model)
    plain = _gradients(model, model)
    assert found.keys() == expected.keys() == plain.keys()
    assert max(relative_error(found[key], plain[key]) for key in plain) > 1e-2
    # A gradient that is a difference of larger numbers is as exact as those: measured against the largest of all.
    scale = max(value.abs().max() for value in expected.values())
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < GRADIENT_TOLERANCE * scale, key


@pytest.mark.true_rates
def test_branches_that_do_not_pay_are_declined_and_large_ones_taken() -> None:
    words = "would cost more time than it saves"
    tiny = tofu_fx.explain(randomise(ViT()), images(), options=branch())
    assert [words in row.reason for row in tiny.sites] == [True] * DEPTH
    assert tofu_fx.explain(randomise(ViT()), images(), options=branch(profitable_only=False)).matched == DEPTH
    # Attention alone is 4 N^2 C operations: at 1600 tokens hundreds of times what one reduction of them costs.
    large = ViT(depth=1, side=40)
    assert tofu_fx.explain(large, images(8, 40), options=branch()).matched == 1
