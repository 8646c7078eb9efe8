"""An independent interpreter of reduced models: the untouched graph, at full length, by the papers' formulas.

Every token keeps its place from the first node to the last. Where tokens are reduced, each member of a group gets what
the group becomes. So attentions, means and sums see a group as often as it has members, which is what log(size) and
weights by size stand for in the rewritten graph, without either. Three things are left to do:

- what is indexed by token and joins later (a position table, a mask, a bias) shows each member its chief's row;
- features of the same tokens from before a reduction (a long skip) are merged as the tokens were;
- where tokens must be whole, each gets its own features back: from before each reduction, plus what its group gained.

Which dimension of which tensor has the tokens is found out by trying (``tofu_fx.testing.labels``). Nothing of the
compiler is imported here: it says which sites reduce what (``Facts``), and this says what must come out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tofu_fx.testing.reduced import Reduced
from tofu_fx.testing.running import Labelling, Labels, Prepared
from tofu_fx.testing.told import Entry, Facts

aten = torch.ops.aten


class Interpreter(Prepared):
    """A callable that computes what the rewritten graph must, from the graph as traced and the facts.

    ``labels`` may be those of another interpreter of the same graph, entries and barriers.
    """

    def __init__(self, gm: GraphModule, facts: Facts, labels: Labels | None = None) -> None:
        super().__init__(gm, facts, *prepared(gm.graph, facts), Labels() if labels is None else labels)

    def __call__(self, *inputs: Any) -> Any:
        """Run on the graph's inputs.

        Raises:
            Undecided: a decision is too close to rounding to be compared.
            Unfit: something in the graph that the interpreter cannot follow.
        """
        if not self.labels.known:
            Labelling(self).run(*inputs)
            self.labels.known = True
        return Reduced(self).run(*inputs)


def prepared(graph: Graph, facts: Facts) -> tuple[Graph, dict[Node, Entry], dict[str, Node]]:
    """A copy of the graph with an alias at each entry and fused attentions written out.

    Returns:
        The graph, the entries by their nodes, and the node of each fused attention's weights.
    """
    new, twins = Graph(), dict[Node, Node]()
    new.output(new.graph_copy(graph, twins))
    named = {old.name: twin for old, twin in twins.items()}
    for old, twin in twins.items():
        twin.name = old.name
    entries: dict[Node, Entry] = {}
    for entry in facts.entries:
        node = named[entry.node]
        if entry.readers is not None:
            with new.inserting_after(node):
                alias = new.call_function(aten.alias.default, (node,))
            alias.meta = dict(node.meta)
            for user in list(node.users):
                if user.name in entry.readers:
                    user.replace_input_with(node, alias)
            node = alias
        entries[node] = entry
    weights = {}
    for node in new.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # what a formula gives lies otherwise in memory than what a kernel gives
    for node in list(new.nodes):
        if node.target is aten.scaled_dot_product_attention.default and node.name not in facts.barriers:
            written = _written_out(new, node)
            if written is not None:
                weights[node.name] = written
    return new, entries, weights


def _written_out(graph: Graph, node: Node) -> Node | None:
    """Replace a fused attention by its formula; None where it is none of bidirectional tokens."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given: dict[str, Any] = {
        a.name: node.args[i] if i < len(node.args) else node.kwargs.get(a.name) for i, a in enumerate(schema)
    }
    if given["is_causal"] or given["dropout_p"] or given["enable_gqa"]:
        return None
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    with graph.inserting_before(node):
        scores = graph.call_function(aten.matmul.default, (query, graph.call_function(aten.mT.default, (key,))))
        scale = given["scale"] if given["scale"] is not None else query.meta["val"].shape[-1] ** -0.5
        scores = graph.call_function(aten.mul.Tensor, (scores, scale))
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            hidden = graph.call_function(aten.logical_not.default, (mask,))
            scores = graph.call_function(aten.masked_fill.Scalar, (scores, hidden, float("-inf")))
        elif mask is not None:
            scores = graph.call_function(aten.add.Tensor, (scores, mask))
        weights = graph.call_function(aten._safe_softmax.default, (scores, -1))
        out = graph.call_function(aten.matmul.default, (weights, value))
    node.replace_all_uses_with(out)
    name = node.name
    graph.erase_node(node)
    out.name, out.meta = name, dict(node.meta)
    return weights
