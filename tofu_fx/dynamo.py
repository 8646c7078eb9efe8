"""What Dynamo's own frames on the stack know of a compilation, and its interface does not say.

A backend is given one graph at a time. Which call of which compiled model the graph belongs to, when that call ends and
how many compilations Dynamo still allows stand in the local variables of Dynamo's frames, which are private: wherever
one is not found, the answer is None, and the backend speaks at once instead of once for a model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.fx import GraphModule

#: what Dynamo raises through a backend on purpose: to trace again, or to leave a frame alone
CONTROL_FLOW: tuple[type[Exception], ...] = (torch._dynamo.exc.RestartAnalysis, torch._dynamo.exc.SkipFrame)


@dataclass
class Call:
    """One call of a compiled model, in which graphs are compiled."""

    #: what torch.compile made, one for each compiled model or function
    model: Any
    #: functions that Dynamo calls when the call ends, however it ends
    at_end: list[Callable[[], Any]]


def enclosing_call() -> Call | None:
    """The call of a compiled model that is being compiled now, the innermost one."""
    for frame in _frames("torch._dynamo.eval_frame"):
        at_end = frame.f_locals.get("cleanups")
        if isinstance(at_end, list):
            return Call(frame.f_locals.get("self"), at_end)
    return None


def frame_id() -> int | None:
    """A number for the function, or the part of it after a graph break, that is being compiled."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    return None if compile_id is None else compile_id.frame_id


def compilations_of_last() -> int | None:
    """How often the function was compiled, this time included, if Dynamo will not compile it again; else None."""
    for frame in _frames("torch._dynamo.convert_frame"):
        cache = frame.f_locals.get("cache_size")
        known = getattr(cache, "num_cache_entries_with_same_id_matched_objs", None)
        if isinstance(known, int):
            return known + 1 if known + 1 >= torch._dynamo.config.recompile_limit else None
    return None


def is_ddp_bucket(gm: GraphModule) -> bool:
    """Whether a graph is a piece of one that Dynamo cut at the buckets of DistributedDataParallel."""
    return "DDPOptimizer" in getattr(getattr(gm, "compile_subgraph_reason", None), "reason", "")


def _frames(module: str) -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            yield frame
        frame = frame.f_back
