"""The tofu::* operators; importing this package registers them under `torch.ops.tofu`."""

from .fuse import fuse_tokens
from .matching import Grid, max_reduction
from .merging import STRATEGIES
from .permute import permute_tokens
from .rebase import rebase
from .restore import restore_tokens
from .separate import separate

__all__ = [
    "STRATEGIES",
    "Grid",
    "fuse_tokens",
    "max_reduction",
    "permute_tokens",
    "rebase",
    "restore_tokens",
    "separate",
]
