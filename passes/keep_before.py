"""Keep a copy of the graph as it is, for reports, calibration and proofs: what follows changes it in place.

Before: ``before`` is None. After: it is a graph of its own, with the same names. Changes nothing in the graph.
"""

from __future__ import annotations

from dataclasses import replace

from tofu_fx.compilation import Lowered
from tofu_fx.fx.nodes import copy_graph, graph_module


def keep_before(graph: Lowered) -> Lowered:
    """Note a copy of the graph."""
    return replace(graph, before=graph_module(graph.gm, copy_graph(graph.gm.graph)))
