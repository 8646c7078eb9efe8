"""Trace a model once, rewrite each of its graphs in several ways, and run every variant on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tofu_fx.backend import Outcome, rewrite
from tofu_fx.compilation import Compilation
from tofu_fx.errors import Unsupported
from tofu_fx.options import Options
from tofu_fx.pipeline import run_pipeline
from tofu_fx.planning.plan import Plan, PlanRow
from tofu_fx.planning.site import Site

#: options under which nothing is compiled, nothing fails in silence, and tiny models are reduced too
EAGER: dict[str, Any] = {"inner_backend": "eager", "on_error": "raise", "profitable_only": False}

#: a variant's options: the same for every graph, or made for each from what the compiler found in it (None: untouched)
Variant = Mapping[str, Any] | Callable[[Compilation], Mapping[str, Any] | None]


def plan_rows(compilation: Compilation, **update: Any) -> list[PlanRow]:
    """The rows of the plan of a compilation, changed as told."""
    return [PlanRow.of(site).model_copy(update=update) for site in compilation.sites if site.matched]


def permutation_plan(compilation: Compilation) -> Plan:
    """A plan that permutes the tokens at every site instead of reducing them."""
    return Plan(sites=plan_rows(compilation, strategy="permute", r=0))


@dataclass
class Study:
    """One model, traced once: for each variant the outcome of each graph, and the outputs of the same call.

    "plain" is the traced graph as Dynamo gave it; with proofs there are "polymorphic" and "permute" too. ``graphs`` is
    how many there were, ``tracing`` the seconds that Dynamo took to make them.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    polymorphic: list[Compilation] = field(default_factory=list)
    graphs: int = 0
    tracing: float = 0.0

    def reducing(self, variant: str) -> list[Site]:
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
    **kwargs: Any,
) -> Study:
    """Trace a model once, rewrite it for every variant's options, and run every variant on the same inputs.

    Args:
        model: a module or function; grad and training mode are the caller's.
        args: what it is called with, and ``kwargs``.
        variants: name -> options of the backend (or a function that makes them from a graph's compilation).
        proofs: add "polymorphic" (token counts made symbolic, nothing reduced) and "permute" (all tokens shuffled).
        base: options under which the compiler looks for what variants are made of (a placement).
    """
    found = Study()
    running = {"name": "plain"}
    began = time.perf_counter()

    def backend(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        nonlocal began
        found.tracing += time.perf_counter() - began
        found.graphs += 1
        graphs = {"plain": gm}
        wanted: dict[str, Variant] = dict(variants)
        some = proofs or any(map(callable, variants.values()))
        compilation = _polymorphic(gm, inputs, base or {}) if some else None
        if proofs:
            wanted["permute"] = _permuted
            graphs["polymorphic"] = gm if compilation is None else compilation.gm
            found.polymorphic.extend([] if compilation is None else [compilation])
        for name, variant in wanted.items():
            chosen = variant(compilation) if callable(variant) and compilation is not None else variant
            if callable(chosen):  # a graph that cannot be rewritten says so under any options
                chosen = {"r": 1}
            if chosen is None:
                graphs[name] = gm
            else:
                graphs[name] = _note(found, name, gm, inputs, Options.parse({**EAGER, **chosen}))
        began = time.perf_counter()
        return lambda *inputs: graphs[running["name"]](*inputs)

    torch._dynamo.reset()
    model(*args, **kwargs)  # what a model caches in its first call would be a reason to trace it again in the second
    call = torch.compile(model, backend=backend)
    began = time.perf_counter()
    for name in ["plain", *variants, *(["polymorphic", "permute"] if proofs else [])]:
        running["name"] = name
        found.outputs[name] = call(*args, **kwargs)
    return found


def _permuted(compilation: Compilation) -> dict[str, Any] | None:
    plan = permutation_plan(compilation)
    return {"plan": plan} if plan.sites else None  # a plan without rows names no placement


def _polymorphic(gm: GraphModule, inputs: Any, base: Mapping[str, Any]) -> Compilation | None:
    """The graph with its token counts made symbolic and nothing reduced; None where it cannot be rewritten at all."""
    try:
        return run_pipeline(gm, Options.parse({**EAGER, **base, "r": 1}), inputs, skip=("insert_reductions",))
    except Unsupported:
        return None


def _note(found: Study, name: str, gm: GraphModule, inputs: Any, options: Options) -> GraphModule:
    outcome = rewrite(gm, options, inputs)
    found.outcomes.setdefault(name, []).append(outcome)
    reduced = outcome.compilation is not None and bool(outcome.compilation.reducing)
    return outcome.compilation.gm if reduced else gm  # type: ignore[union-attr]
