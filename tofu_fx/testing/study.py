"""Trace a model once, rewrite each of its graphs in several ways, and run every variant on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tofu_fx.backend import Outcome, rewrite
from tofu_fx.compilation import Compilation, Lowered, Scheduled
from tofu_fx.errors import Unsupported
from tofu_fx.passes.drop_unread_tokens import drop_unread_tokens
from tofu_fx.pipeline import lower, run_passes, without
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.plan.records import PlanRow
from tofu_fx.sites.site import Placed, Planned, Site
from tofu_fx.testing.axis import Unfit
from tofu_fx.testing.facts import facts_of
from tofu_fx.testing.formulas import Undecided
from tofu_fx.testing.interpreter import Interpreter
from tofu_fx.testing.running import Labels
from tofu_fx.testing.shuffle import Shuffler

#: options under which nothing is compiled, nothing fails in silence, tiny models are reduced too, and a graph of which
#: nothing is reduced keeps its bits
EAGER: dict[str, Any] = {
    "inner_backend": "eager", "on_error": "raise", "profitable_only": False, "unread": "keep",
}  # fmt: skip

#: a variant's options: the same for every graph, or made for each from what the compiler found in it (None: untouched)
Variant = Mapping[str, Any] | Callable[[Scheduled], Mapping[str, Any] | None]
#: the proofs that need no variant: token counts made symbolic and nothing reduced; all tokens shuffled at every site
POLYMORPHIC, SHUFFLED = "polymorphic", "permute"
#: and rows that nobody reads left out, of the graphs that have any
UNREAD = "unread"


def plan_rows(graph: Scheduled, **update: Any) -> list[PlanRow]:
    """The rows of the plan of a graph, changed as told."""
    return [PlanRow.of(site).model_copy(update=update) for site in graph.planned]


def placed(name: str, placement: str) -> str:
    """What a variant is called in a study where it is made for a placement other than the base's."""
    return f"{name}, {placement}" if placement else name


