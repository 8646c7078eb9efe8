"""How each op carries token axes: the table of all rules, which stand in files by family of ops.

A rule takes what is known of the operands, and the node, and returns what becomes of the axes
(``tofu_fx.axes.rules.result``). To add an op, write its rule next to its family and name it there; ops that PyTorch
itself tags as pointwise need no entry. An op without a rule is a barrier, so a missing entry costs speed only.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from tofu_fx.axes.rules.contractions import CONTRACTION_RULES
from tofu_fx.axes.rules.images import IMAGE_RULES
from tofu_fx.axes.rules.joins import JOIN_RULES
from tofu_fx.axes.rules.pointwise import POINTWISE_RULES, pointwise
from tofu_fx.axes.rules.reductions import REDUCTION_RULES
from tofu_fx.axes.rules.result import Rule
from tofu_fx.axes.rules.slicing import SLICING_RULES, getitem
from tofu_fx.axes.rules.views import VIEW_RULES

#: op name -> rule. Any overload; elementwise ops come from PyTorch's own tag and are not listed.
RULES: dict[str, Rule] = {
    **POINTWISE_RULES,
    **VIEW_RULES,
    **SLICING_RULES,
    **JOIN_RULES,
    **REDUCTION_RULES,
    **CONTRACTION_RULES,
    **IMAGE_RULES,
}


def find_rule(target: Any) -> Rule | None:
    """The rule of an op: its entry, else elementwise by PyTorch's tag, else none."""
    if target is operator.getitem:
        return getitem
    schema = getattr(target, "_schema", None)
    if schema is None:
        return None
    name = schema.name.split("::")[-1]
    if schema.name.startswith("aten::") and name in RULES:
        return RULES[name]
    return pointwise if torch.Tag.pointwise in target.tags else None
