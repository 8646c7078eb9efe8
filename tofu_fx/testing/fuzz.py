"""A long random run of the whole compiler against all oracles: `python -m tofu_fx.testing.fuzz --minutes 30 --seed N`.

Each case is a generated transformer or raw graph with options of the backend. It is proved (`tofu_fx.testing.prove`),
then compiled with its options: that must not fail, must give outputs of the same form and the same bits twice, with a
dynamic batch must serve another one too, and if the tokens are exact copies the outputs must be the plain model's. The
run stops at the first failure and makes the case as simple as it can while the same thing fails. A seed gives the same
cases in the same order.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tofu_fx.errors import TofuWarning
from tofu_fx.sites.site import ever_planned
from tofu_fx.testing.compare import relative_error, same_bits, tensors
from tofu_fx.testing.fuzz_cases import Case, Steps, Use, draw, simpler
from tofu_fx.testing.proofs import MEANING_TOLERANCE, PERMUTATION_TOLERANCE, Proofs, prove
from tofu_fx.testing.spec import Spec
from tofu_fx.testing.study import EAGER

__all__ = ["Case", "Run", "Spec", "Steps", "Use", "Verdict", "check", "draw", "main", "search", "shrink"]

_TRIES = 120  # cases tried to simplify a failure, at most: each takes a second


@dataclass(frozen=True)
class Verdict:
    """What came of a case: what failed (its first word says what kind of failure), and what was done to its sites."""

    failure: str = ""
    reduced: int = 0
    declined: int = 0
    copied: bool = False
    message: str = ""

    @property
    def label(self) -> str:
        """The kind of failure: what stays the same while a case is made simpler."""
        return self.failure.split(":")[0]


def check(case: Case) -> Verdict:
    """Hold one case against all oracles."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", TofuWarning)
        model, inputs = case.made()
        plain = model(*inputs)
        try:
            proofs = _proved(case, model, inputs)
            # A class token that is read after the last attention does not see the tokens that went there.
            said = [failure for failure in proofs.failures if not failure.startswith("nothing")]
            failure = said[0] if said else _compiled(case, model, inputs, plain, proofs)
            if failure.startswith(_BY_AMOUNT) and _is_rounding(case, plain):
                return Verdict(message="the outputs are rounding alone, such as the mean of tokens less their mean")
        except Exception as error:  # noqa: BLE001 - whatever it is: it is reported as the failure of this case
            return Verdict(f"crash {type(error).__name__}: {str(error).strip()[:600]}")
    matched = len(proofs.matched)
    return Verdict(
        failure, matched, len(proofs.sites) - matched, matched > 0 and case.duplicates, "; ".join(proofs.messages)
    )


#: failures that say how far outputs are apart, of what is largest among them
_BY_AMOUNT = ("permutation", "meaning", "duplicates")


def _is_rounding(case: Case, plain: Any) -> bool:
    """Whether the model's own outputs are further from those in float64 than any two ways to add up may be apart."""
    model, inputs = case.made()
    if not isinstance(model, torch.nn.Module):
        return False
    wide = model.double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    own, exact = ([value.double() for value in tensors(outputs)] for outputs in (plain, wide))
    return not relative_error(own, exact) <= PERMUTATION_TOLERANCE


def _proved(case: Case, model: Callable[..., Any], inputs: Sequence[Tensor]) -> Proofs:
    options = case.options()
    del options["strategy"], options["proportional_attention"]
    return prove(model, *inputs, r=options.pop("r"), options=options)


def _compiled(case: Case, model: Callable[..., Any], inputs: Sequence[Tensor], plain: Any, proofs: Proofs) -> str:
    """What is wrong with the compiled model, in words; else an empty string."""
    torch._dynamo.reset()
    options = {**EAGER, "inner_backend": case.use.inner_backend, **case.options(_counts(case, proofs))}
    call = torch.compile(model, backend="tofu", options=options)
    outputs = call(*inputs)
    wrong = _form(outputs, plain)
    if wrong:
        return wrong
    if not same_bits(call(*inputs), outputs):
        return "twice: a second call on the same inputs gives other bits"
    if case.duplicates:
        error = relative_error(outputs, plain)
        if not error <= MEANING_TOLERANCE:
            return f"duplicates: merging exact copies changes the outputs by {error:.2g}"
    if case.use.dynamic and case.batch > 1:
        others = case.inputs(case.batch + 2)
        wrong = _form(call(*others), model(*others))
        return f"dynamic batch, {wrong}" if wrong else ""
    return ""


