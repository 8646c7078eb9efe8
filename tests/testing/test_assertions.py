"""Each assertion passes a good pass and catches a broken one, with a message that names the place."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from tofu_fx.extras import MissingExtraError
from tofu_fx.fx.nodes import is_op
from tofu_fx.testing import (
    applied,
    capture,
    capture_aten,
    changes_nothing,
    difference,
    honest_meta,
    idempotent,
    keeps_outputs,
    leaves_alone,
    order_independent,
    permutation_safe,
    same_graph,
    well_formed,
)

aten = torch.ops.aten
Captured = tuple[GraphModule, tuple[Tensor, ...]]


@pytest.fixture(scope="module")
def captured() -> Captured:
    """``[2, 5, 4]`` -> linear, relu, dropout, gelu: tokens in dim 1, all treated alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.1), nn.GELU()).eval()
    with torch.no_grad():
        gm, inputs = capture_aten(model, torch.randn(2, 5, 4))
    return gm, inputs


def calls(gm: GraphModule, name: str) -> list[Node]:
    return [node for node in gm.graph.nodes if is_op(node, name)]


def stream(inputs: tuple[Tensor, ...]) -> int:
    """The number of the input that has tokens; the others are parameters."""
    return next(i for i, value in enumerate(inputs) if value.dim() == 3)


def without(name: str) -> Callable[[GraphModule], None]:
    """A pass that removes an op and leaves its input."""

    def pass_(gm: GraphModule) -> None:
        for node in calls(gm, name):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
        gm.recompile()

    return pass_


def replaced(name: str, target: object) -> Callable[[GraphModule], None]:
    """A pass that calls another op of one argument instead."""

    def pass_(gm: GraphModule) -> None:
        for node in calls(gm, name):
            node.target, node.kwargs = target, {}
        gm.recompile()

    return pass_


def added(target: object, *args: object) -> Callable[[GraphModule], None]:
    """A pass that puts one op more ahead of the output, with the fake value of what it is applied to."""

    def pass_(gm: GraphModule) -> None:
        output = gm.graph.output_node()
        (value,) = output.all_input_nodes
        with gm.graph.inserting_before(output):
            node = gm.graph.call_function(target, (value, *args))
        node.meta["val"] = value.meta["val"]
        output.replace_input_with(value, node)
        gm.recompile()

    return pass_


def nothing(gm: GraphModule) -> None:
    """The pass that does nothing."""


def test_a_good_pass_passes_everything(captured: Captured) -> None:
    gm, inputs = captured
    good, code = without("dropout"), gm.code
    assert calls(gm, "dropout")
    well_formed(gm)
    well_formed(applied(good, gm))
    honest_meta(applied(good, gm))
    keeps_outputs(good, gm, inputs)
    idempotent(good, gm)
    changes_nothing(nothing, gm)
    order_independent(good, replaced("relu", aten.tanh.default), gm, inputs)
    permutation_safe(good, gm, inputs, {stream(inputs): 1}, {0: 1})
    leaves_alone(gm.graph, applied(good, gm).graph, calls(gm, "dropout"))
    assert gm.code == code, "a pass gets a copy"


def broken_graphs() -> dict[str, tuple[Callable[[GraphModule], None], str]]:
    def early(gm: GraphModule) -> None:
        (relu,) = calls(gm, "relu")
        next(iter(gm.graph.nodes)).prepend(relu)

    def unknown_reader(gm: GraphModule) -> None:
        (relu,) = calls(gm, "relu")
        relu.all_input_nodes[0].users.pop(relu)

    def ghost_reader(gm: GraphModule) -> None:
        (relu,) = calls(gm, "relu")
        relu.users[Graph().placeholder("ghost")] = None

    def no_output(gm: GraphModule) -> None:
        gm.graph.erase_node(gm.graph.output_node())

    def two_outputs(gm: GraphModule) -> None:
        gm.graph.output(calls(gm, "relu")[0])

    def foreign(gm: GraphModule) -> None:
        (gelu,) = calls(gm, "gelu")
        gelu.args = (Graph().placeholder("foreign"),)

    def stale(gm: GraphModule) -> None:
        calls(gm, "relu")[0].target = aten.tanh.default

    return {
        "early": (early, "relu stands before linear, which it reads"),
        "unknown reader": (unknown_reader, "linear does not know that relu reads it"),
        "ghost reader": (ghost_reader, "relu has a reader that is not in the graph: ghost"),
        "no output": (no_output, "the graph has 0 outputs"),
        "two outputs": (two_outputs, "the graph has 2 outputs: output, output_1"),
        "foreign": (foreign, "gelu reads foreign, which is not in the graph"),
        "stale": (stale, "must call recompile"),
    }


