"""`tofu::restore_tokens`: give every original token its features back."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_device, check_index, check_range, check_rows, readable

_library = torch.library.Library("tofu", "FRAGMENT")
_library.define("restore_tokens(Tensor x, Tensor assignment, Tensor? before=None, Tensor? merged=None) -> Tensor")


def gather_given(op: str, x: Tensor, name: str, index: Tensor) -> Tensor:
    """`gather_tokens` by an index that may hold anything. PyTorch would count a negative one from the end."""
    check_range(op, name, index, x.shape[1])
    if not readable(index):
        index = index.masked_fill(index < 0, x.shape[1])
    return gather_tokens(x, index)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the tokens: `[B, M, ...]` by `[B, N]` -> `[B, N, ...]`."""
    batch = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
    return x[batch, index]


def restore_tokens(x: Tensor, assignment: Tensor, before: Tensor | None = None, merged: Tensor | None = None) -> Tensor:
    """Bring a reduced stream back to all of its tokens.

    Source: the design's "Token axes". Decomposes into plain ATen operators, which the compiler fuses with their users.

    Args:
        x: `[B, M, C]` the reduced stream now, any dtype.
        assignment: `[B, N]` int64, where each token went.
        before: `[B, N, C]` the stream just before the reduction.
        merged: `[B, M, C]` the stream just after it.

    Returns:
        `[B, N, C]`: `gather(x)`, or with before and merged `gather(x) + (before - gather(merged))`: each token's own
        features and what its representative has gained since. A token that the reduction left as it was gets x's bits.

    Raises:
        ValueError: one of before and merged without the other, or shapes and dtypes other than the above.
        IndexError: a place out of range. On other devices than CPU, and in a compiled graph, such a place is the
            RuntimeError of PyTorch's own indexing.
    """
    return torch.ops.tofu.restore_tokens(x, assignment, before, merged)


def restore_in_aten(
    x: Tensor, assignment: Tensor, before: Tensor | None = None, merged: Tensor | None = None
) -> Tensor:
    """`restore_tokens` itself."""
    if (before is None) != (merged is None):
        missing = "before" if before is None else "merged"
        raise ValueError(f"restore_tokens: before and merged belong together, but {missing} is missing")
    check_rows("restore_tokens", x)
    check_index("restore_tokens", x, "assignment", assignment)
    whole = gather_given("restore_tokens", x, "assignment", assignment)
    if before is None or merged is None:
        return whole
    for name, given, expected in (("before", before, whole), ("merged", merged, x)):
        if given.shape != expected.shape:
            raise ValueError(f"restore_tokens: {name} must be {list(expected.shape)}, got {list(given.shape)}")
        check_device("restore_tokens", x, name, given)
    # In this order an untouched token adds an exact zero.
    return whole + (before - gather_tokens(merged, assignment))


_library.impl("restore_tokens", restore_in_aten, "CompositeImplicitAutograd")
