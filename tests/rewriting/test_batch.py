"""A sample's result does not depend on its batch, whatever meets the stream, and whichever operand it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tofu_fx
from tests.harness import PERMUTATION_TOLERANCE, compiled, randomise, relative_error, study, tensors
from tests.zoo.handwritten import DIM, EinsumAttention, mlp

N, DEPTH, R, BATCH = 20, 3, 4, 3
#: model, its stream, the second input -> the stream after a block
Step = Callable[[Any, int, Tensor, Tensor], Tensor]


class TwoInputs(nn.Module):
    """Blocks that a second input of the batch acts on; class and mean of the tokens come out."""

    def __init__(self, step: Step, out: Callable[[Tensor], Any] = lambda x: (x[:, 0], x.mean(1))) -> None:
        super().__init__()
        self.step, self.out = step, out
        self.token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.attention = nn.ModuleList(EinsumAttention() for _ in range(DEPTH))
        self.mlps = nn.ModuleList(mlp() for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * DEPTH))
        self.scores = nn.Linear(DIM, 1)

    def branch(self, i: int, x: Tensor) -> Tensor:
        """Attention after a norm."""
        return self.attention[i](self.norms[2 * i](x))

    def wide(self, i: int, x: Tensor) -> Tensor:
        """MLP after a norm."""
        return self.mlps[i](self.norms[2 * i + 1](x))

    def forward(self, x: Tensor, c: Tensor) -> Any:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for i in range(DEPTH):
            x = self.step(self, i, x, c)
        return self.out(x)


def _plain(m: Any, i: int, x: Tensor, c: Tensor) -> Tensor:
    x = x + m.branch(i, x)
    return x + m.wide(i, x) + c[:, None]


def _modulated(m: Any, i: int, x: Tensor, c: Tensor) -> Tensor:
    y = (1 + c[:, None]) * m.norms[2 * i](x) + c[:, None]
    x = x + m.attention[i](y)
    return x + m.wide(i, x)


def _gated(m: Any, i: int, x: Tensor, c: Tensor) -> Tensor:
    x = c[:, None] * m.branch(i, x) + x
    return c[:, None] * m.wide(i, x) + x


def _pooled(m: Any, i: int, x: Tensor, c: Tensor) -> Tensor:
    x = c[:, None] + x + m.branch(i, x)
    x = x + (m.scores(x).softmax(1) * x).sum(1, keepdim=True)
    return x + m.wide(i, x)


def _flagged(m: Any, i: int, x: Tensor, c: Tensor) -> Tensor:
    if i == 0:
        return _plain(m, 0, x, c)
    small = x.abs().sum(-1, keepdim=True) < 20  # of the reduced stream, and older than the next reduction
    x = (x + m.branch(i, x)).masked_fill(small, 0.0)
    return torch.where(small, x, x + m.wide(i, x) * c[:, None])


STEPS: dict[str, Step] = {
    "plain": _plain, "modulated": _modulated, "gated": _gated, "pooled": _pooled, "flagged": _flagged,
}  # fmt: skip


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, N, DIM, generator=generator), torch.randn(BATCH, DIM, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("step", STEPS)
def test_sample_alone_equals_sample_in_its_batch(step: str) -> None:
    model, (x, c) = randomise(TwoInputs(STEPS[step])), _inputs()
    found = study(model, x, c, variants={"mlerp": {"r": R, "strategy": "mlerp"}})
    assert len(found.reducing("mlerp")) == DEPTH, [str(site.decline) for site in found.sites("mlerp")]
    fused = found.nodes("mlerp", torch.ops.tofu.fuse_tokens.default)
    assert {node.args[0].meta["val"].shape[0] for node in fused} == {BATCH}
    assert relative_error(found.outputs["permute"], found.outputs["plain"]) < PERMUTATION_TOLERANCE
    for i in range(BATCH):
        alone = compiled(model, r=R, strategy="mlerp")(x[i : i + 1], c[i : i + 1])
        together = [output[i : i + 1] for output in tensors(found.outputs["mlerp"])]
        assert relative_error(together, tensors(alone)) < PERMUTATION_TOLERANCE


OUT: dict[str, Callable[[Tensor], Any]] = {
    "a sample": lambda x: (x[0].mean(0), x[1:].mean(1)),
    "similarities": lambda x: x[:, 1:] @ x[:, 1:].transpose(1, 2),
    "differences": lambda x: x[:, 1:, None] - x[:, None, 1:],
}


@torch.no_grad()
@pytest.mark.parametrize("out", OUT)
def test_what_needs_whole_tokens_at_the_end_does_not_cost_the_sites(out: str) -> None:
    model, (x, c) = randomise(TwoInputs(_plain, OUT[out])), _inputs()
    found = study(model, x, c, variants={"mlerp": {"r": R, "strategy": "mlerp"}})
    assert len(found.reducing("mlerp")) == DEPTH, [str(site.decline) for site in found.sites("mlerp")]
    assert relative_error(found.outputs["permute"], found.outputs["plain"]) < PERMUTATION_TOLERANCE
    # An output of whole tokens is what its own op makes of the restored stream.
    returning = TwoInputs(_plain, lambda x: x).eval()
    returning.load_state_dict(model.state_dict())
    whole = compiled(returning, r=R, strategy="mlerp")(x, c)
    assert relative_error(found.outputs["mlerp"], OUT[out](whole)) < PERMUTATION_TOLERANCE


@torch.no_grad()
def test_returned_attention_of_the_class_token_still_sums_to_one() -> None:
    class ClassAttention(TwoInputs):
        def forward(self, x: Tensor, c: Tensor) -> Any:
            for i in range(DEPTH):
                y, m = self.norms[2 * i](x), self.attention[i]
                q, k, v = (proj(y).unflatten(-1, (4, -1)) for proj in (m.q, m.k, m.v))
                weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
                x = x + m.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
                x = x + self.wide(i, x)
            return x[:, 0], weights[:, :, 0]

    model, (x, c) = randomise(ClassAttention(_plain)), _inputs()
    rows = tofu_fx.explain(model, x, c, options={"r": R}).sites
    assert all("attention weights are returned" in row.reason for row in rows[:-1])
    weights = compiled(model, r=R)(x, c)[1]
    assert (weights.sum(-1) - 1).abs().max() < 1e-5


@torch.no_grad()
def test_learnt_latents_are_tokens_and_not_channels() -> None:
    class Latents(TwoInputs):
        def __init__(self) -> None:
            super().__init__(_plain)
            self.latents = nn.Parameter(torch.zeros(1, N, DIM))
            self.read = nn.MultiheadAttention(DIM, 4, batch_first=True)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            z = self.latents.expand(x.shape[0], -1, -1)
            z = z + self.read(z, x, x, need_weights=False)[0]
            for i in range(DEPTH):
                z = _plain(self, i, z, c)
            return z.mean(1)

    model, (x, c) = randomise(Latents()), _inputs()
    found = study(model, x[:, :13], c, variants={"mean": {"r": R, "strategy": "mean"}})
    assert len(found.reducing("mean")) == DEPTH, [str(site.decline) for site in found.sites("mean")]
    assert relative_error(found.outputs["permute"], found.outputs["plain"]) < PERMUTATION_TOLERANCE


@torch.no_grad()
def test_channels_mixed_by_a_weight_from_the_left_are_no_tokens() -> None:
    class ChannelFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(DIM, DIM) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v, out = (weight @ x for weight in self.weights)
            return x + (q @ k.transpose(1, 2)).softmax(-1) @ v + out

    (row,) = tofu_fx.explain(randomise(ChannelFirst()), torch.randn(2, DIM, 9), options={"r": 2}).sites
    assert "channels" in row.reason
