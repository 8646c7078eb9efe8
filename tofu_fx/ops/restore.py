"""`tofu::restore_tokens`: give every original token its features back."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("tofu", "FRAGMENT")
_library.define("restore_tokens(Tensor x, Tensor assignment, Tensor? before=None, Tensor? merged=None) -> Tensor")


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the tokens: `[B, M, ...]` by `[B, N]` -> `[B, N, ...]`."""
    batch = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
    return x[batch, index]


def restore_tokens(x: Tensor, assignment: Tensor, before: Tensor | None = None, merged: Tensor | None = None) -> Tensor:
    """Bring a reduced stream back to all of its tokens.

    Source: the design's "Token axes". Decomposes into plain ATen operators, which the compiler fuses with their users.

    Args:
        x: `[B, M, C]` the reduced stream now.
        assignment: `[B, N]` int64, where each token went.
        before: `[B, N, C]` the stream just before the reduction.
        merged: `[B, M, C]` the stream just after it.

    Returns:
        `[B, N, C]`: `gather(x)`, or with before and merged `gather(x) + (before - gather(merged))`: each token's own
        features and what its representative has gained since. A token that the reduction left as it was gets x's bits.

    Raises:
        ValueError: one of before and merged without the other.
    """
    return torch.ops.tofu.restore_tokens(x, assignment, before, merged)


def _restore_tokens(
    x: Tensor, assignment: Tensor, before: Tensor | None = None, merged: Tensor | None = None
) -> Tensor:
    if (before is None) != (merged is None):
        missing = "before" if before is None else "merged"
        raise ValueError(f"restore_tokens: before and merged belong together, but {missing} is missing")
    whole = gather_tokens(x, assignment)
    if before is None or merged is None:
        return whole
    # In this order an untouched token adds an exact zero.
    return whole + (before - gather_tokens(merged, assignment))


_library.impl("restore_tokens", _restore_tokens, "CompositeImplicitAutograd")
