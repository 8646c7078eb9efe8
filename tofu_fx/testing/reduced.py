"""The run of the interpreter that reduces tokens: every token keeps its place, members of a group share features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from tofu_fx.testing.axis import Axis, Unfit
from tofu_fx.testing.formulas import groups_of, join, join_by_ward, merge, metric_of, similarity
from tofu_fx.testing.labels import Companion
from tofu_fx.testing.running import Prepared, Running
from tofu_fx.testing.told import Entry, Vectors

# Weights below this are none: the key is hidden. (exp of -46, and of what masks put in the place of minus infinity.)
_HIDDEN = 1e-20
_COPIES = ("clone", "contiguous", "alias", "detach", "lift_fresh", "dropout", "to")
_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")


@dataclass(frozen=True)
class Step:
    """One reduction of a stream: the groups before and after it, and the features, each token in its place.

    ``additive`` says that since the reduction before it the stream only had branches added to it.
    """

    strategy: str
    before: Tensor
    chief: Tensor
    old: Tensor
    new: Tensor
    additive: bool

    def merged(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Features ``[B, tokens, F]`` of some of the tokens, merged as the stream was."""
        place = torch.full((self.chief.shape[1],), -1)
        place[tokens] = torch.arange(len(tokens))
        before, chief = place[self.before[:, tokens]], place[self.chief[:, tokens]]
        if bool((before < 0).any() or (chief < 0).any()):
            raise Unfit("a tensor has some tokens of a group only")
        return merge(x, before, chief, self.strategy)


