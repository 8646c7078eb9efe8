"""Exact copies: tokens that hold the same features merge without any loss, whatever the strategy.

For that nothing may distinguish the copies: no position table, no rotary embedding, no relative bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tofu_fx.testing.transformers import Transformer


def repeated(x: Tensor, kinds: int = 2, seed: int = 0) -> Tensor:
    """Tokens ``[B, N, C]`` as runs of copies of ``kinds`` of them, each sample with runs of its own lengths.

    In a run every second token may join its neighbour, and what is left of it is a run again. So as long as a run has
    two tokens, there are copies to merge at every site. Needs N >= 4 * kinds.
    """
    batch, tokens, _ = x.shape
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for b in range(batch):
        spare = torch.randint(0, kinds, (tokens - 4 * kinds,), generator=generator)
        lengths = 4 + torch.bincount(spare, minlength=kinds)
        rows.append(x[b, :kinds].repeat_interleave(lengths, 0))
    return torch.stack(rows)


def without_positions(model: Transformer) -> Transformer:
    """The transformer with a position table of zeros, so that only features distinguish its tokens."""
    with torch.no_grad():
        nn.init.zeros_(model.pos_embed)
    return model
