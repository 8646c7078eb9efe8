"""A block whose branches run on fewer tokens, with a row's op in its MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tests.axes.harness import FAKES, Row, X, already_aten, traced
from tests.axes.layouts import PAIRS, B, C, D, H, N, constant
from tofu_fx.compilation import Compilation
from tofu_fx.pipeline import run_passes, without
from tofu_fx.plan.options import Options


def two_branches(x: Tensor, row: Row) -> Tensor:
    """Attention and an MLP over tokens ``[B, N, C]``."""
    q, k, v = F.linear(F.layer_norm(x, (C,)), constant(3 * C, C)).view(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
    x = x + F.linear(heads, constant(C, C))
    hidden = row.function(F.gelu(F.linear(x, constant(C, C) + 0.1)))
    return x + F.linear(hidden.float(), constant(C, C))


def compiled_branch(row: Row) -> Compilation:
    """What the passes make of it."""
    two_branches(X, row)  # makes the constants, as real tensors
    graph = traced(lambda x: two_branches(x, row), FAKES.from_tensor(X))
    asked = {"r": PAIRS, "strategy": "mean", "placement": "branch", "branches": ["attention", "mlp"], "unread": "keep"}
    options = Options.parse({**asked, "profitable_only": False, "on_error": "raise"})
    compilation: Compilation = run_passes((already_aten, *without("lower_to_aten", "verify")), graph, options, [X])
    return compilation
