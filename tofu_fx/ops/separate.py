"""`tofu::separate`: keep tokens of two kinds from merging with each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_device, check_features

_library = torch.library.Library("tofu", "FRAGMENT")
_library.define("separate(Tensor metric, Tensor valid, bool distance=False) -> Tensor")

# With cosines c between valid tokens, (0.8 u, 0.6) and (0, -1) have the products 0.64 c + 0.36 >= -0.28 among valid
# tokens, -0.6 across, and 1 among the others.
_UNIT, _MARK = 0.8, 0.6
# By distance: so many times further from any valid token than two of these are from each other, whatever their sizes.
_APART = 1e6


def separate(metric: Tensor, valid: Tensor, distance: bool = False) -> Tensor:
    """Mark which tokens are padding in what tokens are compared by.

    By cosine similarity of the result, padding is most like padding and least like anything else, and valid tokens
    keep their order among each other. So padding is merged away first; a valid token joins padding only if it has no
    valid partner left.

    Args:
        metric: `[B, N, M]` floating point.
        valid: `[B, N, 1]` or `[1, N, 1]` bool; the rest is padding, whose metric is not looked at.
        distance: whether the result is compared by Euclidean distance, which is kept between valid tokens and is zero
            between others.

    Returns:
        `[B, N, M + 1]` float32.

    Raises:
        ValueError: shapes or dtypes other than the above.
    """
    return torch.ops.tofu.separate(metric, valid, distance)


def separate_in_aten(metric: Tensor, valid: Tensor, distance: bool = False) -> Tensor:
    """`separate` itself."""
    check_features("separate", metric, "metric")
    batch, tokens, _ = metric.shape
    fits = valid.dim() == 3 and valid.shape[1:] == (tokens, 1) and (valid.shape[0] == 1 or valid.shape[0] == batch)
    if not fits or valid.dtype != torch.bool:
        given = f"{str(valid.dtype).removeprefix('torch.')} {list(valid.shape)}"
        raise ValueError(f"separate: valid must be bool [{batch}, {tokens}, 1] or [1, {tokens}, 1], got {given}")
    check_device("separate", metric, "valid", valid)
    metric = metric.float()
    if distance:
        metric = torch.where(valid, metric, 0.0)
        length = torch.linalg.vector_norm(metric, dim=-1, keepdim=True)
        away = _APART * (1 + torch.where(torch.isfinite(length), length, 0.0).amax(1, keepdim=True))
        return torch.cat([metric, torch.where(valid, 0.0, away)], dim=-1)
    unit = metric * (_UNIT / torch.linalg.vector_norm(metric, dim=-1, keepdim=True))
    unit = torch.where(valid & torch.isfinite(unit), unit, 0.0)
    mark = torch.where(valid, _MARK, -1.0).to(unit.dtype).expand(*metric.shape[:-1], 1)
    return torch.cat([unit, mark], dim=-1)


_library.impl("separate", separate_in_aten, "CompositeImplicitAutograd")
