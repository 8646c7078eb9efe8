"""A model with a reduction at every site whose strategy, metric and number of tokens are chosen when it runs.

Calibration tries hundreds of plans. To rewrite and compile the graph for each would take hours, so it is rewritten
once: the token counts are inputs of the graph (as in ``tofu_fx.rewriting.token_count_inputs``), all that a site could
compare tokens by is written, and the graph is interpreted, node by node and only as far as what is asked for needs it.
A plan that touches nothing ahead of some site starts from the values that the untouched run had there.

Everything works on the traced graph: modules are called through Dynamo, never looked at.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from tofu_fx import ops  # noqa: F401 - registers torch.ops.tofu
from tofu_fx.calibration.recording import Recorder, Rehearsed
from tofu_fx.compilation import Compilation
from tofu_fx.fx.autocast import Autocasts, is_region
from tofu_fx.pipeline import run_passes, without
from tofu_fx.plan.counts import Passage, walk
from tofu_fx.plan.options import Options
from tofu_fx.plan.words import RANK, grouping_of


@dataclass(frozen=True)
class Choice:
    """What is done at one site: a row of a plan without what identifies it."""

    strategy: str = "mlerp"
    match: str = "keys"
    r: int = 0


#: site id -> what is done there; sites that are not named are left alone
Choices = Mapping[str, Choice]

_NOTHING = Choice()


@dataclass
class Rehearsal:
    """One graph, rewritten with a reduction at each of its ``sites``, whose token counts are its last placeholders."""

    compilation: Compilation
    sites: Sequence[Rehearsed]
    #: matrices by which tokens are projected, by the names of the constants that stand for them in the graph
    projections: dict[str, Tensor] = field(default_factory=dict)

    def project(self, matrices: Mapping[str, Tensor]) -> None:
        """Compare tokens by these matrices ``[C, k]``, by the site's id; sites without one lose "fisher"."""
        for entry in self.sites:
            if entry.site.id not in matrices or entry.projection is None:
                entry.metrics.pop("fisher", None)
                continue
            value = entry.fuse.args[0].meta["val"]  # type: ignore[union-attr]
            # Rounded as a plan has them.
            self.projections[entry.projection] = matrices[entry.site.id].half().to(value.device, value.dtype)

    def columns(self, entry: Rehearsed) -> int:
        """Of how many numbers the projection of a token has, by the matrix of its site."""
        return int(self.projections[entry.projection].shape[1]) if entry.projection in self.projections else RANK

    @classmethod
    def of(cls, gm: GraphModule, inputs: Sequence[Any], options: Options) -> Rehearsal:
        """Rewrite a graph from Dynamo. It has no ``sites`` where nothing can be reduced in it.

        Raises:
            PassError: a pass failed. Unsupported: the graph cannot be rewritten at all.
        """
        options = options.model_copy(update={"ratio": None, "r": 1, "plan": None})
        recorder = Recorder()
        compilation = run_passes(without("verify"), gm, options, inputs, reducer=recorder)
        return cls(compilation, recorder.rehearsed)

    @property
    def gm(self) -> GraphModule:
        """The rewritten graph."""
        return self.compilation.gm

    def passages(self, choices: Choices) -> list[Passage]:
        """The token counts at each site.

        Raises:
            ValueError: when a site is to lose more tokens than it can.
        """
        found = []
        sites = [entry.site for entry in self.sites]
        for site, passage in walk(sites, lambda site, _: choices.get(site.id, _NOTHING).r):
            tokens, r = passage.arriving, passage.removed
            if not 0 <= r <= site.cap(tokens):
                raise ValueError(f"{site.id}: r = {r}, but of {tokens} tokens at most {site.cap(tokens)} can go")
            found.append(passage)
        return found

    @property
    def resumable(self) -> bool:
        """Whether a run may start from another's values: nothing in the graph has an effect beside its result."""
        return not self.effects

    @cached_property
    def effects(self) -> tuple[Node, ...]:
        """The nodes that must run although nothing may read them: what changes a tensor in place, or a mode."""
        return tuple(node for node in self.gm.graph.nodes if node.op == "call_function" and _has_effect(node))

    def needed(self) -> list[Node]:
        """The nodes that the outputs need when tokens go at every site, in graph order."""
        reached, todo = set[Node](), [self.gm.graph.output_node(), *self.effects]
        while todo:
            node = todo.pop()
            if node not in reached:
                reached.add(node)
                todo.extend(node.all_input_nodes)
        return [node for node in self.gm.graph.nodes if node in reached]

    def run(
        self,
        inputs: Sequence[Any],
        choices: Choices,
        start: Snapshot | None = None,
        keep: Sequence[Node] = (),
        tokens: dict[str, Tensor] | None = None,
    ) -> tuple[Any, dict[Node, Any]]:
        """Run the graph.

        Args:
            inputs: one for each traced placeholder.
            choices: what is done at each site.
            start: values of the untouched run ahead of some site; nothing may be done at the sites ahead of it.
            keep: further nodes whose values are wanted, instead of the outputs.
            tokens: gets for each site a tensor of zeros that wants a gradient and was added to the tokens behind it.

        Returns:
            The outputs as the traced graph gives them (None with ``keep``), and the values of ``keep``.
        """
        run = _Run(self, choices, inputs, start, tokens)
        if keep:
            run.compute(keep)
            return None, {node: run.env[node] for node in keep}
        run.compute([run.output])
        return run.env[run.output], {}

    def evaluate(self, node: Node, inputs: Sequence[Any], start: Snapshot, given: dict[Node, Any]) -> Any:
        """The value of one node where others are given."""
        run = _Run(self, {}, inputs, start)
        run.env.update(given)
        run.compute([node])
        return run.env[node]

    def snapshots(self, inputs: Sequence[Any]) -> tuple[Any, list[Snapshot]]:
        """The outputs of a run that reduces nothing, and for each site the values that were there ahead of it."""
        run = _Run(self, {}, inputs)
        run.compute([run.output, *(metric for entry in self.sites for metric in entry.metrics.values())])
        return run.env[run.output], [Snapshot(run.live_at(entry.fuse)) for entry in self.sites]


