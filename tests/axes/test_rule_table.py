"""Every op that the rules know, along every axis: what the table says, what the compiler does and what is true agree.

Three things that do not know of each other. The table is written by hand. The truth is the op itself on fewer tokens
against the op on all of them, in plain torch, other tokens being copies of each other in each sample. The compiler runs
its passes on a block with the op after it, and what it makes of that runs on such copies as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.axes.branch import compiled_branch, two_branches
from tests.axes.harness import BARRIER, CARRIED, CAUTIOUS, SIZED, Compiled, Row, X, holds
from tests.axes.layouts import B, C, N, copies, generator, same
from tests.axes.page import DOCS, lines
from tests.axes.rows_elementwise import TWO
from tests.axes.table import ROWS
from tofu_fx.axes.rules.table import RULES

#: tracing makes another op of it
BECOMES = {"lift_fresh": "lift_fresh_copy"}


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row) -> None:
    assert holds(row) == (row.verdict != BARRIER), "the numbers contradict the table"
    compiled = Compiled(row)
    assert bool(compiled.reasons) == (row.verdict in (BARRIER, CAUTIOUS)), f"the compiler says {compiled.reasons}"
    assert compiled.is_right(), "the compiler's graph gives other numbers"
    assert BECOMES.get(row.op, row.op) in compiled.called, "the row does not call its op"


def test_no_two_rows_have_one_name() -> None:
    names = [row.name for row in ROWS]
    assert sorted(set(names)) == sorted(names)


def test_every_rule_has_a_row() -> None:
    assert sorted({*RULES, "getitem"} - {row.op for row in ROWS}) == []


#: in the MLP of a block that runs on fewer tokens; an attention there would be a site of its own
IN_BRANCH = [
    row for row in ROWS
    if (row.axis, row.verdict, row.layout, row.result) == ("sample", BARRIER, "b n c", "b n c")
    and "attention" not in row.name and "keys" not in row.name
    and (row.op not in TWO or row.op in ("add", "where"))
]  # fmt: skip


@torch.no_grad()
def test_samples_are_not_mixed_inside_of_a_branch() -> None:
    seen = []
    for row in [Row("none", "none", CARRIED, lambda x: x), *IN_BRANCH]:
        compilation = compiled_branch(row)
        (site,) = compilation.reducing
        mixes = [barrier for barrier in compilation.barriers if barrier.node not in compilation.axes.ends]
        if "mlp" in [branch.kind for branch in site.branches]:  # where the MLP is too long to be seen as one, none is
            seen.append(row)
            assert bool(mixes) == (row.verdict == BARRIER), row.name
        assert same(compilation.gm(copies(X)), two_branches(copies(X), row)), row.name
    assert seen[0].verdict == CARRIED
    assert len(seen) > 0.8 * len(IN_BRANCH)


def test_the_harness_sees_a_wrong_verdict() -> None:
    mixing = Row("sub", "sample", CARRIED, lambda x: x - x.mean(0))
    assert not holds(mixing)
    unweighted = Row("mean", "token", SIZED, lambda x: x.mean(1), out="b c", fewer=lambda x, s, r: x.mean(1))
    assert not holds(unweighted)
    harmless = Row("relu", "none", BARRIER, torch.relu)
    assert holds(harmless)


def _elementwise() -> Iterator[tuple[str, Any]]:
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            if torch.Tag.pointwise in op.tags and not op._schema.is_mutable and "out" not in overload:
                yield f"{name}.{overload}", op


def test_ops_without_a_rule_that_pytorch_calls_elementwise_are() -> None:
    """The compiler carries tokens through them on PyTorch's word alone."""
    x = torch.rand(B, N, C, generator=generator(0)) * 0.8 + 0.1
    order = torch.randperm(N, generator=generator(1))
    checked = []
    for name, op in _elementwise():
        required = [a for a in op._schema.arguments if not a.has_default_value() and not a.kwarg_only]
        values = [x if str(a.type) in ("Tensor", "Optional[Tensor]") else 2 for a in required]
        moved = [x[:, order] if value is x else value for value in values]
        for form in (lambda v: v, torch.Tensor.long, lambda v: v > 0.5):
            cast = [[form(v) if isinstance(v, torch.Tensor) else v for v in several] for several in (values, moved)]
            try:
                whole, other = op(*cast[0]), op(*cast[1])
            except (RuntimeError, TypeError, NotImplementedError):
                continue
            if not isinstance(whole, torch.Tensor) or name.startswith(("bernoulli", "rand", "normal", "empty")):
                continue
            assert torch.equal(whole[:, order], other) or whole.isnan().any(), name
            checked.append(name)
            break
    assert len(checked) > 150, "hardly any op could be called"


def test_the_page_has_the_table() -> None:
    text = DOCS.read_text(encoding="utf-8")
    wanted = "\n".join(lines())
    assert wanted in text, "the table of docs/rules.md is old: python -m tests.axes.page writes it"
