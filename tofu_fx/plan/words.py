"""The words and bounds that options and plans have in common."""

from __future__ import annotations

from typing import Literal

Strategy = Literal["auto", "prune", "mean", "mlerp"]
Match = Literal["keys", "heads", "queries_keys", "features", "sketch"]
Placement = Literal["auto", "stream", "branch"]
BranchKind = Literal["attention", "mlp", "cross"]
Reuse = Literal["none", "block", "resolution"]

#: the largest side of an image in tokens, and of a cell
MOST_SIDE = 2**15
#: the largest of other whole numbers: 32 bits, so that sums and products of a few fit 64
MOST = 2**31 - 2