@dataclass(frozen=True)
class Snapshot:
    """The values that are alive ahead of one site in a run that reduces nothing."""

    values: dict[Node, Any]


def _has_effect(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.is_impure() if schema is None else schema.is_mutable or not schema.returns


class _Run:
    """One interpretation of a rehearsal's graph."""

    def __init__(
        self,
        rehearsal: Rehearsal,
        choices: Choices,
        inputs: Sequence[Any],
        start: Snapshot | None = None,
        tokens: dict[str, Tensor] | None = None,
    ) -> None:
        self.rehearsal, self.choices, self.tokens = rehearsal, choices, tokens
        self.entries = {entry.fuse: entry for entry in rehearsal.sites}
        self.output = rehearsal.gm.graph.output_node()
        self.env: dict[Node, Any] = dict(start.values) if start else {}
        values = [*inputs, *(passage.leaving for passage in rehearsal.passages(choices))]
        self.env.update(zip(rehearsal.gm.graph.find_nodes(op="placeholder"), values, strict=True))

    def compute(self, targets: Sequence[Node]) -> None:
        """Fill ``env`` for the targets and what they need."""
        needed = self._needed(targets)
        with Autocasts() as self.regions:
            for node in self.rehearsal.gm.graph.nodes:
                if node in needed and node not in self.env:
                    self.env[node] = self._value(node)

    def live_at(self, place: Node) -> dict[Node, Any]:
        """The values computed ahead of a node that it or a later one reads."""
        before: dict[Node, Any] = {}
        for node in self.rehearsal.gm.graph.nodes:
            if node is place:
                break
            if node in self.env and node.op not in ("placeholder", "get_attr"):
                before[node] = self.env[node]
        ahead = before.keys()
        return {node: value for node, value in before.items() if any(user not in ahead for user in node.users)}

    def _choice(self, fuse: Any) -> Choice:
        return self.choices.get(self.entries[fuse].site.id, _NOTHING)

    def _inputs(self, node: Node) -> list[Node]:
        entry = self.entries.get(node)
        if entry is None:
            return node.all_input_nodes
        choice = self._choice(node)
        x, metric, size = node.args[0], entry.metrics[choice.match], node.args[2]
        return [x, size] if choice.r == 0 else [x, metric, size]  # type: ignore[list-item]

    def _needed(self, targets: Sequence[Node]) -> set[Node]:
        needed: set[Node] = set()
        todo = [*targets, *self.rehearsal.effects]
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                if node not in self.env:
                    todo.extend(self._inputs(node))
        return needed

    def _value(self, node: Node) -> Any:
        if node.op == "output":
            return map_arg(node.args[0], self.env.__getitem__)
        if node.op == "get_attr":
            given = self.rehearsal.projections.get(str(node.target))
            return operator.attrgetter(str(node.target))(self.rehearsal.gm) if given is None else given
        if node in self.entries:
            return self._fuse(node)
        if is_region(node):
            return self.regions.visit(node)
        args, kwargs = map_arg((node.args, node.kwargs), self.env.__getitem__)
        if node.target is torch.ops.tofu.rebase.default and args[4] != "prune":  # features follow their tokens
            args = (*args[:4], self._choice(node.args[2].args[0]).strategy)  # type: ignore[union-attr]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _fuse(self, node: Node) -> tuple[Tensor, ...]:
        choice = self._choice(node)
        if choice.r == 0:  # untouched, without the operator's copies
            x, size = (self.env[value] for value in self._inputs(node))
            place = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
            if self.tokens is not None:
                zeros = torch.zeros_like(x, requires_grad=True)
                self.tokens[self.entries[node].site.id] = zeros
                x = x + zeros
            return x, size, place, place
        x, metric, size = (self.env[value] for value in self._inputs(node))
        fused: Callable[..., tuple[Tensor, ...]] = node.target  # type: ignore[assignment]
        ends, cells = node.args[5:7], node.args[7] if len(node.args) > 7 else None
        return fused(x, metric, size, choice.r, choice.strategy, *ends, cells, grouping_of(choice.match))
