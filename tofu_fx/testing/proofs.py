"""The proofs that a model is rewritten right. They need no trained weights and no reference written by hand.

Identity: with no token removed, the rewritten graph gives the bits of the untouched one.

Permutation: with the tokens shuffled at every site, the outputs agree to rounding. Whatever is indexed by token and was
left behind (a table, a bias, a mask, a slice) shows as 1e-3 and more.

Meaning: with tokens reduced at all sites, by every strategy, the outputs are those of an interpreter that shares no
code with the compiler: it runs the untouched graph at full length and gives each token what its group becomes, by the
formulas of the papers (``tofu_fx.testing.interpreter``).

All three hold in every placement that a user can get: the one that the options give, and where that is the automatic
one, those that can be asked for and differ from what it chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tofu_fx.compilation import Compilation, Scheduled
from tofu_fx.plan.counts import walk
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.sites.site import Site
from tofu_fx.testing.compare import relative_error, same_bits, tensors
from tofu_fx.testing.study import EAGER, POLYMORPHIC, SHUFFLED, UNREAD, Study, Variant, placed, plan_rows, study

# A shuffle changes the order of the additions over tokens (attention, pooling) and nothing else. A sum of n float32
# terms carries at most n/2 * eps = n * 6e-8 of its largest partial sum; with n <= 600 tokens and a handful of layers
# that is some 1e-5 in the worst case and 1e-6 as measured. What stays behind shows as 1e-3 and more.
PERMUTATION_TOLERANCE = 1e-5
# The interpreter does the same float32 operations in another order of additions (sums over copies instead of products
# with sizes): a few hundred terms x 6e-8, stretched by a few layers and norms.
MEANING_TOLERANCE = 2e-5

STRATEGIES = ("prune", "mean", "mlerp")


@dataclass
class Proofs:
    """What was found of one model. Errors are relative to the largest magnitude of each output.

    ``meaning`` has for "strategy" and, where placements beside the options' own were proved, for "strategy, placement"
    the difference from the interpreter; ``undecided`` those that could not be compared, and why: a decision too close
    to rounding, or something that the interpreter cannot follow. ``changed`` is by how much the reduction of all sites
    changes the outputs: 0 would mean that nothing was proved. ``sites`` are all attentions; ``messages`` what the
    compiler says of each graph, ``unknown_ops`` the ops that it has no rule for, ``seconds`` the time of its passes
    (each at its first run on a graph) and ``tracing`` Dynamo's own. ``compilations`` are the graphs with all sites
    reduced.
    """

    identity: bool
    permutation: float
    meaning: dict[str, float]
    changed: float
    sites: list[Site]
    messages: list[str]
    unread: float = 0.0
    left_out: list[str] = field(default_factory=list)
    undecided: dict[str, str] = field(default_factory=dict)
    unknown_ops: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    tracing: float = 0.0
    complaints: list[str] = field(default_factory=list)
    compilations: list[Compilation] = field(default_factory=list, repr=False)

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
        if not self.unread <= PERMUTATION_TOLERANCE:
            found.append(f"unread: without rows that nobody reads the outputs differ by {self.unread:.2g}")
        if not self.permutation <= PERMUTATION_TOLERANCE:
            found.append(f"permutation: shuffled tokens change the outputs by {self.permutation:.2g}")
        for name, error in self.meaning.items():
            if not error <= MEANING_TOLERANCE:
                found.append(f"meaning: {name} differs by {error:.2g} from what the interpreter computes")
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
    strategies: Sequence[str] = STRATEGIES,
    **kwargs: Any,
) -> Proofs:
    """Prove that ``backend="tofu"`` rewrites a model right, on one call of it.

    The model should be in eval mode (random dropout proves nothing), in float32 or wider, and its parameters such that
    outputs depend on them (`tofu_fx.testing.randomise`). Runs eagerly, under ``no_grad``.

    Args:
        model: a module or function that returns tensors in any structure.
        args: what it is called with, and ``kwargs``.
        r: tokens to take away at each site.
        options: further options of the backend ("match", "proportional_attention", ...). With a "placement" only that
            one is proved.
        strategies: what is done with the tokens; "mlerp" must be among them.

    Raises:
        PassError: a pass fails on this model.
        ValueError: other strategies.
    """
    if not {"mlerp"} <= set(strategies) <= set(STRATEGIES):
        raise ValueError(f'strategies: expected "mlerp" and others of {STRATEGIES}, got {tuple(strategies)}')
    variants: dict[str, Variant] = {strategy: reducing(r, options, strategy) for strategy in strategies}
    with torch.no_grad():
        found = study(
            model, *args, variants=variants, base=_base(options), interpret=strategies, everywhere=True, **kwargs
        )
    plain, reduced = found.outputs["plain"], found.outputs["mlerp"]
    complaints = _complaints(found, strategies, plain)
    # Of fewer rows a product is another kernel, which adds up in another order.
    exact = (options or {}).get("unread", EAGER["unread"]) == "keep"
    same = same_bits if exact else lambda outputs, plain: relative_error(outputs, plain) <= PERMUTATION_TOLERANCE
    return Proofs(
        identity=all(same(found.outputs[placed(POLYMORPHIC, p)], plain) for p in found.placements),
        permutation=max(relative_error(found.outputs[placed(SHUFFLED, p)], plain) for p in found.placements),
        meaning={} if complaints else meaning_errors(found),
        undecided=dict(found.undecided),
        changed=0.0 if complaints else relative_error(reduced, plain),
        unread=relative_error(found.outputs[UNREAD], plain),
        left_out=[str(place) for graph in found.narrowed for place in graph.unread],
        sites=found.sites("mlerp"),
        messages=[outcome.message for outcome in found.outcomes.get("mlerp", ())],
        unknown_ops={op: n for c in found.polymorphic for op, n in c.axes.unknown_ops.items()},
        seconds=_seconds(found),
        tracing=found.tracing,
        complaints=complaints,
        compilations=found.compilations("mlerp"),
    )


def _seconds(found: Study) -> float:
    """The time of the passes, each at its first run on a graph.

    Up to insert_reductions they ran for the proof of identity, and what the second run does has been done once: a
    compilation would find neither the fake values nor anything else warm.
    """
    rewritten = [c.seconds for c in found.compilations("mlerp")]
    first = [c.seconds for c in found.polymorphic] if len(found.polymorphic) == len(rewritten) else rewritten
    behind = ("insert_reductions", "verify")
    return sum(
        seconds if name in behind else early[name]
        for late, early in zip(rewritten, first, strict=True)
        for name, seconds in late.items()
    )


def meaning_errors(found: Study) -> dict[str, float]:
    """How far each interpreted variant of a study is from the interpreter."""
    return {name: relative_error(found.outputs[name], expected) for name, expected in found.interpreted.items()}


# What a plan's rows say, or follows from them, and what the graph is before any of them.
_PLACING = ("placement", "branches", "cell", "grid", "max_downsample", "unread")


def _base(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (options or {}).items() if key in _PLACING}


def reducing(r: int, options: Mapping[str, Any] | None, strategy: str) -> Variant:
    """The options under which every site of a graph takes away ``r`` tokens, or as many as it can, by one strategy."""
    planned = ("match", "strategy", "placement", "branches", "cell")
    kept = {key: value for key, value in (options or {}).items() if key not in planned}
    match = Options.parse(options).match
    decided: dict[str, Any] = {"strategy": strategy, **({} if match == "auto" else {"match": match})}

    def variant(compilation: Scheduled) -> dict[str, Any]:
        rows = plan_rows(compilation, **decided)
        if not rows:  # a plan without rows names no placement, and by another one sites may be found
            return {**(options or {}), "r": r}
        counted = walk(compilation.planned, lambda site, count: min(r, site.cap(count)))
        rows = [row.model_copy(update={"r": passage.removed}) for row, (_, passage) in zip(rows, counted, strict=True)]
        return {**kept, "plan": Plan(sites=rows)}

    return variant


def _complaints(found: Study, strategies: Sequence[str], plain: Any) -> list[str]:
    """What is wrong with the reduced outputs by their form alone."""
    return [
        f"{said} ({name})"
        for placement in found.placements
        for name in (placed(strategy, placement) for strategy in strategies)
        for said in _form(found.outputs[name], plain)
    ]


def _form(reduced: Any, plain: Any) -> list[str]:
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
