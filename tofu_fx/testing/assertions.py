"""What must be true of a graph pass, as assertions. They work on anybody's pass over an FX graph module.

Each raises AssertionError whose message names the node or output that is wrong. The graph module given stays as it is:
a pass gets a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

from tofu_fx.testing.compare import relative_error, same_bits, tensors
from tofu_fx.testing.graphs import Pass, Values, applied, descendants, difference, live
from tofu_fx.testing.proofs import PERMUTATION_TOLERANCE

Inputs = Sequence[Any]


def well_formed(gm: GraphModule, recompiled: bool = True) -> None:
    """Every node stands after what it reads, knows its readers, and there is one output, at the end.

    Args:
        gm: what to look at.
        recompiled: the code that runs must be that of the graph (a pass that forgets ``recompile`` does nothing).
    """
    nodes = list(gm.graph.nodes)
    known: set[Node] = set()
    present = set(nodes)
    for node in nodes:
        for value in node.all_input_nodes:
            assert value in present, f"{node.name} reads {value.name}, which is not in the graph"
            assert value in known, f"{node.name} stands before {value.name}, which it reads"
            assert node in value.users, f"{value.name} does not know that {node.name} reads it"
        for user in node.users:
            assert user in present, f"{node.name} has a reader that is not in the graph: {user.name}"
            assert node in user.all_input_nodes, f"{node.name} has a reader that does not read it: {user.name}"
        known.add(node)
    outputs = [node.name for node in nodes if node.op == "output"]
    assert len(outputs) == 1, f"the graph has {len(outputs)} outputs: {', '.join(outputs)}"
    assert nodes[-1].op == "output", f"{nodes[-1].name} stands after the output"
    try:
        gm.graph.lint()
    except Exception as error:
        raise AssertionError(f"the graph is not well-formed: {error}") from error
    if recompiled:
        code = gm.graph.python_code("self").src
        assert gm.code == code, "the code that runs is not that of the graph: the pass must call recompile()"


def honest_meta(gm: GraphModule) -> None:
    """Every node has its fake value in ``meta["val"]``, of the shape and dtype that it has if computed again."""
    for node in gm.graph.nodes:
        assert node.op == "output" or _returns_nothing(node) or "val" in node.meta, (
            f"{node.name} ({node.target}) has no fake value in meta['val']"
        )
    values = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    modes = [value.fake_mode for value in values if isinstance(value, torch._subclasses.FakeTensor)]
    assert modes, "no placeholder has a fake tensor in meta['val']"
    with torch._guards.tracing(None), enable_python_dispatcher(), modes[0]:
        _Recomputed(gm).run(*values)


class _Recomputed(torch.fx.Interpreter):
    """Runs a graph on its fake inputs and compares what comes out with what the nodes carry."""

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            raise AssertionError(f"{n.name} ({n.target}) cannot be computed from its inputs: {error}") from error
        for now, noted in zip(tensors(value), tensors(n.meta.get("val", value)), strict=True):
            same = (tuple(now.shape), now.dtype, now.device) == (tuple(noted.shape), noted.dtype, noted.device)
            assert same, (
                f"{n.name} ({n.target}) is {now.dtype} {tuple(now.shape)}, "
                f"its fake value says {noted.dtype} {tuple(noted.shape)}"
            )
        return value


def keeps_outputs(pass_: Pass, gm: GraphModule, inputs: Inputs, tolerance: float = 0.0) -> None:
    """A pass changes neither what a graph returns nor what it writes into its inputs.

    Args:
        pass_: what to test.
        gm: a graph module, and ``inputs`` what it is called with.
        inputs: tensors are cloned, so they stay as they are.
        tolerance: 0 for the same bits, else the largest error relative to an output's largest magnitude.
    """
    expected, written = _run(gm, inputs)
    after = applied(pass_, gm)
    found, wrote = _run(after, inputs)
    _equal(found, expected, tolerance, "output", _output_names(after.graph))
    _equal(wrote, written, tolerance, "input, as the graph leaves it,", _input_names(gm.graph, inputs))


def idempotent(pass_: Pass, gm: GraphModule) -> None:
    """A pass has nothing left to do on its own result: the same nodes come out of a second time."""
    once = applied(pass_, gm)
    changed = difference(once.graph, applied(pass_, once).graph)
    assert not changed, f"a second time changes the graph: {changed}"


def order_independent(
    first: Pass, second: Pass, gm: GraphModule, inputs: Inputs, tolerance: float = 0.0, structure: bool = True
) -> None:
    """Two passes give the same outputs whichever comes first and, with ``structure``, compute the same values."""
    one, other = applied(second, applied(first, gm)), applied(first, applied(second, gm))
    found, expected = _run(one, inputs), _run(other, inputs)
    _equal(found[0], expected[0], tolerance, "by the order of the passes, output", _output_names(one.graph))
    if structure:
        values = Values()
        here, there = values.of(one.graph), values.of(other.graph)
        for nodes, others, order in ((here, there, "the first pass first"), (there, here, "the second pass first")):
            extra = Counter(nodes.values()) - Counter(others.values())
            names = [node.format_node() for node, number in nodes.items() if number in extra]
            assert not names, f"only with {order} is there {names[0]}"


def changes_nothing(pass_: Pass, gm: GraphModule) -> None:
    """A pass that only looks: every node is as it was."""
    changed = difference(gm.graph, applied(pass_, gm).graph)
    assert not changed, f"the pass changes the graph: {changed}"


def leaves_alone(before: Graph, after: Graph, reached: Iterable[Node] | Callable[[Node], bool]) -> None:
    """What a rewrite does not reach is computed as before.

    Args:
        before: the graph ahead of the rewrite.
        after: the graph after it; names may differ.
        reached: nodes of ``before`` that the rewrite may change, or a predicate of them. What is computed from these
            may change too. Dead nodes may go.
    """
    chosen = [node for node in before.nodes if reached(node)] if callable(reached) else list(reached)
    free, values = descendants(chosen), Values()
    numbers, kept = values.of(before), Counter(values.of(after).values())
    alive = live(before)
    for node, number in numbers.items():
        if node not in free and node in alive:
            assert kept[number], f"{node.format_node()} was changed, and should not have been reached"
            if node.op == "call_function":
                kept[number] -= 1


def permutation_safe(
    pass_: Pass,
    gm: GraphModule,
    inputs: Inputs,
    tokens: Mapping[int, int],
    outputs: Mapping[int, int] | None = None,
    tolerance: float = PERMUTATION_TOLERANCE,
) -> None:
    """A graph that treats its tokens alike still does so after a pass.

    Tokens in another order give the outputs in that order; pooled outputs stay the same.

    Args:
        pass_: what to test.
        gm: a graph for which this holds, called with ``inputs``.
        inputs: what ``gm`` is called with.
        tokens: number of an input -> its dim of tokens, for all inputs that have tokens.
        outputs: the same of the outputs; those that are not in it are pooled.
        tolerance: error relative to an output's largest magnitude.

    Raises:
        ValueError: the given graph does not treat its tokens alike, so nothing would be proved.
    """
    counts = {inputs[place].shape[dim] for place, dim in tokens.items()}
    if len(counts) != 1:
        raise ValueError(f"the inputs have {sorted(counts)} tokens; they must have the same number")
    order = torch.randperm(counts.pop(), generator=torch.Generator().manual_seed(0))
    shuffled = [
        value.index_select(tokens[i], order.to(value.device)) if i in tokens else value
        for i, value in enumerate(inputs)
    ]

    def error(candidate: GraphModule) -> tuple[float, str]:
        straight, turned = tensors(_run(candidate, inputs)[0]), tensors(_run(candidate, shuffled)[0])
        dims, names = outputs or {}, _output_names(candidate.graph)
        errors = []
        for i, (value, other) in enumerate(zip(straight, turned, strict=True)):
            wanted = value.index_select(dims[i], order.to(value.device)) if i in dims else value
            errors.append((relative_error(other, wanted), names[i]))
        return max(errors, key=lambda found: found[0] if found[0] == found[0] else float("inf"))

    worst, name = error(gm)
    if not worst <= tolerance:
        raise ValueError(f"the given graph does not treat its tokens alike: output {name} differs by {worst:.2g}")
    worst, name = error(applied(pass_, gm))
    assert worst <= tolerance, (
        f"after the pass, output {name} depends on the order of the tokens: it differs by {worst:.2g}"
    )


def _run(gm: GraphModule, inputs: Inputs) -> tuple[Any, list[Any]]:
    """The outputs, and the inputs as the graph leaves them. Runs the graph itself, not code that may be stale."""
    given = [tree_map_only(Tensor, lambda value: value.detach().clone(), value) for value in inputs]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = torch.fx.Interpreter(gm).run(*given)
        return tree_map_only(Tensor, lambda value: value.clone(), outputs), given


def _equal(found: Any, expected: Any, tolerance: float, what: str, names: Sequence[str]) -> None:
    now, was = tensors(found), tensors(expected)
    assert len(now) == len(was), f"{len(now)} tensors come out, {len(was)} did"
    for i, (a, b) in enumerate(zip(now, was, strict=True)):
        name = names[i] if i < len(names) else str(i)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (
            f"{what} {name} is {a.dtype} {tuple(a.shape)}, was {b.dtype} {tuple(b.shape)}"
        )
        if not same_bits(a, b):
            error = relative_error(a, b)
            close = tolerance > 0 and error <= tolerance
            assert close, f"{what} {name} differs by {error:.2g}; {tolerance:.2g} is allowed"


def _output_names(graph: Graph) -> list[str]:
    """The nodes whose tensors a graph returns, as far as each returns one."""
    (output,) = graph.find_nodes(op="output")
    return [node.name for node in torch.utils._pytree.tree_leaves(output.args) if isinstance(node, Node)]


def _input_names(graph: Graph, inputs: Inputs) -> list[str]:
    nodes = graph.find_nodes(op="placeholder")
    return [node.name for node, value in zip(nodes, inputs, strict=False) if isinstance(value, Tensor)]


def _returns_nothing(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.returns
