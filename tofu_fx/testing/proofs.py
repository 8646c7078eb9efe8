"""The proofs that a model is rewritten right. They need no trained weights and no reference written by hand.

Identity: with no token removed, the rewritten graph gives the bits of the untouched one.

Permutation: with the tokens shuffled at every site, the outputs agree to rounding. Whatever is indexed by token and was
left behind (a table, a bias, a mask, a slice) shows as 1e-3 and more.

Meaning: a reduced stream is worth what it stands for. At each site in turn, merging r tokens must give what comes out
if the merged token is written over every member of its group and *all* tokens are kept. The graph behind the site then
runs at full length with no sizes, no log(size) in the attention and no weighted pooling, so these are held against a
computation that does without them. Sites before the one in question are reduced in both, so that together the steps
prove the whole plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tofu_fx.compilation import Compilation
from tofu_fx.options import Options
from tofu_fx.planning.counts import walk
from tofu_fx.planning.plan import Plan
from tofu_fx.planning.site import Site
from tofu_fx.testing.compare import relative_error, same_bits, tensors
from tofu_fx.testing.study import Study, Variant, plan_rows, study

# A shuffle changes the order of the additions over tokens (attention, pooling) and nothing else. A sum of n float32
# terms carries at most n/2 * eps = n * 6e-8 of its largest partial sum; with n <= 600 tokens and a handful of layers
# that is some 1e-5 in the worst case and 1e-6 as measured. What stays behind shows as 1e-3 and more.
PERMUTATION_TOLERANCE = 1e-5
# The reference does the same float32 operations in another order of additions (sums over copies instead of products
# with sizes): a few hundred terms x 6e-8, stretched by a few layers and norms.
MEANING_TOLERANCE = 2e-5


@dataclass
class Proofs:
    """What was found of one model. Errors are relative to the largest magnitude of each output.

    ``changed`` is by how much the reduction of all sites changes the outputs: 0 would mean that nothing was proved.
    ``meaning`` has one error for each step, in the order of the sites. ``sites`` are all attentions; ``messages`` what
    the compiler says of each graph, ``unknown_ops`` the ops that it has no rule for, ``seconds`` the time of its passes
    (each at its first run on a graph) and ``tracing`` Dynamo's own. ``compilations`` are the graphs with all sites
    reduced.
    """

    identity: bool
    permutation: float
    meaning: list[float]
    changed: float
    sites: list[Site]
    messages: list[str]
    unknown_ops: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    tracing: float = 0.0
    complaints: list[str] = field(default_factory=list)
    compilations: list[Compilation] = field(default_factory=list)

    @property
    def matched(self) -> list[Site]:
        """The sites at which tokens can be reduced."""
        return [site for site in self.sites if site.matched]

    @property
    def failures(self) -> list[str]:
        """What does not hold, in words; empty for a model that is rewritten right."""
        found = list(self.complaints)
        if not self.identity:
            found.append("identity: with no token removed the bits differ")
        if not self.permutation <= PERMUTATION_TOLERANCE:
            found.append(f"permutation: shuffled tokens change the outputs by {self.permutation:.2g}")
        for step, error in enumerate(self.meaning):
            if not error <= MEANING_TOLERANCE:
                found.append(f"meaning: the reduction at site {step + 1} differs by {error:.2g} from merged copies")
        if self.matched and not self.changed > 0:
            found.append("nothing: the reductions change no output, so nothing was proved")
        return found

    def check(self) -> Proofs:
        """Raise AssertionError where a proof fails; else return self."""
        assert not self.failures, "; ".join(self.failures)
        return self


def prove(
    model: Callable[..., Any],
    *args: Any,
    r: int = 2,
    options: Mapping[str, Any] | None = None,
    steps: int = 4,
    **kwargs: Any,
) -> Proofs:
    """Prove that ``backend="tofu"`` rewrites a model right, on one call of it.

    The model should be in eval mode (random dropout proves nothing), in float32 or wider, and its parameters such that
    outputs depend on them (`tofu_fx.testing.randomise`). Runs eagerly, under ``no_grad``.

    Args:
        model: a module or function that returns tensors in any structure.
        args: what it is called with, and ``kwargs``.
        r: tokens to merge at each site.
        options: further options of the backend ("match", "proportional_attention", ...).
        steps: sites at which the meaning is proved, at most; the first ones and the last.

    Raises:
        PassError: a pass fails on this model.
    """
    variants = {"reduced": _variant(r, options, None, "mlerp", steps), **meaning_variants(r, steps, options)}
    with torch.no_grad():
        found = study(model, *args, variants=variants, base=_base(options), **kwargs)
    plain, reduced = found.outputs["plain"], found.outputs["reduced"]
    complaints = _complaints(reduced, plain)
    return Proofs(
        identity=same_bits(found.outputs["polymorphic"], plain),
        permutation=relative_error(found.outputs["permute"], plain),
        meaning=meaning_errors(found),
        changed=0.0 if complaints else relative_error(reduced, plain),
        sites=found.sites("reduced"),
        messages=[outcome.message for outcome in found.outcomes.get("reduced", ())],
        unknown_ops={op: n for c in found.polymorphic for op, n in c.traced.unknown_ops.items()},
        seconds=_seconds(found),
        tracing=found.tracing,
        complaints=complaints,
        compilations=found.compilations("reduced"),
    )


def _seconds(found: Study) -> float:
    """The time of the passes, each at its first run on a graph.

    Up to insert_reductions they ran for the proof of identity, and what the second run does has been done once: a
    compilation would find neither the fake values nor anything else warm.
    """
    rewritten = [c.seconds for c in found.compilations("reduced")]
    first = [c.seconds for c in found.polymorphic] if len(found.polymorphic) == len(rewritten) else rewritten
    behind = ("insert_reductions", "verify")
    return sum(
        seconds if name in behind else early[name]
        for late, early in zip(rewritten, first, strict=True)
        for name, seconds in late.items()
    )


def meaning_variants(r: int = 2, steps: int = 4, options: Mapping[str, Any] | None = None) -> dict[str, Variant]:
    """The variants of a study that `meaning_errors` compares: two for each of ``steps`` sites at most."""
    kinds = (("merged", "mlerp"), ("copied", "duplicate"))
    return {
        f"{name} {step}": _variant(r, options, step, strategy, steps)
        for step in range(steps)
        for name, strategy in kinds
    }


def meaning_errors(found: Study) -> list[float]:
    """The relative error of each step of the proof of meaning."""
    steps = sum(name.startswith("merged ") for name in found.outputs)
    count = max((len(_steps(len(plan_rows(c)), steps)) for c in found.polymorphic), default=0)
    return [relative_error(found.outputs[f"merged {i}"], found.outputs[f"copied {i}"]) for i in range(count)]


_PLACING = ("placement", "branches", "cell", "grid", "max_downsample")  # what a plan's rows say, or follows from them


def _base(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (options or {}).items() if key in _PLACING}


def _variant(r: int, options: Mapping[str, Any] | None, step: int | None, strategy: str, steps: int) -> Variant:
    """Sites up to the step's are merged, the step's own by the strategy, the others left alone; without a step, all."""
    kept = {
        key: value
        for key, value in (options or {}).items()
        if key not in ("match", "strategy", "placement", "branches", "cell")
    }
    match = Options.parse(options).match
    merged: dict[str, Any] = {"r": r, "strategy": "mlerp", **({} if match == "auto" else {"match": match})}

    def variant(compilation: Compilation) -> dict[str, Any] | None:
        rows = plan_rows(compilation, **merged)
        if not rows:  # a plan without rows names no placement, and by another one sites may be found
            return {**(options or {}), "r": r} if step is None else None
        if step is not None:
            chosen = _steps(len(rows), steps)
            if step >= len(chosen):
                return None
            last = chosen[step]
            rows = [row.model_copy(update={"r": r if i <= last else 0}) for i, row in enumerate(rows)]
            rows[last] = rows[last].model_copy(update={"strategy": strategy})
        matched = [site for site in compilation.sites if site.matched]
        wanted = {site.id: row.r for row, site in zip(rows, matched, strict=True)}
        counted = walk(matched, lambda site, count: min(wanted[site.id], site.cap(count)))
        rows = [row.model_copy(update={"r": passage.removed}) for row, (_, passage) in zip(rows, counted, strict=True)]
        return {**kept, "plan": Plan(sites=rows)}

    return variant


def _steps(sites: int, most: int) -> list[int]:
    """The sites at which the meaning is proved: the first ones and the last; of one, the first.

    Behind the last site often only protected tokens are read, which proves little.
    """
    return list(range(sites)) if sites <= most else [*range(max(most - 1, 1)), sites - 1][:most]


def _complaints(reduced: Any, plain: Any) -> list[str]:
    """What is wrong with the reduced outputs by their form alone."""
    found, wanted = tensors(reduced), tensors(plain)
    if len(found) != len(wanted):
        return [f"form: {len(found)} tensors come out, not {len(wanted)}"]
    said = []
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            said.append(f"form: output {i} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}")
        elif a.is_floating_point() and a.isnan().any() and not b.isnan().any():
            said.append(f"form: output {i} holds NaN")
    return said