class Reduced(Running):
    """Runs the untouched graph with its tokens reduced at each entry."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared)
        self.steps: dict[int, list[Step]] = {}
        self.chosen: dict[str, tuple[str, Tensor]] = {}
        #: how many reductions of each stream a node's value has seen
        self.seen: dict[Node, dict[int, int]] = {}
        #: the residual stream since its last reduction, with nothing but additions in between
        self.residual: set[Node] = set()
        self.restored: dict[Node, Any] = {}

    # ---- a node ----------------------------------------------------------------------------------------------------

    def visit(self, node: Node) -> Any:
        """Compute a node on tokens that share their groups' features, or on whole ones."""
        reduced = [value for value in node.all_input_nodes if self.seen.get(value)]
        if getattr(node.target, "__name__", "") in ("_enter_autocast", "_exit_autocast"):
            for value in list(self.seen):  # after it they would be computed again in another precision
                self.whole(value)
        if not reduced:
            return self.plain(node, {})
        if node.name in self.facts.barriers:
            copied = node.name in self.facts.ends
            return self.plain(node, {value: self.whole(value, copied) for value in reduced})
        newest: dict[int, int] = {}
        for value in reduced:
            for stream, version in self.seen[value].items():
                newest[stream] = max(newest.get(stream, 0), version)
        if any(self.labels.axes.get(node.name, [])):
            streams = {axis.stream for part in self.labels.axes[node.name] for axis in part}
            self.seen[node] = {stream: version for stream, version in newest.items() if stream in streams}
            if self._continues(node):
                self.residual.add(node)
        return self._computed(node, {value: self._brought(value, newest) for value in reduced}, newest)

    def _brought(self, node: Node, newest: Mapping[int, int]) -> Any:
        """A node's value with its tokens merged as often as those that it meets."""
        value = self.env[node]
        for axis in self.axes(node):
            since = self.seen[node].get(axis.stream, 0)
            value = self._merged(value, axis, since, newest.get(axis.stream, 0))
        return value

    def _merged(self, value: Tensor, axis: Axis, since: int, until: int) -> Tensor:
        for step in self.steps.get(axis.stream, [])[since:until]:
            value = axis.change(value, lambda x, step=step: step.merged(x, axis.tokens))  # type: ignore[misc]
        return value

    def _computed(self, node: Node, values: dict[Node, Any], newest: Mapping[int, int]) -> Any:
        joining = [c for c in self.labels.companions.get(node.name, ()) if newest.get(c.stream)]
        weighs = not self.facts.proportional and self._is_softmax(node)
        if not joining and not weighs:
            return self.plain(node, values)
        trial, operands = self.trial(node, values)
        filled = list(trial.operands)
        if weighs:
            filled[0] = self._counted_once(node, filled[0], self.axes(operands[0]), newest)
        for companion in joining:
            if companion.axis is not None and self._is_input(operands[companion.place]):
                filled[companion.place] = self._merged(
                    filled[companion.place], companion.axis, 0, newest[companion.stream]
                )
        rows = [c for c in joining if c.axis is None or not self._is_input(operands[c.place])]
        return self._with_rows(trial.call, filled, rows, newest)

    def _with_rows(self, call: Any, filled: list[Any], rows: list[Companion], newest: Mapping[int, int]) -> Any:
        """The op with the chiefs' rows of its tables: once for each sample, of which that sample's part is taken."""
        result = None
        for b in range(int(rows[0].sample.max()) + 1 if rows else 1):
            operands = list(filled)
            for c in rows:
                chief = self.steps[c.stream][newest[c.stream] - 1].chief[b]
                operands[c.place] = c.survivors(operands[c.place], chief)
            again = call(operands)
            if result is not None and not isinstance(again, Tensor):
                raise Unfit("an op with several results joins tokens with a table")
            result = again if result is None else torch.where(rows[0].sample == b, again, result)
        return result

    def _is_input(self, node: Node) -> bool:
        """Whether a value depends on what the caller passes in."""
        seen, todo = {node}, [node]
        while todo:
            value = todo.pop()
            if value.name in self.facts.inputs:
                return True
            todo += [v for v in value.all_input_nodes if v not in seen]
            seen.update(value.all_input_nodes)
        return False

    # ---- attention without log(size) -------------------------------------------------------------------------------

    def _is_softmax(self, node: Node) -> bool:
        attention = node in self.prepared.weights.values() or node.name in self.facts.attentions
        return attention and _name(node) in _SOFTMAX

    def _counted_once(self, node: Node, logits: Tensor, axes: list[Axis], newest: Mapping[int, int]) -> Tensor:
        """Logits of keys of which the members of a group count as one: each less the logarithm of their number."""
        dim: Any = node.args[1]
        for axis in axes:
            if newest.get(axis.stream) and bool((axis.token != axis.token.narrow(dim, 0, 1)).any()):
                members = groups_of(self.steps[axis.stream][newest[axis.stream] - 1].chief).sum(2)
                counts = members[axis.sample.clamp_min(0), axis.token.clamp_min(0)]
                logits = logits - torch.where(axis.token >= 0, counts, 1).log().to(logits.dtype)
        return logits

    # ---- whole tokens ----------------------------------------------------------------------------------------------

    def output(self, node: Node) -> Any:
        """A node's value with all its tokens."""
        return self.whole(node) if self.seen.get(node) else self.env[node]

    def whole(self, node: Node, copied: bool = False) -> Any:
        """A node's value with each token's own features.

        Of the residual stream: what the token was before each reduction, and what its group has gained since. What
        each token alone decides after it (a norm, a head) is done again; anything else is what its group has.
        """
        if copied:
            return self.env[node]
        if node not in self.restored:
            if node in self.residual:
                self.restored[node] = self._restored(node)
            elif self._is_redone(node):
                own = {value: self.whole(value) for value in node.all_input_nodes if self.seen.get(value)}
                self.restored[node] = self.plain(node, own)
            else:
                self.restored[node] = self.env[node]
        return self.restored[node]

    def _restored(self, node: Node) -> Tensor:
        value: Tensor = self.env[node]
        (axis,) = self.axes(node)
        for step in reversed(self.steps[axis.stream][: self.seen[node][axis.stream]]):
            value = axis.change(value, lambda x, step=step: x + (step.old - step.new))  # type: ignore[misc]
            if not step.additive:
                break
        return value

    def _is_redone(self, node: Node) -> bool:
        """Whether a value follows, token by token, from the residual stream. (Of sums of two, the sum goes on.)"""
        if node in self.residual:
            return True
        sources = [value for value in node.all_input_nodes if self.seen.get(value)]
        mixes = self._is_softmax(node) or node.name in self.facts.attentions
        if mixes or not sources or (_name(node) == "add" and len(sources) > 1):
            return False
        single = all(len(part) <= 1 for value in (node, *sources) for part in self.labels.axes.get(value.name, []))
        return single and all(self._is_redone(value) for value in sources)

    def _continues(self, node: Node) -> bool:
        """Whether a node is still the residual stream: a branch is added to it, or it is a copy of it."""
        version = self.seen[node]
        chained = [v for v in node.all_input_nodes if v in self.residual and self.seen[v] == version]
        if not chained or not self._same_places(chained[0], node):
            return False
        if _name(node) == "add":
            return bool(node.kwargs.get("alpha", 1) == 1)
        return _name(node) in _COPIES and bool(chained[0].meta["val"].dtype == node.meta["val"].dtype)

    def _same_places(self, node: Node, other: Node) -> bool:
        ours, others = self.axes(node), self.axes(other)
        return len(ours) == len(others) == 1 and torch.equal(ours[0].token, others[0].token)

    # ---- reducing --------------------------------------------------------------------------------------------------

    def enter(self, node: Node, entry: Entry) -> None:
        """Merge the tokens of an entry, or do as the entry did that it shares its choice with."""
        axis = next(axis for axis in self.axes(node) if axis.stream == entry.stream)
        steps, value = self.steps.setdefault(entry.stream, []), self.env[node]
        if self.seen.get(node, {}).get(entry.stream, 0) != len(steps):
            raise Unfit("a site reduces tokens that are whole again")
        old = value.flatten()[axis.places]
        before = steps[-1].chief if steps else torch.arange(entry.tokens).expand(len(old), -1)
        if entry.owner not in self.chosen or entry.placement == "stream":
            self.chosen[entry.owner] = entry.strategy, self._choice(node, entry, before, axis)
        strategy, chief = self.chosen[entry.owner]
        new = merge(old, before, chief, strategy)
        steps.append(Step(strategy, before, chief, old, new, node in self.residual))
        self.env[node] = axis.change(value, lambda _: new)
        self.seen[node] = {**self.seen.get(node, {}), entry.stream: len(steps)}
        self.residual.add(node)

    def _choice(self, node: Node, entry: Entry, before: Tensor, axis: Axis) -> Tensor:
        if entry.grid and entry.grid[-1]:
            raise Unfit("which place of a cell is kept is drawn by a seed")
        if entry.match == "fisher":
            return self._by_distance(node, entry, before, axis)
        if entry.match in ("features", "sketch"):
            vectors = self.env[node].flatten()[axis.places].unsqueeze(-1)
            metric = metric_of(vectors, entry.match)
        else:
            metric = metric_of(self._vectors(entry, entry.key), entry.match)
            if entry.match == "queries_keys":
                metric = torch.cat([metric_of(self._vectors(entry, entry.query), entry.match), metric], -1)
        valid = self._valid(entry) if entry.masked else None
        if valid is not None and bool(valid.all()):
            valid = None
        if len(metric) < len(before):  # keys that are the same for all samples
            metric = metric.expand(len(before), -1, -1)
        valid = valid.expand(len(before), -1) if valid is not None else None
        score = [similarity(m, None if valid is None else valid[b]) for b, m in enumerate(metric)]
        return join(before, score, entry.r, entry.prefix, entry.suffix, entry.grid)

    def _by_distance(self, node: Node, entry: Entry, before: Tensor, axis: Axis) -> Tensor:
        assert entry.projection is not None
        x = self.env[node].flatten()[axis.places]
        # The projection is an op of the graph, in its dtype.
        metric = x @ entry.projection.to(x.dtype)
        valid = self._valid(entry).expand(len(before), -1) if entry.masked else None
        return join_by_ward(before, metric, valid, entry.r, entry.prefix, entry.suffix, entry.grid)

    def _vectors(self, entry: Entry, vectors: Vectors) -> Tensor:
        """Queries or keys as ``[B, N, D, heads]``."""
        value = self._ahead(self._named(vectors), entry.stream)
        axis = vectors.where.axis(value.shape, entry.stream, entry.tokens)
        feature = torch.arange(value.shape[vectors.dim])
        feature = feature.view([-1 if d == vectors.dim else 1 for d in range(value.dim())]).expand(value.shape)
        places = axis.places
        order = feature.flatten()[places].argsort(dim=-1, stable=True)
        found = value.flatten()[places.gather(-1, order)]
        return found.unflatten(-1, (value.shape[vectors.dim], -1))

    def _valid(self, entry: Entry) -> Tensor:
        """Which tokens any query of any head attends to, ``[B, N]``; nobody attends to padding."""
        value = self._ahead(self._named(entry.weights), entry.stream)
        axis = entry.weights.where.axis(value.shape, entry.stream, entry.tokens)
        return (value.flatten()[axis.places] > _HIDDEN).any(-1)

    def _named(self, vectors: Vectors) -> Node:
        if vectors.fused:
            if vectors.node not in self.prepared.weights:
                raise Unfit("the weights of a fused attention are not known")
            return self.prepared.weights[vectors.node]
        return next(node for node in self.prepared.graph.nodes if node.name == vectors.node)

    def _ahead(self, node: Node, stream: int) -> Any:
        """A node's value, ahead of its place in the graph where it has none yet: the keys of a branch.

        What another branch has merged is whole for this one: it ends before this one begins.
        """
        if node in self.env:
            others = self.seen.get(node, {}).keys() - {stream}
            return self.whole(node) if others and stream not in self.seen[node] else self.env[node]
        if node.op == "get_attr":
            return self.attribute(str(node.target))
        return self.plain(node, {value: self._ahead(value, stream) for value in node.all_input_nodes})


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")
