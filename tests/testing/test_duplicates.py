"""Exact copies merge without loss: the reduced model gives what the plain one gives, up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from tests.testing.examples import share
from tests.zoo import ZOO
from tofu_fx.testing import PERMUTATION_TOLERANCE, relative_error, repeated, study
from tofu_fx.testing.strategies import DrawnTransformer, duplicated

STRATEGIES = ("prune", "mean", "mlerp")
VARIANTS: dict[str, dict[str, Any]] = {
    f"{strategy} {placement}": {"r": 2, "strategy": strategy, "placement": placement}
    for strategy in STRATEGIES
    for placement in ("stream", "branch")
}


def losses(model: Any, *inputs: Tensor) -> dict[str, float]:
    """By how much each strategy changes the outputs in each placement, where it reduces anything."""
    with torch.no_grad():
        found = study(model, *inputs, variants=VARIANTS, proofs=False)
    plain = found.outputs["plain"]
    return {name: relative_error(found.outputs[name], plain) for name in VARIANTS if found.reducing(name)}


@share("exact copies")
@given(drawn=duplicated())
def test_copies_merge_without_loss_in_any_transformer(drawn: DrawnTransformer) -> None:
    lost = losses(drawn.model, *drawn.inputs)
    assert lost
    assert max(lost.values()) < PERMUTATION_TOLERANCE, lost


class Behind(nn.Module):
    """A vision transformer of timm from after its embeddings on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        model: Any = self.model
        return model.forward_head(model.norm(model.blocks(model.norm_pre(x))))


@pytest.mark.parametrize("name", ["vit", "vit_gap", "deit3", "dinov2_registers", "clip", "siglip"])
def test_copies_merge_without_loss_behind_the_embeddings_of(name: str) -> None:
    entry = ZOO[name]
    model: Any = entry.model()
    prefix = entry.protected[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, entry.tokens, model.embed_dim, generator=generator)
    x = torch.cat([x[:, :prefix], repeated(x[:, prefix:], 3)], 1)
    lost = losses(Behind(model), x)
    assert set(lost) == set(VARIANTS)
    assert max(lost.values()) < PERMUTATION_TOLERANCE, lost
    other = torch.cat([x[:, :prefix], torch.randn(x[:, prefix:].shape, generator=generator)], 1)
    assert min(losses(Behind(model), other).values()) > 1e-4


def test_each_sample_has_copies_of_its_own() -> None:
    x = repeated(torch.randn(3, 24, 4, generator=torch.Generator().manual_seed(0)), 2, seed=1)
    assert [len(sample.unique(dim=0)) for sample in x] == [2, 2, 2]
    assert len({int((sample == sample[0]).all(1).sum()) for sample in x}) > 1