@pytest.mark.parametrize("kind", list(broken_graphs()))
def test_well_formed_names_what_is_broken(captured: Captured, kind: str) -> None:
    pass_, message = broken_graphs()[kind]
    with pytest.raises(AssertionError, match=message):
        well_formed(applied(pass_, captured[0]))


def test_honest_meta_finds_values_that_are_missing_or_no_longer_true(captured: Captured) -> None:
    def forgets(gm: GraphModule) -> None:
        del calls(gm, "relu")[0].meta["val"]

    with pytest.raises(AssertionError, match=r"relu \(aten.relu.default\) has no fake value"):
        honest_meta(applied(forgets, captured[0]))
    with pytest.raises(AssertionError, match=r"transpose.* is .* \(2, 4, 5\), its fake value says .* \(2, 5, 4"):
        honest_meta(applied(added(aten.transpose.int, 1, 2), captured[0]))
    with pytest.raises(AssertionError, match=r"view.* cannot be computed from its inputs"):
        honest_meta(applied(added(aten.view.default, [3, 3]), captured[0]))


def test_keeps_outputs_names_the_output_that_is_wrong(captured: Captured) -> None:
    gm, inputs = captured
    with pytest.raises(AssertionError, match=r"output gelu differs by .*; 0 is allowed"):
        keeps_outputs(without("relu"), gm, inputs)
    with pytest.raises(AssertionError, match=r"output transpose_?\w* is torch.float32 \(2, 4, 5\), was"):
        keeps_outputs(added(aten.transpose.int, 1, 2), gm, inputs)
    slightly = added(aten.mul.Tensor, 1.0001)
    keeps_outputs(slightly, gm, inputs, tolerance=1e-3)
    with pytest.raises(AssertionError, match=r"output mul\w* differs by 0.0001; 1e-05 is allowed"):
        keeps_outputs(slightly, gm, inputs, tolerance=1e-5)


def test_keeps_outputs_sees_what_is_written_into_an_input(captured: Captured) -> None:
    gm, inputs = captured

    def writes(gm: GraphModule) -> None:
        node = gm.graph.find_nodes(op="placeholder")[stream(inputs)]
        with gm.graph.inserting_before(gm.graph.output_node()):
            gm.graph.call_function(aten.zero_.default, (node,))

    with pytest.raises(AssertionError, match=r"input, as the graph leaves it, .* differs"):
        keeps_outputs(writes, gm, inputs)


def test_keeps_outputs_counts_outputs(captured: Captured) -> None:
    def twice(gm: GraphModule) -> None:
        output = gm.graph.output_node()
        output.args = ((*output.all_input_nodes, *output.all_input_nodes),)

    with pytest.raises(AssertionError, match="2 tensors come out, 1 did"):
        keeps_outputs(twice, *captured)


def test_idempotent_finds_a_pass_that_never_ends(captured: Captured) -> None:
    with pytest.raises(AssertionError, match=r"a second time changes the graph: node \d+ was return .*tanh"):
        idempotent(added(aten.tanh.default), captured[0])


def test_changes_nothing_finds_a_change(captured: Captured) -> None:
    with pytest.raises(AssertionError, match=r"the pass changes the graph: node \d+ was relu"):
        changes_nothing(replaced("relu", aten.tanh.default), captured[0])


