"""What a plan is made for: a speed-up, a share of the operations, an error, or nothing in particular."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from tofu_fx.errors import CalibrationError


@dataclass(frozen=True)
class Target:
    """What the plan is made for."""

    kind: Literal["speedup", "flops", "error", "none"]
    value: float = math.nan

    @classmethod
    def read(cls, **given: float | None) -> Target:
        """The one target that was given.

        Raises:
            CalibrationError: two targets, or one that nothing can meet.
        """
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) > 1:
            raise CalibrationError(f"give one target, not {' and '.join(named)}: each decides how many tokens go")
        if not named:
            return cls("none")
        ((name, value),) = named.items()
        low, high = {"speedup": (1.0, math.inf), "flops": (0.0, 1.0), "error": (0.0, math.inf)}[name]
        if isinstance(value, bool) or not isinstance(value, Real) or not low < value < high:
            expected = f"a number above {low:g}" + (f" and below {high:g}" if high < math.inf else "")
            raise CalibrationError(f"{name}: expected {expected}, got {value!r}")
        return cls(name, float(value))
