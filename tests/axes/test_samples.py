"""Ops that mix the samples of a batch, on a stream of which each sample has other tokens left.

In each sample other pairs of tokens are alike up to 1e-3, and these are merged. Right is an error of the size that such
a difference makes in the plain model, squared where the mean of two is taken: far below what mixing tokens of different
samples would give (0.01 to 0.7).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.harness import compiled, relative_error
from tofu_fx import PassError

MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "mean": lambda x: x - x.mean(0),
    "mean, kept as a dim": lambda x: x - x.mean(0, keepdim=True),
    "a sample sliced off": lambda x: x + 0.5 * x[:1],
    "some samples sliced off": lambda x: x + 0.5 * torch.cat([x[:2], x[:2]]),
    "a sample selected": lambda x: x + 0.5 * x[0],
    "samples taken apart": lambda x: x + 0.5 * x.unbind(0)[1],
    "variance": lambda x: x / (1 + x.var(0)),
    "maximum": lambda x: x + x.amax(0),
    "groups of samples": lambda x: x + x.view(2, -1, *x.shape[1:]).sum(0).repeat(2, 1, 1) / 2,
    "samples in another order": lambda x: x + x.view(2, 2, *x.shape[1:]).transpose(0, 1).reshape(x.shape) / 2,
    "samples rolled": lambda x: x + x.roll(1, 0) / 2,
    "softmax over samples": lambda x: x * x.softmax(0),
    "norm over samples": lambda x: x + F.layer_norm(x.transpose(0, 2), [x.shape[0]]).transpose(0, 2),
    "einsum": lambda x: torch.einsum("ab,bnc->anc", torch.eye(4) + 0.2, x),
    "matmul": lambda x: x + ((torch.eye(4) + 0.2) @ x.transpose(0, 1)).transpose(0, 1) / 2,
    "attention over samples, written": lambda x: (
        x + ((x.transpose(0, 1) @ x.permute(1, 2, 0)).softmax(-1) @ x.transpose(0, 1)).transpose(0, 1)
    ),
    "attention over samples, fused": lambda x: (
        x + F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3).transpose(0, 1) / 2
    ),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.cls, self.head = mix, nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 5)
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.second(self.mix(self.first(x)))[:, 0])


def near_duplicates(batch: int = 4, tokens: int = 16, merged: int = 4) -> Tensor:
    x = torch.randn(batch, tokens, 16)
    for sample in x:
        near = torch.randperm(tokens // 2)[:merged]
        sample[2 * near + 1] = sample[2 * near] + 1e-3 * torch.randn(merged, 16)
    return x


def averaged(x: Tensor) -> Tensor:
    """The inputs with each pair that is alike replaced by its mean: what the difference of 1e-3 means to the model."""
    pairs = x.unflatten(1, (-1, 2))
    alike = (pairs[:, :, 0] - pairs[:, :, 1]).norm(dim=-1) < 0.1
    return torch.where(alike[:, :, None, None], pairs.mean(2, keepdim=True), pairs).flatten(1, 2)


@pytest.mark.parametrize("name", MIXING)
def test_samples_are_mixed_on_whole_tokens_in_the_stream(name: str) -> None:
    torch.manual_seed(0)
    model, x = Model(MIXING[name]).eval(), near_duplicates()
    with torch.no_grad():
        plain = model(x)
        others = [0, 0] if name.startswith("attention") else [0]
        run = compiled(model, r=[4, *others], strategy="mean", placement="stream", inner_backend="eager")
        assert relative_error(run(x), plain) <= 2 * relative_error(model(averaged(x)), plain) + 1e-6


class MixedInside(nn.Module):
    """An attention whose input is mixed across samples: what a branch has on fewer tokens."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.norm, self.qkv, self.out = mix, nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.qkv(self.norm(x)))
        q, k, v = mixed.view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", [name for name in MIXING if not name.startswith("attention")])
def test_samples_are_mixed_on_whole_tokens_in_a_branch(name: str) -> None:
    torch.manual_seed(0)
    model, x = MixedInside(MIXING[name]).eval(), near_duplicates()
    with torch.no_grad():
        plain = model(x)
        run = compiled(model, r=4, strategy="mean", match="features", placement="branch", inner_backend="eager")
        # A branch gives each token its representative's output: the difference of 1e-3 between the two stays.
        assert relative_error(run(x), plain) < 2e-3


def test_an_op_that_mixes_samples_is_named_as_the_barrier() -> None:
    from tofu_fx import explain

    report = str(explain(Model(MIXING["mean"]).eval(), near_duplicates(), options={"r": [4, 0], "placement": "stream"}))
    assert "it mixes the samples of a batch" in report


def test_verify_refuses_a_graph_in_which_a_rule_lost_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault planted in the walk itself, as no rule could be trusted: the check as the graph is written is another."""
    from tofu_fx.axes.samples import Samples

    honest, walking = Samples.check, [True]
    monkeypatch.setattr(
        Samples, "check", lambda self, part, mixed=(): None if walking[0] else honest(self, part, mixed)
    )
    from tofu_fx.passes import verify as module

    check = module._check_samples

    def verify_for_real(compilation: object) -> None:
        walking[0] = False
        check(compilation)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_check_samples", verify_for_real)
    torch.manual_seed(0)
    model, x = Model(MIXING["mean"]).eval(), near_duplicates()
    with torch.no_grad(), pytest.raises(Exception, match="mixes the samples of a batch") as caught:
        compiled(model, r=[4, 0], placement="stream", inner_backend="eager", on_error="raise")(x)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), PassError)
