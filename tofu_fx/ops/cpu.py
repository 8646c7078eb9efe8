"""The operators on CPU in float32, in C++: ATen's fifty small calls cost a ViT-S more than the work that they do.

`matching` and `merging` say what is computed, and compute it on every other device and dtype, and where there is no C++
compiler. The source is compiled once, in about two seconds (`build`).
"""

from __future__ import annotations

import ctypes
import functools
import logging
from importlib import resources

import torch
from torch import Tensor

from . import build, ward
from .checks import check_one_reduction
from .matching import CANDIDATE_TILE, PARTNER_TILE, interleaved, padded_shape, sides, similarity
from .merging import STRATEGIES

logger = logging.getLogger("tofu_fx")

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
#: function -> its result (whether all places were in range) and its arguments, p for a pointer and n for a number
_SIGNATURES = {
    "tofu_unit_rows": (None, "pnnnnnnnpn"),
    "tofu_choose": (_NUMBER, "pnnnnppnnnnppn"),
    "tofu_ward": (None, "ppnnnnnnnppn"),
    "tofu_merge": (_NUMBER, "ppppnnnnnppn"),
}


def usable(x: Tensor) -> bool:
    """Whether these functions serve a tensor. The first float32 tensor on CPU compiles them."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be compiled: then ATen does the work, more slowly."""
    try:
        compiled = build.load(resources.files(__package__).joinpath("cpu.cpp").read_text(encoding="utf-8"))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(compiled, name)
            function.argtypes = [_POINTER if kind == "p" else _NUMBER for kind in arguments]
            function.restype = result
    except Exception as error:  # noqa: BLE001 - whatever a compiler may do; nothing is lost but time
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.info("token operators run on ATen, because their C++ does not compile: %s", reason)
        return None
    return compiled


def fuse(  # noqa: PLR0913 - the arguments of the operator
    x: Tensor,
    metric: Tensor,
    size: Tensor,
    r: int,
    strategy: str,
    num_prefix: int,
    num_suffix: int,
    grid: tuple[int, ...] = (),
    grouping: str = "bipartite",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fuse_tokens` for 1 <= r <= max_reduction and B >= 1."""
    batch, tokens, _ = x.shape
    free = tokens - num_prefix - num_suffix
    functions = library()
    assert functions is not None
    metric = metric.float()
    assignment = torch.empty((batch, tokens), dtype=torch.int64)
    kept = torch.empty((batch, tokens - r), dtype=torch.int64)
    if grouping == "ward" and not grid:
        metric, size = metric.contiguous(), size.contiguous()
        functions.tofu_ward(
            metric.data_ptr(), size.data_ptr(), batch, tokens, metric.shape[2], num_prefix, free, r,
            ward.rounds(r, free), assignment.data_ptr(), kept.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return *merge(x, size, assignment, kept, strategy), assignment, kept
    candidates, partners = sides(free, grid, x.device)
    if grouping == "ward":
        score = ward.scores(metric, size, num_prefix, candidates, partners)
    elif grid:
        score = similarity(
            _unit_rows(metric.index_select(1, candidates + num_prefix), 0, len(candidates), CANDIDATE_TILE),
            _unit_rows(metric.index_select(1, partners + num_prefix), 0, len(partners), PARTNER_TILE),
        )
    else:
        score = similarity(*interleaved(_unit_rows(metric, num_prefix, free, 2 * PARTNER_TILE), len(candidates)))
    sound = functions.tofu_choose(
        score.data_ptr(), batch, tokens, num_prefix, len(candidates), candidates.data_ptr(), partners.data_ptr(),
        len(partners), *score.shape[1:], r, assignment.data_ptr(), kept.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    assert sound, "the matching's own places are out of range"
    return *merge(x, size, assignment, kept, strategy), assignment, kept


def _unit_rows(metric: Tensor, first: int, count: int, tile: int) -> Tensor:
    """`matching.unit_rows` of the tokens `first` to `first + count`."""
    functions = library()
    assert functions is not None
    metric = metric.contiguous()
    batch, tokens, features = metric.shape
    height, width = padded_shape(count, features, tile)
    rows = metric.new_empty((batch, height, width))
    functions.tofu_unit_rows(
        metric.data_ptr(), batch, tokens, features, first, count, height, width, rows.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return rows


def merge(x: Tensor, size: Tensor, assignment: Tensor, kept: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    """Features `[B, N, C]` and sizes `[B, N]` reduced by a given assignment, whose values are checked on the way."""
    (batch, tokens, features), left = x.shape, kept.shape[1]
    functions = library()
    assert functions is not None
    x, size, assignment, kept = (t.contiguous() for t in (x, size, assignment, kept))
    new_x, new_size = x.new_empty((batch, left, features)), size.new_empty((batch, left))
    sound = functions.tofu_merge(
        x.data_ptr(), size.data_ptr(), assignment.data_ptr(), kept.data_ptr(), batch, tokens, left, features,
        STRATEGIES.index(strategy), new_x.data_ptr(), new_size.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if not sound:
        check_one_reduction("merge_groups", assignment, kept)
        raise AssertionError("the C++ refused a reduction that is sound")
    return new_x, new_size
