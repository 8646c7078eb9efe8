"""Leave out the rows of tensors that nobody reads: of a class-token model's last block, all tokens but one.

Before: ``%q = linear(%x[B, 197, C])``, ... ``%y = layer_norm(%x)``; ``%c = select(%y, 1, 0)``
After:  keys and values of all tokens as before; ``%r = slice(%x, 1, 0, 1)``, and queries, projection, MLP and norm of
        ``%r`` alone; ``%c = select(%y[B, 1, C], 1, 0)``

Exact up to rounding: each row that is read is computed from the same numbers. With ``unread="keep"`` nothing is done.
"""

from __future__ import annotations

from dataclasses import replace

from tofu_fx.compilation import Lowered
from tofu_fx.plan.flops import count_flops
from tofu_fx.rewriting.token_count_inputs import fake_mode_of, faking
from tofu_fx.rows.demand import demanded
from tofu_fx.rows.narrow import Narrowing


def drop_unread_tokens(graph: Lowered) -> Lowered:
    """Have every node compute the rows that are read, and note where rows were left out."""
    if graph.options.unread == "keep":
        return graph
    read = demanded(graph.gm.graph)
    if not read:
        return graph
    mode, flops = fake_mode_of(graph.gm), count_flops(graph.gm.graph)
    narrowing = Narrowing(graph.gm.graph, read, mode)
    with faking(mode):
        narrowing.run()
    graph.gm.graph.eliminate_dead_code()
    graph.gm.recompile()
    saved = flops - count_flops(graph.gm.graph)
    narrowed = frozenset(read) | narrowing.cuts
    return replace(graph, unread=tuple(narrowing.left_out), narrowed=narrowed, unread_flops=saved)
