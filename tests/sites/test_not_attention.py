"""Softmaxes that are no attention, weights that more than a factor changes, and attention in a spelling not known.

The tokens that are merged are exact duplicates, which is without loss in any attention: a result either differs by
rounding, or the site is declined for a reason that is true.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.harness import compiled, relative_error
from tofu_fx import explain
from tofu_fx.sites.attention import MOST_BETWEEN

Way = Callable[[Tensor, Tensor], Tensor]


def far(x: Tensor) -> Tensor:
    """More ops than are followed between a softmax and its products."""
    for _ in range(MOST_BETWEEN + 2):
        x = x * 1.01
    return x


KNOWN: dict[str, Way] = {
    "softmax": lambda s, v: s.softmax(-1) @ v,
    "a factor for each query": lambda s, v: (s.softmax(-1) * torch.linspace(0.5, 2, s.shape[1])[:, None, None]) @ v,
    "scores masked by themselves": lambda s, v: s.masked_fill(s < 0, -1e9).softmax(-1) @ v,
    "keys in rows": lambda s, v: s.mT.contiguous().softmax(-2).transpose(-1, -2) @ v,
    "values on the left": lambda s, v: (v.mT @ s.softmax(-1).mT).mT,
    "einsum": lambda s, v: torch.einsum("bhqk,bhkd->bhqd", s.softmax(-1), v),
}
DECLINED: dict[str, tuple[str, Way]] = {
    "softmax over queries": ("does not sum over the axis", lambda s, v: s.softmax(-2) @ v),
    "softmax over queries, einsum": (
        "does not sum over the axis",
        lambda s, v: torch.einsum("bhqk,bhkd->bhqd", s.softmax(-2), v),
    ),
    "keys turned to the other side": ("does not sum over the axis", lambda s, v: s.softmax(-1).mT @ v),
    "soft slots": ("makes of the weights", lambda s, v: (s.softmax(-2) / s.softmax(-2).sum(-1, keepdim=True)) @ v),
    "squared": ("aten.square between the softmax and a product", lambda s, v: s.softmax(-1).square() @ v),
    "squared by itself": ("makes of the weights", lambda s, v: (s.softmax(-1) * s.softmax(-1)) @ v),
    "squared by one name": ("makes of the weights", lambda s, v: (lambda a: a * a)(s.softmax(-1)) @ v),
    "threshold": ("makes of the weights", lambda s, v: (lambda a: a.masked_fill(a < 0.06, 0))(s.softmax(-1)) @ v),
    "gated by itself": ("makes of the weights", lambda s, v: (lambda a: a * torch.sigmoid(a))(s.softmax(-1)) @ v),
    "gated by the scores": ("makes of the weights", lambda s, v: (s.softmax(-1) * torch.sigmoid(s)) @ v),
    "divided by it": ("divides by the weights", lambda s, v: (v.new_ones(1) / s.softmax(-1)) @ v),
    "exp over its sum": (
        "aten.exp.* after the product of queries and keys",
        lambda s, v: (lambda e: e / e.sum(-1, keepdim=True))(s.exp()) @ v,
    ),
    "softmax plus one": (
        "aten.exp.* after the product of queries and keys",
        lambda s, v: (lambda e: e / (1 + e.sum(-1, keepdim=True)))(s.exp()) @ v,
    ),
    "logsumexp": (
        "aten.logsumexp.* after the product of queries and keys",
        lambda s, v: (s - s.logsumexp(-1, keepdim=True)).exp() @ v,
    ),
    "too many ops ahead of the softmax": ("further .* than the 24 ops", lambda s, v: far(s).softmax(-1) @ v),
    "too many ops after the softmax": ("further .* than the 24 ops", lambda s, v: far(s.softmax(-1)) @ v),
    "sigmoid": ("aten.sigmoid.* after the product of queries and keys", lambda s, v: s.sigmoid() @ v),
}


class Model(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way = way
        parts = {"qkv": (16, 48), "out": (16, 16), "mlp": (16, 16)}
        self.parts = nn.ModuleList(nn.ModuleDict({k: nn.Linear(*v) for k, v in parts.items()}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            q, k, v = part["qkv"](x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            y = self.way(q @ k.mT * 8**-0.5, v)
            x = x + part["out"](y.transpose(1, 2).flatten(2))
            x = x + part["mlp"](x).tanh()
        return x.mean(1)


def duplicates() -> Tensor:
    x = torch.randn(3, 16, 16)
    for sample in x:
        same = torch.randperm(8)[:4]
        sample[2 * same + 1] = sample[2 * same]
    return x


@pytest.mark.parametrize("name", KNOWN)
def test_duplicates_are_merged_without_loss_in_every_attention_that_is_known(name: str) -> None:
    torch.manual_seed(0)
    model, x = Model(KNOWN[name]).eval(), duplicates()
    with torch.no_grad():
        # Two sites are matched (r lists one number for each); sums of 16 terms differ by 16 * 6e-8 through two blocks.
        run = compiled(model, r=[4, 0], strategy="mlerp", placement="stream", inner_backend="eager")
        assert relative_error(run(x), model(x)) < 2e-6


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_no_known_attention_is_declined_with_a_true_reason(name: str) -> None:
    reason, way = DECLINED[name]
    torch.manual_seed(0)
    report = explain(Model(way).eval(), duplicates(), options={"r": 4, "profitable_only": False})
    import re

    assert report.sites
    assert not any(row.r for row in report.sites)
    assert any(re.search(reason, row.reason) for row in report.sites), [row.reason for row in report.sites]


@pytest.mark.parametrize("name", ["softmax over queries", "squared by itself", "exp over its sum"])
def test_a_stream_is_whole_ahead_of_what_is_no_attention(name: str) -> None:
    """The site of the first block is served, the second block has all tokens: near the plain output, never by luck."""
    torch.manual_seed(0)
    model, x = Model(KNOWN["softmax"]).eval(), duplicates()
    odd = DECLINED[name][1]

    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for part, way in zip(model.parts, (KNOWN["softmax"], odd), strict=True):
                q, k, v = part["qkv"](x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
                x = x + part["out"](way(q @ k.mT * 8**-0.5, v).transpose(1, 2).flatten(2))
                x = x + part["mlp"](x).tanh()
            return x.mean(1)

    with torch.no_grad():
        run = compiled(Mixed(), r=4, strategy="mlerp", placement="stream", inner_backend="eager")
        assert relative_error(run(x), Mixed()(x)) < 2e-6
