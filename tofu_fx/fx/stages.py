"""What is known comes in frozen stages; each has all that the one before it had."""

from __future__ import annotations

from typing import Any, TypeVar

S = TypeVar("S")


def advanced(stage: type[S], earlier: Any, **facts: Any) -> S:
    """The next stage of what is known: all that was known, and these facts."""
    return stage(**{**vars(earlier), **facts})
