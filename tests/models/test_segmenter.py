"""A Segmenter-like model (arXiv 2105.05633): class tokens join the patches for the last blocks, masks are products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.harness import compiled, prove, randomise, same_bits

SIDE, DIM, CLASSES, ENCODER, DECODER = 8, 48, 5, 4, 2
IMAGES = torch.randn(2, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(5))


def layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(DIM, 3, 2 * DIM, dropout=0.0, batch_first=True, norm_first=True)


class Segmenter(nn.Module):
    """Images -> masks ``[B, CLASSES, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, 4)
        self.position = nn.Parameter(torch.zeros(1, SIDE * SIDE, DIM))
        self.encoder = nn.ModuleList(layer() for _ in range(ENCODER))
        self.norm = nn.LayerNorm(DIM)
        self.classes = nn.Parameter(torch.zeros(1, CLASSES, DIM))
        self.decoder = nn.ModuleList(layer() for _ in range(DECODER))
        self.to_patch, self.to_class = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.mask_norm = nn.LayerNorm(CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        for block in self.encoder:
            x = block(x)
        x = torch.cat([self.norm(x), self.classes.expand(x.shape[0], -1, -1)], 1)
        for block in self.decoder:
            x = block(x)
        patches, classes = x[:, : SIDE * SIDE], x[:, SIDE * SIDE :]
        masks = F.normalize(self.to_patch(patches), dim=-1) @ F.normalize(self.to_class(classes), dim=-1).mT
        masks = self.mask_norm(masks).transpose(1, 2).unflatten(2, (SIDE, SIDE))
        return F.interpolate(masks, scale_factor=4.0, mode="bilinear")


def model() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Segmenter())


@pytest.mark.parametrize("placement", ["auto", "stream"])
def test_a_stream_is_reduced_up_to_where_classes_join_it_and_all_proofs_hold(placement: str) -> None:
    proofs = prove(model(), IMAGES, r=6, options={"placement": placement}).check()
    assert len(proofs.matched) == ENCODER  # the decoder runs on what they left
    declined = [str(site.decline) for site in proofs.sites if not site.matched]
    assert len(declined) == DECODER
    assert all("other tokens joined the stream" in reason for reason in declined)
    assert not proofs.unknown_ops


def test_branches_are_reduced_everywhere_and_class_tokens_never_merged() -> None:
    proofs = prove(model(), IMAGES, r=6, options={"placement": "branch"}).check()
    found = [(site.prefix, site.suffix, site.grid) for site in proofs.matched]
    assert found == [(0, 0, (1, SIDE, SIDE))] * ENCODER + [(0, CLASSES, (1, SIDE, SIDE))] * DECODER


@torch.no_grad()
@pytest.mark.parametrize("placement", ["stream", "branch"])
def test_masks_are_whole_and_no_token_removed_gives_the_same_bits(placement: str) -> None:
    plain = model()(IMAGES)
    assert same_bits(compiled(model(), placement=placement, r=0)(IMAGES), plain)
    reduced = compiled(model(), placement=placement, r=6)(IMAGES)
    assert reduced.shape == plain.shape
    assert not same_bits(reduced, plain)