def test_order_independence_is_of_outputs_and_of_structure(captured: Captured) -> None:
    gm, inputs = captured
    first, second = replaced("relu", aten.tanh.default), replaced("tanh", aten.sigmoid.default)
    with pytest.raises(AssertionError, match="by the order of the passes, output gelu differs"):
        order_independent(first, second, gm, inputs)
    clone, drop = added(aten.clone.default), without("clone")
    order_independent(clone, drop, gm, inputs, structure=False)
    with pytest.raises(AssertionError, match=r"only with the second pass first is there .*clone"):
        order_independent(clone, drop, gm, inputs)


def test_leaves_alone_names_the_node_that_was_not_to_be_reached(captured: Captured) -> None:
    gm, _ = captured
    after = applied(without("relu"), gm).graph
    leaves_alone(gm.graph, after, calls(gm, "relu"))
    leaves_alone(gm.graph, after, lambda node: is_op(node, "relu"))
    with pytest.raises(AssertionError, match=r"relu.* was changed, and should not have been reached"):
        leaves_alone(gm.graph, after, calls(gm, "dropout"))


def test_permutation_safe_finds_a_pass_that_tells_tokens_apart(captured: Captured) -> None:
    gm, inputs = captured
    tokens = {stream(inputs): 1}
    with pytest.raises(AssertionError, match=r"output roll\w* depends on the order of the tokens"):
        permutation_safe(added(aten.roll.default, [1], [1]), gm, inputs, tokens, {0: 1})
    pooled = applied(added(aten.mean.dim, [1]), gm)
    permutation_safe(nothing, pooled, inputs, tokens)
    rolled = applied(added(aten.roll.default, [1], [1]), gm)
    with pytest.raises(ValueError, match="the given graph does not treat its tokens alike: output roll"):
        permutation_safe(nothing, rolled, inputs, tokens, {0: 1})
    with pytest.raises(ValueError, match="must have the same number"):
        permutation_safe(nothing, gm, inputs, {**tokens, 0 if stream(inputs) else 1: 0}, {0: 1})


def test_graphs_are_compared_by_ops_and_arguments_and_not_by_names(captured: Captured) -> None:
    gm, _ = captured

    def renamed(gm: GraphModule) -> None:
        calls(gm, "relu")[0].name = "another"

    def other_number(gm: GraphModule) -> None:
        calls(gm, "dropout")[0].update_arg(1, 1)

    assert same_graph(gm.graph, applied(nothing, gm).graph)
    assert same_graph(gm.graph, applied(renamed, gm).graph)
    assert "dropout" in difference(gm.graph, applied(other_number, gm).graph)
    longer = applied(added(aten.tanh.default), gm)
    assert not same_graph(gm.graph, longer.graph)
    one, true = Graph(), Graph()
    for graph, value in ((one, 1), (true, True)):
        graph.output(graph.call_function(aten.full.default, ([2], value)))
    assert not same_graph(one, true)


def test_a_shape_is_the_same_as_a_list_and_as_a_tuple() -> None:
    """Found by the nightly examples: of two orders of passes one gave a reshape's shape as a tuple."""
    listed, tupled, other = Graph(), Graph(), Graph()
    for graph, shape in ((listed, [2, 1]), (tupled, (2, 1)), (other, (1, 2))):
        graph.output(graph.call_function(aten.reshape.default, (graph.placeholder("x"), shape)))
    assert same_graph(listed, tupled)
    assert not same_graph(listed, other)


def test_capture_refuses_a_call_that_makes_several_graphs() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    with pytest.raises(ValueError, match="the call makes 2 graphs, not one"):
        capture(broken, torch.ones(2))


def test_strategies_say_that_hypothesis_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tofu_fx.testing.strategies", raising=False)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(MissingExtraError, match="pip install hypothesis"):
        importlib.import_module("tofu_fx.testing.strategies")
