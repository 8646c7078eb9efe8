"""All rows."""

from __future__ import annotations

from tests.axes import rows, rows_elementwise, rows_linear, rows_unknown
from tests.axes.harness import Row

#: ops that have a rule or that PyTorch calls elementwise
KNOWN: list[Row] = [
    *rows.REDUCTIONS, *rows.SOFTMAX, *rows.NORMS, *rows.CUTS, *rows.JOINS, *rows.VIEWS, *rows.TURNS,
    *rows_elementwise.ELEMENTWISE, *rows_elementwise.COMPLEX, *rows_elementwise.MADE,
    *rows_linear.PADS, *rows_linear.PRODUCTS, *rows_linear.EINSUM, *rows_linear.ATTENTION,
    *rows_linear.IMAGES,
]  # fmt: skip
#: ops that no rule knows
UNKNOWN: list[Row] = rows_unknown.UNKNOWN
ROWS = KNOWN + UNKNOWN
