"""Decide for every matched site how many tokens go, and how: from the options, or from a saved plan.

Changes nothing in the graph.
"""

from __future__ import annotations

from tofu_fx.compilation import Compilation
from tofu_fx.plan.schedule import schedule


def plan_reductions(compilation: Compilation) -> None:
    """Set ``strategy``, ``r``, ``tokens_in`` and ``tokens_out`` of the matched sites."""
    schedule(compilation.sites, compilation.options)
