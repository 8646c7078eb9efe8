"""Attention between the samples of a batch: to merge these would give two pictures one answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.harness import compiled, prove, randomise, same_bits
from tofu_fx import TofuWarning, explain

WIDTH = 16


class Between(nn.Module):
    """Attention along the first axis."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v)
        return x + self.mlp(x)


class Convolved(nn.Module):
    """What two blocks compare comes of a convolution, with one place left of each or several."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8 // places, 8 // places)
        self.blocks = nn.Sequential(Between(), Between())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x).mean((2, 3)))


class Planes(nn.Module):
    """As timm's CSATv2: one channel, and queries and keys without a dim for it, so that samples are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.out = nn.Conv2d(3, 1, 2, 2), nn.Linear(1, 3), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for _ in range(2):
            q, k, v = self.qkv(x).unbind(-1)
            x = x + ((q @ k.transpose(-1, -2)).softmax(-1) @ v).unsqueeze(-1)
            x = x + self.out(x).relu()
        return x


def images(samples: int = 9) -> Tensor:
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("placement", ["stream", "branch"])
@pytest.mark.parametrize("make", [lambda: Convolved(2), Planes], ids=["features", "planes"])
def test_samples_are_not_merged(make: type[nn.Module], placement: str) -> None:
    model, x = randomise(make()), images()
    with torch.no_grad():
        explained = explain(model, x, options={"r": 2, "placement": placement, "profitable_only": False})
        assert explained.declined == 2
        assert all("attention between the samples of a batch" in row.reason for row in explained.sites)
        with pytest.warns(TofuWarning, match="nothing was accelerated.*between the samples"):
            outputs = compiled(model, r=2, placement=placement)(x)
        assert same_bits(outputs, model(x))


def test_patches_that_a_convolution_takes_one_by_one_are_tokens() -> None:
    with torch.no_grad():
        assert len(prove(randomise(Convolved(1)), images()).check().matched) == 2


def test_rows_of_a_plain_matrix_are_tokens() -> None:
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert len(prove(randomise(nn.Sequential(Between(), Between())), x).check().matched) == 2


def test_what_the_scores_sum_over_is_never_taken_for_samples() -> None:
    class Single(Planes):
        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(-1)
            for _ in range(2):
                q, k, v = self.qkv(x).unbind(-1)
                x = x + ((q @ k.transpose(-1, -2)).softmax(-1) @ v).unsqueeze(-1)
                x = x + self.out(x).relu()
            return x

    # Each number of a row merged with those of other rows for itself would be a row that there never was.
    with torch.no_grad():
        proofs = prove(randomise(Single()), torch.randn(9, 49, generator=torch.Generator().manual_seed(1))).check()
        assert not proofs.matched
        assert all("the batch of this tensor" in str(site.decline) for site in proofs.sites)
