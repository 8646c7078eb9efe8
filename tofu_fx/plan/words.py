"""The words and bounds that options and plans have in common."""

from __future__ import annotations

from typing import Literal

Strategy = Literal["auto", "prune", "mean", "mlerp"]
Match = Literal["keys", "heads", "queries_keys", "features", "sketch"]
PlanMatch = Literal["keys", "heads", "queries_keys", "features", "sketch", "fisher"]
Placement = Literal["auto", "stream", "branch"]
BranchKind = Literal["attention", "mlp", "cross"]
Reuse = Literal["none", "block", "resolution"]


def grouping_of(match: str) -> str:
    """The grouping of ``tofu::fuse_tokens`` for what tokens are compared by: of distances, Ward's."""
    return "ward" if match == "fisher" else "bipartite"


#: columns of the matrices of "fisher", where nothing else was measured to be better
RANK = 64
#: the largest side of an image in tokens, and of a cell
MOST_SIDE = 2**15
#: the largest of other whole numbers: 32 bits, so that sums and products of a few fit 64
MOST = 2**31 - 2