def _counts(case: Case, proofs: Proofs) -> int | tuple[int, ...]:
    """The tokens to remove: of copies that differ after the first block, at its attention only."""
    mixing = isinstance(case.subject, Spec) and case.subject.mixing != "none"
    if not (case.duplicates and mixing and proofs.matched):
        return case.use.r
    # The option lists those too that turn out to be out of reach while the graph is written.
    return tuple(case.use.r if "blocks.0" in site.module_path else 0 for site in ever_planned(proofs.sites))


def _form(outputs: Any, plain: Any) -> str:
    found, wanted = tensors(outputs), tensors(plain)
    if [(t.shape, t.dtype) for t in found] != [(t.shape, t.dtype) for t in wanted]:
        return f"form: {[tuple(t.shape) for t in found]} comes out, not {[tuple(t.shape) for t in wanted]}"
    if any(a.isnan().any() and not b.isnan().any() for a, b in zip(found, wanted, strict=True)):
        return "form: an output holds NaN"
    return ""


def shrink(
    case: Case, verdict: Verdict, judge: Callable[[Case], Verdict] = check, tries: int = _TRIES
) -> tuple[Case, Verdict]:
    """The simplest case that fails in the same way: parts are put back to their defaults, many at once, then each."""
    chunk = 16
    while chunk and tries:
        for candidate in simpler(case, chunk):
            if not tries:
                break
            tries -= 1
            found = judge(candidate)
            if found.label == verdict.label:
                case, verdict = candidate, found
                break  # its parts are others now
        else:
            chunk //= 2
    return case, verdict


@dataclass
class Run:
    """What a run found. ``failure`` is the simplified case, ``first`` the number and the case as it was drawn."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    failure: tuple[Case, Verdict] | None = None
    first: tuple[int, Case] | None = None

    def note(self, case: Case, verdict: Verdict) -> None:
        """Count one case."""
        self.counts["cases"] += 1
        self.counts[case.kind] += 1
        self.counts["reduced" if verdict.reduced else "left alone"] += 1
        self.counts["reduced sites"] += verdict.reduced
        self.counts["declined sites"] += verdict.declined
        self.counts["exact copies merged"] += verdict.copied
        self.counts[f"placement {case.use.placement}"] += 1
        self.counts["dynamic batch"] += case.use.dynamic
        self.counts["unread rows dropped"] += case.use.unread == "drop"

    def __str__(self) -> str:
        shown = ", ".join(f"{name}: {count}" for name, count in self.counts.items())
        lines = [f"seed {self.seed}, {self.seconds / 60:.1f} min, {shown}"]
        if self.failure is None or self.first is None:
            return "\n".join([*lines, "no failure"])
        case, verdict = self.failure
        lines += [
            f"FAILED at case {self.first[0]}: {self.first[1]}",
            f"made simpler: {verdict.failure}",
            "",
            "from tofu_fx.testing.fuzz import Case, Spec, Steps, Use, check",
            "",
            f"print(check({case}).failure)",
        ]
        if isinstance(case.subject, Steps):
            model: Any = case.made()[0]
            lines += ["", *("# " + line for line in model.gm.code.strip().splitlines())]
        return "\n".join(lines)


def search(
    seed: int,
    seconds: float = math.inf,
    cases: int | None = None,
    only: str | None = None,
    judge: Callable[[Case], Verdict] = check,
    say: Callable[[str], None] = lambda line: None,
) -> Run:
    """Try the cases of a seed until the time is over, ``cases`` are done, or one fails, which is then made simpler.

    Args:
        seed: the same seed gives the same cases.
        seconds: time to go on for; the last case is finished, a failure is made simpler whatever that takes.
        cases: how many to try, at most.
        only: "transformers" or "graphs"; None is both.
        judge: holds a case against the oracles.
        say: is told each minute how far the run is.
    """
    run, began, said, number = Run(seed), time.monotonic(), 0, 0
    while time.monotonic() - began < seconds and (cases is None or number < cases):
        case = draw(seed, number, only)
        verdict = judge(case)
        run.note(case, verdict)
        if verdict.failure:
            run.first = (number, case)
            say(f"case {number} failed ({verdict.failure}): making it simpler")
            run.failure = shrink(case, verdict, judge)
            break
        number += 1
        if time.monotonic() - began > 60 * (said + 1):
            said += 1
            say(f"{said} min, {number} cases")
    run.seconds = time.monotonic() - began
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if something failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tofu_fx.testing.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="how long to go on (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same cases (default 0)")
    parser.add_argument("--cases", type=int, help="stop after so many cases")
    parser.add_argument("--only", choices=("graphs", "transformers"), help="leave the other kind out")
    given = parser.parse_args(arguments)
    torch.backends.mha.set_fastpath_enabled(False)
    run = search(given.seed, 60 * given.minutes, given.cases, given.only, say=lambda line: print(line, flush=True))
    print(run)
    return 1 if run.failure else 0


if __name__ == "__main__":
    sys.exit(main())
