"""The table of carriers, op by op: one row of the result needs the same row of its operands, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from tofu_fx.rows.carriers import Operand, carriers

aten = torch.ops.aten


def t(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


#: the op, its arguments, and the dims of the result whose rows are carried
CASES: dict[str, tuple[Any, tuple[Any, ...], set[int]]] = {
    "add": (aten.add.Tensor, (t(2, 5, 4), t(5, 4)), {0, 1, 2}),
    "add of one row": (aten.add.Tensor, (t(2, 5, 4), t(1, 4)), {0, 1, 2}),
    "multiply": (aten.multiply.Tensor, (t(2, 5, 4), t(2, 5, 1)), {0, 1, 2}),
    "gelu": (aten.gelu.default, (t(2, 5, 4),), {0, 1, 2}),
    "where": (aten.where.self, (t(5, 4) > 0, t(2, 5, 4), t(2, 5, 4)), {0, 1, 2}),
    "dropout": (aten.dropout.default, (t(2, 5, 4), 0.5, False), {0, 1, 2}),
    "dropout in training": (aten.dropout.default, (t(2, 5, 4), 0.5, True), set()),
    "bernoulli": (aten.bernoulli.p, (t(2, 5, 4), 0.5), set()),
    "view": (aten.view.default, (t(2, 5, 12), [2, 5, 3, 4]), {0, 1}),
    "view of merged rows": (aten.view.default, (t(2, 5, 4), [10, 4]), {1}),
    "reshape": (aten.reshape.default, (t(2, 5, 3, 4), [2, 5, 12]), {0, 1}),
    "flatten": (aten.flatten.using_ints, (t(2, 5, 3, 4), 2), {0, 1}),
    "unflatten": (aten.unflatten.int, (t(2, 5, 12), 2, [3, 4]), {0, 1}),
    "unsqueeze": (aten.unsqueeze.default, (t(2, 5, 4), 1), {0, 2, 3}),
    "squeeze": (aten.squeeze.dim, (t(2, 1, 5), 1), {0, 1}),
    "permute": (aten.permute.default, (t(2, 5, 3, 4), [2, 0, 3, 1]), {0, 1, 2, 3}),
    "transpose": (aten.transpose.int, (t(2, 5, 4), 1, 2), {0, 1, 2}),
    "t": (aten.t.default, (t(5, 4),), {0, 1}),
    "mT": (aten.mT.default, (t(2, 5, 4),), {0, 1, 2}),
    "expand": (aten.expand.default, (t(1, 5, 4), [3, 5, 4]), {0, 1, 2}),
    "select": (aten.select.int, (t(2, 5, 3, 4), 2, 1), {0, 1, 2}),
    "unbind": (aten.unbind.int, (t(3, 2, 5), 0), {0, 1}),
    "slice": (aten.slice.Tensor, (t(2, 5, 4), 1, 1, 4), {0, 2}),
    "split": (aten.split.Tensor, (t(2, 5, 4), 2, 2), {0, 1}),
    "chunk": (aten.chunk.default, (t(2, 5, 4), 2, 2), {0, 1}),
    "cat": (aten.cat.default, ([t(2, 5, 4), t(2, 5, 3)], 2), {0, 1}),
    "stack": (aten.stack.default, ([t(2, 5), t(2, 5)], 1), {0, 2}),
    "linear": (aten.linear.default, (t(2, 5, 4), t(3, 4), t(3)), {0, 1}),
    "matmul": (aten.matmul.default, (t(2, 3, 5, 4), t(2, 3, 4, 6)), {0, 1, 2, 3}),
    "matmul of shared keys": (aten.matmul.default, (t(2, 3, 5, 4), t(4, 6)), {0, 1, 2, 3}),
    "matmul of a vector": (aten.matmul.default, (t(5, 4), t(4)), set()),
    "bmm": (aten.bmm.default, (t(3, 5, 4), t(3, 4, 6)), {0, 1, 2}),
    "mm": (aten.mm.default, (t(5, 4), t(4, 6)), {0, 1}),
    "addmm": (aten.addmm.default, (t(6), t(5, 4), t(4, 6)), {0, 1}),
    "baddbmm": (aten.baddbmm.default, (t(1, 5, 6), t(3, 5, 4), t(3, 4, 6)), {0, 1, 2}),
    "layer_norm": (aten.layer_norm.default, (t(2, 5, 4), [4]), {0, 1}),
    "softmax": (aten.softmax.int, (t(2, 5, 4), -1), {0, 1}),
    "softmax over rows": (aten.softmax.int, (t(2, 5, 4), 1), {0, 2}),
    "mean": (aten.mean.dim, (t(2, 5, 4), [1]), {0, 1}),
    "mean that keeps its dim": (aten.mean.dim, (t(2, 5, 4), [-1], True), {0, 1}),
    "mean of all": (aten.mean.default, (t(2, 5, 4),), set()),
    "amax": (aten.amax.default, (t(2, 5, 4), [0]), {0, 1}),
    "attention": (aten.scaled_dot_product_attention.default, (t(2, 3, 5, 4), t(2, 3, 6, 4), t(2, 3, 6, 4)), {0, 1, 2}),
    "masked attention": (
        aten.scaled_dot_product_attention.default,
        (t(2, 3, 5, 4), t(2, 3, 6, 4), t(2, 3, 6, 4), t(2, 1, 5, 6)),
        {0, 1, 2},
    ),
    "embedding": (aten.embedding.default, (t(9, 4), torch.tensor([[1, 2, 3], [4, 0, 8]])), {0, 1}),
    "cumsum": (aten.cumsum.default, (t(2, 5, 4), 1), set()),
    "in place": (aten.add_.Tensor, (t(2, 5, 4), t(2, 5, 4)), set()),
    "convolution": (aten.conv1d.default, (t(2, 5, 4), t(3, 5, 1)), set()),
}


def called(target: Any, args: tuple[Any, ...]) -> tuple[Node, dict[Node, Tensor]]:
    """The node of a call, and its operands."""
    graph, operands = Graph(), dict[Node, Tensor]()

    def given(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [given(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"operand_{len(operands)}")
        node.meta["val"] = value
        operands[node] = value
        return node

    node = graph.call_function(target, tuple(given(arg) for arg in args))
    node.meta["val"] = computed(node, operands)
    return node, operands


def computed(node: Node, operands: dict[Node, Tensor]) -> Any:
    args = torch.fx.node.map_arg(node.args, lambda n: operands[n].clone())
    return node.target(*args)  # type: ignore[operator]


def parts(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def other_rows_spoilt(value: Tensor, operand: Operand, row: int) -> Tensor:
    spoilt = value.clone()
    others = [i for i in range(value.shape[operand.dim]) if i != row]
    nothing = float("nan") if value.is_floating_point() else 0
    spoilt.index_fill_(operand.dim, torch.tensor(others), nothing)
    return spoilt


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_the_result_needs_the_same_row_of_its_operands_and_no_other(name: str) -> None:
    target, args, expected = CASES[name]
    node, values = called(target, args)
    whole = parts(node.meta["val"])
    carried = {dim for dim in range(whole[0].dim()) if carriers(node, dim) is not None}
    assert {dim for dim in carried if whole[0].shape[dim] > 1} == {d for d in expected if whole[0].shape[d] > 1}
    for dim in carried:
        found = carriers(node, dim)
        assert found is not None
        for row in range(whole[0].shape[dim]):
            spoilt = dict(values)
            for operand in found:
                spoilt[operand.node] = other_rows_spoilt(spoilt[operand.node], operand, row)
            for part, again in zip(whole, parts(computed(node, spoilt)), strict=True):
                torch.testing.assert_close(again.select(dim, row), part.select(dim, row), rtol=0, atol=0)