@dataclass
class Study:
    """One model, traced once: for each variant the outcome of each graph, and the outputs of the same call.

    "plain" is the traced graph as Dynamo gave it; with proofs there are "polymorphic", "permute" and "unread" too.
    ``interpreted`` has what the interpreter computed for a variant, ``undecided`` why it could not. Variants of a
    further placement are called `placed(name, placement)`; ``placements`` are those that any graph has, "" the base's
    own. ``graphs`` is how many graphs there were, ``tracing`` the seconds that Dynamo took to make them.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    interpreted: dict[str, Any] = field(default_factory=dict)
    undecided: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    polymorphic: list[Scheduled] = field(default_factory=list)
    narrowed: list[Lowered] = field(default_factory=list)
    placements: list[str] = field(default_factory=lambda: [""])
    graphs: int = 0
    tracing: float = 0.0

    def reducing(self, variant: str) -> list[Planned]:
        """The reduced sites of a variant over all graphs."""
        return [site for compilation in self.compilations(variant) for site in compilation.reducing]

    def sites(self, variant: str) -> list[Site]:
        """All sites of a variant, declined ones too."""
        return [site for compilation in self.compilations(variant) for site in compilation.sites]

    def compilations(self, variant: str) -> list[Compilation]:
        """What the passes made of each graph, where they ran."""
        return [outcome.compilation for outcome in self.outcomes.get(variant, ()) if outcome.compilation is not None]

    def nodes(self, variant: str, *targets: Any) -> list[Node]:
        """The nodes of the rewritten graphs that call one of the targets."""
        graphs = [compilation.gm.graph for compilation in self.compilations(variant)]
        return [node for graph in graphs for node in graph.nodes if not targets or node.target in targets]


def study(
    model: Callable[..., Any],
    *args: Any,
    variants: Mapping[str, Variant],
    proofs: bool = True,
    base: Mapping[str, Any] | None = None,
    interpret: Collection[str] = (),
    everywhere: bool = False,
    **kwargs: Any,
) -> Study:
    """Trace a model once, rewrite it for every variant's options, and run every variant on the same inputs.

    Args:
        model: a module or function; grad and training mode are the caller's.
        args: what it is called with, and ``kwargs``.
        variants: name -> options of the backend (or a function that makes them from a graph's compilation).
        proofs: add "polymorphic" (token counts made symbolic, nothing reduced), "permute" (all tokens shuffled) and
            "unread" (rows that nobody reads left out, nothing reduced).
        base: options under which the compiler looks for what variants are made of (a placement).
        interpret: variants of which the interpreter computes the outputs, too.
        everywhere: make the proofs, and the variants that are functions, for each further placement.
    """
    found = Study()
    runs = _Runs(found, dict(variants), proofs, dict(base or {}), interpret, everywhere)
    torch._dynamo.reset()
    model(*args, **kwargs)  # what a model caches in its first call would be a reason to trace it again in the second
    call = torch.compile(model, backend=runs.backend)
    runs.began = time.perf_counter()
    found.outputs["plain"] = call(*args, **kwargs)
    computed: dict[tuple[int, ...], tuple[Any, str]] = {}

    def outputs_of(name: str) -> tuple[Any, str]:
        """The outputs of a variant, or why there are none; run once for all variants that are the same graphs."""
        same = runs.running_as(name)
        if same not in computed:
            try:
                computed[same] = call(*args, **kwargs), ""
            except (Undecided, Unfit) as reason:
                computed[same] = None, str(reason)
        return computed[same]

    for name in runs.names():
        found.outputs[name], _ = outputs_of(name)
    for name in [placed(name, placement) for placement in found.placements for name in interpret]:
        outputs, reason = outputs_of(f"{name}, interpreted")
        if reason:
            found.undecided[name] = reason
        else:
            found.interpreted[name] = outputs
    return found


@dataclass
class _Traced:
    """One of Dynamo's graphs, which is lowered once for all that is made of it."""

    gm: GraphModule
    inputs: Any
    lowered: Lowered | None
    #: what was made of it: by which options, whether shuffled, the outcome, and how the interpreter runs it
    made: list[_Made] = field(default_factory=list)
    #: what the interpreter found out, by what it depends on
    labels: dict[Any, Labels] = field(default_factory=dict)

    def rewrite(self, options: Options, shuffle: bool = False) -> _Made:
        """What the compiler makes of the graph by these options: once, for two placements may come to one plan."""
        for made in self.made:
            if made.shuffle == shuffle and made.options == options:
                return made
        reducer = Shuffler() if shuffle else None
        outcome = rewrite(self.gm, options, self.inputs, reducer=reducer, lowered=self.lowered)
        self.made.append(_Made(options, shuffle, outcome))
        return self.made[-1]

    def interpreted(self, made: _Made) -> Interpreter:
        """The interpreter of what was made."""
        if made.interpreter is None:
            compilation = made.outcome.compilation
            assert compilation is not None
            assert compilation.before is not None
            facts = facts_of(compilation)
            known = self.labels.setdefault(facts.frame, Labels())
            made.interpreter = Interpreter(compilation.before, facts, known)
        return made.interpreter


@dataclass
class _Made:
    """What the compiler made of a graph."""

    options: Options
    shuffle: bool
    outcome: Outcome
    interpreter: Interpreter | None = None


@dataclass
class _Runs:
    """The backend of a study: every graph in all its variants, of which one is running."""

    found: Study
    variants: dict[str, Variant]
    proofs: bool
    base: dict[str, Any]
    interpret: Collection[str]
    everywhere: bool
    running: str = "plain"
    began: float = 0.0
    #: for each graph, what runs it by the name of the variant
    callables: list[dict[str, Callable[..., Any]]] = field(default_factory=list)

    def running_as(self, name: str) -> tuple[int, ...]:
        """Have a variant run; the same answer for two of them says that the same is run."""
        self.running = name
        return tuple(id(graphs.get(name, graphs["plain"])) for graphs in self.callables)

    def names(self) -> list[str]:
        """The variants of all graphs."""
        proofs = [POLYMORPHIC, SHUFFLED] if self.proofs else []
        names = [*self.variants, *proofs, *([UNREAD] if self.proofs else [])]
        for placement in self.found.placements[1:]:
            names += [placed(name, placement) for name in [*self._functions(), *proofs]]
        return names

    def backend(self, gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        """Rewrite a graph in every way."""
        found = self.found
        found.tracing += time.perf_counter() - self.began
        found.graphs += 1
        graphs: dict[str, Callable[..., Any]] = {"plain": gm}
        self.callables.append(graphs)
        traced = _Traced(gm, inputs, _lowered(gm, inputs))
        if self.proofs:
            narrowed = _narrowed(traced)
            found.narrowed.extend([] if narrowed is None else [narrowed])
            graphs.update({} if narrowed is None else {UNREAD: narrowed.gm})
        compilation = _polymorphic(traced, self.base) if self.proofs or self._functions() else None
        found.polymorphic.extend([] if compilation is None or not self.proofs else [compilation])
        self._rewrite(graphs, traced, self.variants, compilation, "")
        for placement in _further(compilation, self.base) if self.everywhere and compilation else ():
            compilation = _polymorphic(traced, {**self.base, "placement": placement})
            if compilation is None or not any(site.matched for site in compilation.sites):
                continue
            if placement not in found.placements:
                found.placements.append(placement)
            self._rewrite(graphs, traced, self._functions(), compilation, placement)
        self.began = time.perf_counter()
        return lambda *inputs: graphs.get(self.running, gm)(*inputs)

    def _functions(self) -> dict[str, Variant]:
        return {name: variant for name, variant in self.variants.items() if callable(variant)}

    def _rewrite(
        self,
        graphs: dict[str, Callable[..., Any]],
        traced: _Traced,
        variants: Mapping[str, Variant],
        compilation: Scheduled | None,
        placement: str,
    ) -> None:
        for name, variant in variants.items():
            chosen = variant(compilation) if callable(variant) and compilation is not None else variant
            if callable(chosen):  # a graph that cannot be rewritten says so under any options
                chosen = {"r": 1}
            if chosen is None:
                continue
            made = traced.rewrite(Options.parse({**EAGER, **chosen}))
            self._note(graphs, placed(name, placement), made.outcome)
            if name in self.interpret and placed(name, placement) in graphs:
                graphs[f"{placed(name, placement)}, interpreted"] = traced.interpreted(made)
        if self.proofs and compilation is not None:
            graphs[placed(POLYMORPHIC, placement)] = compilation.gm
            rows = plan_rows(compilation, strategy="prune", r=0)
            unread = {key: self.base[key] for key in ("unread",) if key in self.base}
            if rows:  # a plan without any names no placement
                shuffled = Options.parse({**EAGER, **unread, "plan": Plan(sites=rows)})
                self._note(graphs, placed(SHUFFLED, placement), traced.rewrite(shuffled, shuffle=True).outcome)

    def _note(self, graphs: dict[str, Callable[..., Any]], name: str, outcome: Outcome) -> None:
        self.found.outcomes.setdefault(name, []).append(outcome)
        if outcome.compilation is not None and outcome.compilation.reducing:
            graphs[name] = outcome.compilation.gm


def _further(compilation: Scheduled, base: Mapping[str, Any]) -> list[str]:
    """The placements that a user may ask for and that are not what the automatic one chose."""
    if base.get("placement", "auto") != "auto":
        return []
    chosen = {site.placement if isinstance(site, Placed) else "" for site in compilation.sites}
    # Where it chose no branch it is the stream; sites that have no place on the stream may have one in their branch.
    return [*(["stream"] if "branch" in chosen else []), *(["branch"] if chosen and chosen != {"branch"} else [])]


def _lowered(gm: GraphModule, inputs: Any) -> Lowered | None:
    """What all variants have in common; None where the graph cannot be rewritten at all, as each of them then says."""
    try:
        return lower(gm, inputs)
    except Unsupported:
        return None


def _narrowed(traced: _Traced) -> Lowered | None:
    """The graph without rows that nobody reads; None where there are none, or it cannot be rewritten at all."""
    if traced.lowered is None:
        return None
    options = Options.parse({**EAGER, "unread": "drop"})
    graph: Lowered = run_passes([drop_unread_tokens], traced.gm, options, traced.inputs, lowered=traced.lowered)
    return graph if graph.unread else None


def _polymorphic(traced: _Traced, base: Mapping[str, Any]) -> Scheduled | None:
    """The graph with its token counts made symbolic and nothing reduced; None where it cannot be rewritten at all."""
    if traced.lowered is None:
        return None
    options = Options.parse({**EAGER, **base, "r": 1})
    try:
        passes, lowered = without("insert_reductions"), traced.lowered
        graph: Scheduled = run_passes(passes, traced.gm, options, traced.inputs, lowered=lowered)
        return graph
    except Unsupported:
        return None
