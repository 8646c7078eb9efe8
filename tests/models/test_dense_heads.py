"""Heads that need every token in its place, whichever way they take the patches: restored, never given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tofu_fx
from tests.harness import MEANING_TOLERANCE, compiled, prove, randomise, relative_error, study
from tests.mutation_models import Replaced
from tests.oracle.stream import Reducer, attention, reference_vit
from tests.zoo.odd import JoinedLate

GRID, DIM = 6, 32
PATCHES = GRID * GRID
DEPTH, R = 3, 5


def _grid(patches: Tensor) -> Tensor:
    return patches.transpose(1, 2).reshape(-1, patches.shape[2], GRID, GRID)


def _added(patches: Tensor, token: Tensor) -> Tensor:
    return _grid(patches + token)


#: normalised tokens ``[B, 1 + PATCHES, DIM]`` -> features on the grid
TAKE: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda t: _grid(t[:, 1:]),
    "contiguous": lambda t: _grid(t[:, 1:].contiguous()),
    "clone": lambda t: _grid(t[:, 1:].clone()),
    "narrow": lambda t: _grid(t.narrow(1, 1, PATCHES)),
    "split": lambda t: _grid(t.split([1, PATCHES], 1)[1]),
    "split_with_sizes": lambda t: _grid(torch.split_with_sizes(t, [1, PATCHES], 1)[1]),
    "tensor_split": lambda t: _grid(torch.tensor_split(t, [1], 1)[1]),
    "both parts of a split": lambda t: _added(*reversed(t.split([1, PATCHES], 1))),
    "class token by select": lambda t: _added(t[:, 1:], t[:, 0].unsqueeze(1)),
    "class token by slice": lambda t: _added(t[:, 1:], t[:, :1]),
    "places from the end": lambda t: _added(t[:, -PATCHES:], t[:, :-PATCHES] + t[:, -1 - PATCHES].unsqueeze(1)),
    "permuted first": lambda t: t.permute(0, 2, 1)[:, :, 1:].contiguous().view(-1, DIM, GRID, GRID),
    "unflatten": lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID)),
    "dropout in eval mode": lambda t: _grid(F.dropout(t[:, 1:], 0.5, training=False)),
    "readout by concatenation": lambda t: _grid(
        F.gelu(torch.cat([t[:, 1:], t[:, :1].expand(-1, PATCHES, -1)], -1)).unflatten(-1, (2, DIM)).mean(2)
    ),
    "gate of two branches": lambda t: _grid(_gate(*t[:, 1:].chunk(2, -1))),
    "stacked branches": lambda t: _grid(torch.stack([t[:, 1:].tanh(), t[:, 1:].sin()], 2).sum(2)),
    "other tokens in front": lambda t: _grid(torch.cat([t[:, :1] * 2, t], 1)[:, 2:]),
}


def _gate(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.silu(a) * b, b], -1)


class Dense(nn.Module):
    """A ViT with a convolution over its grid of patches."""

    def __init__(self, take: Callable[[Tensor], Any], head: bool = True) -> None:
        super().__init__()
        self.vit = timm.models.VisionTransformer(
            img_size=4 * GRID, patch_size=4, embed_dim=DIM, depth=DEPTH, num_heads=2, num_classes=0
        )
        self.take, self.head = take, nn.Conv2d(DIM, 4, 3, padding=1) if head else None

    def after(self, tokens: Tensor) -> Any:
        """What follows the normalised tokens."""
        taken = self.take(tokens)
        return taken if self.head is None else self.head(taken)

    def forward(self, images: Tensor) -> Any:
        return self.after(self.vit.forward_features(images))


def _images() -> Tensor:
    return torch.randn(2, 3, 4 * GRID, 4 * GRID, generator=torch.Generator().manual_seed(4))


def _reference(model: Dense, strategy: str) -> Any:
    reducer = Reducer([(strategy, R)] * DEPTH, prefix=1)
    return model.after(reference_vit(model.vit, _images(), reducer, features=True))


@torch.no_grad()
@pytest.mark.parametrize("way", TAKE)
def test_dense_head_gets_whole_tokens_whichever_way_it_takes_them(way: str) -> None:
    model = randomise(Dense(TAKE[way]))
    found = study(model, _images(), variants={name: {"r": R, "strategy": name} for name in ("prune", "mean", "mlerp")})
    for strategy in ("prune", "mean", "mlerp"):
        assert len(found.reducing(strategy)) == DEPTH, [str(site.decline) for site in found.sites(strategy)]
        assert relative_error(found.outputs[strategy], _reference(model, strategy)) < MEANING_TOLERANCE
        assert relative_error(found.outputs[strategy], found.outputs["plain"]) > 1e-3


OUT: dict[str, Callable[[Tensor], Any]] = {
    "patches": lambda t: t[:, 1:],
    "both by slices": lambda t: (t[:, 0], t[:, 1:]),
    "both by split": lambda t: t.split([1, PATCHES], 1),
    "both by tensor_split": lambda t: torch.tensor_split(t, [1], 1),
    "in a dict": lambda t: {"cls": t[:, 0], "grid": _grid(t[:, 1:]), "mean": t[:, 1:].mean(1)},
}


@torch.no_grad()
@pytest.mark.parametrize("way", OUT)
def test_outputs_of_tokens_have_their_shapes_and_own_features(way: str) -> None:
    model = randomise(Dense(OUT[way], head=False))
    plain, reduced = model(_images()), compiled(model, r=R, strategy="mlerp")(_images())
    expected = _reference(model, "mlerp")
    if way == "in a dict":  # the mean is taken over the tokens that are left, weighted: not of the restored ones
        del reduced["mean"], expected["mean"], plain["mean"]
    assert relative_error(reduced, expected) < MEANING_TOLERANCE
    assert relative_error(reduced, plain) > 1e-3


class Skips(nn.Module):
    """Features of an early and of the last layer side by side, as a dense head takes them; parts of other runs."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.vit = Dense(TAKE["slice"]).vit
        self.join, self.head = join, nn.Linear(DIM, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        early = x
        for block in self.vit.blocks:
            x = block(x)
        return self.head(self.join(early, x)).mean(1)


JOIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "whole run": lambda early, late: early + late,
    "without the class token": lambda early, late: early[:, 1:] + late[:, 1:],
    "with one token more": lambda early, late: (
        torch.cat([late[:, :1], early + late], 1) + torch.cat([early[:, :1], early], 1)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("join", JOIN)
def test_older_features_of_any_run_meet_newer_ones(join: str) -> None:
    model = randomise(Skips(JOIN[join]))
    found = study(model, _images(), variants={"mean": {"r": R, "strategy": "mean"}})
    assert len(found.reducing("mean")) == DEPTH, [str(site.decline) for site in found.sites("mean")]
    # A weighted mean over tokens undoes a mean merge: the early features' part of the output is that of all tokens.
    reducer = Reducer([("mean", R)] * DEPTH, prefix=1)
    early = model.vit._pos_embed(model.vit.patch_embed(_images()))
    x = early
    for block in model.vit.blocks:
        branch, keys = attention(block.attn, block.norm1(x), reducer)
        x = reducer.reduce(x + block.ls1(branch), keys)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    for step in reversed(reducer.steps):  # each token's representative, so that the weighted mean becomes a plain one
        x = x.gather(1, step["assignment"][..., None].expand(-1, -1, DIM))
    assert relative_error(found.outputs["mean"], model.head(model.join(early, x)).mean(1)) < MEANING_TOLERANCE


def test_explains_plan_keeps_sites_that_were_given_up_and_can_be_used_again() -> None:
    model, x = JoinedLate().eval(), torch.randn(2, 24, DIM, generator=torch.Generator().manual_seed(5))
    report = tofu_fx.explain(model, x, options={"r": 4})
    assert report.declined > 0
    assert report.matched > 0
    with torch.no_grad():
        again = compiled(model, plan=report.plan)(x)
        assert torch.equal(again, compiled(model, r=4)(x))


def test_a_stream_that_is_normed_between_two_reductions_is_restored_by_copies_ahead_of_the_norm() -> None:
    x = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0))
    model = randomise(Replaced())
    prove(model, x, options={"placement": "stream"}).check()
    found = study(model, x, variants={"both": {"r": 2, "placement": "stream"}}, proofs=False)
    restores = found.nodes("both", torch.ops.tofu.restore_tokens.default)
    # The gains since the second reduction are added to what was there then; to what was ahead of the norm they are not.
    assert [len(node.args) for node in restores] == [4, 2]
