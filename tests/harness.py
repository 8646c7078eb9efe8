"""Compile a model in several ways from one Dynamo trace, and compare what comes out.

The three proofs of a rewrite, for any model:
- identity: a graph made polymorphic in its tokens, with no reduction in it, gives the same bits;
- permutation: tokens shuffled at every site lose nothing, so outputs agree to rounding unless something that is indexed
  by token was left behind;
- meaning: a reduced model equals a reference written independently (`tests/eager_reference.py`, `tests/zoo/blocks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from tofu_fx.backend import Outcome, rewrite
from tofu_fx.compilation import Compilation
from tofu_fx.options import Options
from tofu_fx.pipeline import run_pipeline
from tofu_fx.planning.plan import Plan, PlanRow

EAGER: dict[str, Any] = {"inner_backend": "eager", "on_error": "raise"}

# A shuffle changes the order of the additions over tokens (attention, pooling) and nothing else. A sum of n float32
# terms carries at most n/2 * eps = n * 6e-8 of its largest partial sum; with n <= 600 tokens and a handful of layers
# that is some 1e-5 in the worst case and 1e-6 as measured. What stays behind shows as 1e-3 and more (GRAPHS.md).
PERMUTATION_TOLERANCE = 1e-5
# The reference does the same float32 operations in another order of additions (matmul and softmax written out, means
# as sums): a few hundred terms x 6e-8, stretched by a few layers and norms.
MEANING_TOLERANCE = 2e-5


def compiled(model: Any, **options: Any) -> Any:
    """The model through the backend, lowered to eager, failing aloud."""
    torch._dynamo.reset()
    return torch.compile(model, backend="tofu", options={**EAGER, **options})


def tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors of any output structure, in order."""
    return [value for value in tree_flatten(outputs)[0] if isinstance(value, torch.Tensor)]


def relative_error(outputs: Any, expected: Any) -> float:
    """Largest difference of any output, relative to that output's largest magnitude. NaN where either has one."""
    worst = 0.0
    for a, b in zip(tensors(outputs), tensors(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.is_floating_point() and a.numel():
            error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
            worst = error if error != error else max(worst, error)
    return worst


def same_bits(outputs: Any, expected: Any) -> bool:
    """Whether all output tensors have the same dtypes and the same values (NaN equals NaN)."""
    pairs = zip(tensors(outputs), tensors(expected), strict=True)
    return all(a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in pairs)


def plan_rows(compilation: Compilation, **update: Any) -> list[PlanRow]:
    """The rows of the plan of a compilation, changed as told."""
    return [PlanRow.of(site).model_copy(update=update) for site in compilation.sites if site.matched]


def permutation_plan(compilation: Compilation) -> Plan:
    """A plan that permutes the tokens at every site instead of reducing them."""
    return Plan(sites=plan_rows(compilation, strategy="permute", r=0))


@dataclass
class Study:
    """One model, traced once: for each variant the outcome of each graph, and the outputs of the same call.

    "plain" is the traced graph as Dynamo gave it; with proofs there are "polymorphic" and "permute" too.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    polymorphic: list[Compilation] = field(default_factory=list)

    def reducing(self, variant: str) -> list[Any]:
        """The reduced sites of a variant over all graphs."""
        compilations = [outcome.compilation for outcome in self.outcomes[variant]]
        return [site for compilation in compilations if compilation is not None for site in compilation.reducing]

    def sites(self, variant: str) -> list[Any]:
        """All sites of a variant, declined ones too."""
        compilations = [outcome.compilation for outcome in self.outcomes[variant]]
        return [site for compilation in compilations if compilation is not None for site in compilation.sites]

    def nodes(self, variant: str, *targets: Any) -> list[torch.fx.Node]:
        """The nodes of the rewritten graphs that call one of the targets."""
        graphs = [outcome.compilation.gm.graph for outcome in self.outcomes[variant] if outcome.compilation]
        return [node for graph in graphs for node in graph.nodes if not targets or node.target in targets]


def study(
    model: Callable[..., Any],
    *args: Any,
    variants: Mapping[str, Mapping[str, Any]],
    proofs: bool = True,
    **kwargs: Any,
) -> Study:
    """Trace a model once, rewrite it for every variant's options, and run every variant on the same inputs."""
    found = Study()
    chosen = {"name": "plain"}

    def backend(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs = {"plain": gm}
        for name, options in variants.items():
            graphs[name] = _note(found, name, gm, inputs, Options.parse({**EAGER, **options}))
        if proofs:
            compilation = run_pipeline(gm, Options.parse({**EAGER, "r": 1}), inputs, skip=("insert_reductions",))
            found.polymorphic.append(compilation)
            graphs["polymorphic"] = compilation.gm
            plan = permutation_plan(compilation)
            graphs["permute"] = _note(found, "permute", gm, inputs, Options.parse({**EAGER, "plan": plan}))
        return lambda *inputs: graphs[chosen["name"]](*inputs)

    torch._dynamo.reset()
    model(*args, **kwargs)  # what a model caches in its first call would be a reason to trace it again in the second
    call = torch.compile(model, backend=backend)
    for name in ["plain", *variants, *(["polymorphic", "permute"] if proofs else [])]:
        chosen["name"] = name
        found.outputs[name] = call(*args, **kwargs)
    return found


def _note(found: Study, name: str, gm: GraphModule, inputs: Any, options: Options) -> GraphModule:
    outcome = rewrite(gm, options, inputs)
    found.outcomes.setdefault(name, []).append(outcome)
    reduced = outcome.compilation is not None and bool(outcome.compilation.reducing)
    return outcome.compilation.gm if reduced else gm  # type: ignore[union-attr]


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a value that the outputs depend on: no zero heads, no 1e-5 LayerScale, no zero biases.

    Vectors that scale are near 1, vectors that shift near 0; matrices keep the variance of what they multiply.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator).to(parameter)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() <= 1:
                scales = name.endswith("weight") or "gamma" in name or "lambda" in name or "scale" in name
                parameter.copy_(normal(parameter) * 0.1 + (1.0 if scales else 0.0))
            elif any(part in name for part in ("token", "pos_embed", "position", "latent", "probe", "bias_table")):
                parameter.copy_(normal(parameter) * 0.5)
            else:
                parameter.copy_(normal(parameter) * parameter[0].numel() ** -0.5)
    return model.eval()
