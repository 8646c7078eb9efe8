"""Every model of the catalogue through the compiler: what it makes of each, and the proofs. Writes docs/models.md.

    python benchmarks/models.py                 # about a quarter of an hour on two cores
    python benchmarks/models.py --only swin     # models whose name holds a word; the others keep their rows
    python benchmarks/models.py --render        # write docs/models.md again from the results file

Models are small and have random weights (tests/zoo). Of each: identity (no token removed: the same bits), permutation
(tokens shuffled at every site: the same outputs), meaning (merged tokens are worth what they stand for), and the whole
backend, lowered by aot_eager, at ratio 0.5.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tofu_fx  # noqa: E402
from tests.zoo import CATALOGUE, Case  # noqa: E402
from tofu_fx.axes.rules.table import RULES  # noqa: E402
from tofu_fx.testing import Proofs, prove, relative_error, tensors  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"
OPTIONS = {"ratio": 0.5, "on_error": "raise", "profitable_only": False}


def examine(case: Case) -> dict[str, Any]:
    """The row of one model."""
    model = case.model()
    args, kwargs = case.inputs()
    start = time.perf_counter()
    proofs = prove(model, *args, **kwargs)
    seconds = time.perf_counter() - start
    explained = tofu_fx.explain(model, *args, options=OPTIONS, **kwargs)
    flops = explained.flops_after / explained.flops_before if explained.flops_before else 1.0
    return {
        "sites": len(proofs.matched),
        "declined": dict(Counter(_reason(str(site.decline)) for site in proofs.sites if not site.matched)),
        "tokens": [explained.tokens_before, explained.tokens_after],
        "flops": round(flops, 3),
        "said": sorted({message for message in proofs.messages if "nothing" in message})[:1],
        "proofs": _proofs(proofs),
        "backend": _backend(model, args, kwargs),
        "unknown_ops": proofs.unknown_ops,
        "passes": round(proofs.seconds, 3),
        "tracing": round(proofs.tracing, 3),
        "seconds": round(seconds, 1),
    }


def _proofs(proofs: Proofs) -> dict[str, Any]:
    return {
        "identity": proofs.identity,
        "permutation": float(f"{proofs.permutation:.2g}"),
        "meaning": float(f"{max(proofs.meaning.values(), default=0.0):.2g}"),
        "failures": proofs.failures,
    }


def _backend(model: torch.nn.Module, args: Any, kwargs: Any) -> str:
    """Compile and run; empty, or what is wrong with the outputs."""
    torch._dynamo.reset()
    with torch.no_grad():
        plain = model(*args, **kwargs)
        call = torch.compile(model, backend="tofu", options={**OPTIONS, "inner_backend": "aot_eager"})
        found = call(*args, **kwargs)
    relative_error(found, plain)  # shapes and dtypes
    for a, b in zip(tensors(found), tensors(plain), strict=True):
        if a.is_floating_point() and a.isnan().any() and not b.isnan().any():
            return "NaN"
    return ""


def _reason(reason: str) -> str:
    """A reason without its source line."""
    return re.sub(r" \((/|<|timm/|transformers/)[^)]*\)$", "", reason)


def outcome(row: dict[str, Any]) -> str:
    """One word for what became of a model."""
    if "error" in row or row["proofs"]["failures"] or row["backend"]:
        return "failed"
    if row["sites"]:
        return "accelerated"
    return "declined" if row["declined"] or "no attention" not in " ".join(row["said"]) else "plain"


def render(rows: dict[str, dict[str, Any]], walk: dict[str, Any], families: dict[str, Any]) -> str:
    """The page: the catalogue, and the walks over timm's files and transformers' families."""
    counts = Counter(outcome(row) for row in rows.values())
    lines = [
        "# Models",
        "",
        "Made by `python benchmarks/models.py`; do not edit. Small dims, random weights, one call on CPU, float32.",
        "",
        f"**{len(rows)} models: {counts['accelerated']} accelerated, {counts['declined']} declined with a reason, "
        f"{counts['plain']} without attention, {counts['failed']} failed.**",
        "",
        "*Sites* are the attentions at which tokens go, of all. *Tokens* and *FLOPs* (a share of the plain model's) "
        "are those of ratio 0.5; tiny models have large heads: real ones gain more. *Identity*: with no token removed "
        "the rewritten graph gives the same bits. *Permutation*: largest relative error with the tokens shuffled at "
        "every site. *Meaning*: largest relative error between merged tokens and copies of them over all members.",
        "",
        "| model | sites | tokens | FLOPs | identity | permutation | meaning | left alone, and why |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(_line(name, row))
    return "\n".join([*lines, *_walked(walk), *_families(families), *_costs(rows, walk)]) + "\n"


def _costs(rows: dict[str, dict[str, Any]], walk: dict[str, Any]) -> list[str]:
    """The section on the rules, and on the time of the passes."""
    unknown: Counter[str] = Counter()  # op -> occurrences
    for row in [*rows.values(), *(walk["rows"] if walk else ())]:
        unknown.update(row.get("unknown_ops") or {})
    files = sorted((ROOT / "tofu_fx" / "axes" / "rules").glob("*.py"))
    length = sum(len(file.read_text().splitlines()) for file in files)
    ran = [row for row in rows.values() if "error" not in row]
    ratios = sorted(row["passes"] / row["tracing"] for row in ran if row["sites"])
    passes, tracing = sum(row["passes"] for row in ran), sum(row["tracing"] for row in ran)
    return [
        "",
        "## Rules and time",
        "",
        f"The rule table has {len(RULES)} entries in {length} lines of tofu_fx/axes/rules; "
        "elementwise ops come from PyTorch's own tags. Ops met here that carried tokens and have no rule (each is a "
        "place where tokens must be whole): "
        + (", ".join(f"`{op}` ({n})" for op, n in unknown.items()) or "none")
        + ".",
        "",
        f"The passes took {passes:.0f} s in all, Dynamo's own tracing {tracing:.0f} s. For the {len(ratios)} models "
        f"with sites the median ratio is {ratios[len(ratios) // 2]:.2f}; it is under a quarter for "
        f"{sum(ratio < 0.25 for ratio in ratios)}. Token counts are known numbers here. Where they are inputs of the "
        "graph, so that layers share kernels (inductor on CPU), fake values of symbolic shapes take longer: 2.4 to 2.9 "
        "times Dynamo's time for ViT-Ti at 224 px. (Compiling with inductor takes many times either.)",
    ]


def _line(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {name} | | | | | | | **failed: {row['error']}** |"
    proofs, declined = row["proofs"], row["declined"]
    count = sum(declined.values())
    why = "; ".join(f"{reason} ({n})" if n > 1 else reason for reason, n in declined.items())
    why = why or "; ".join(message.removeprefix("nothing was accelerated: ") for message in row["said"])
    if proofs["failures"] or row["backend"]:
        why = f"**{'; '.join([*proofs['failures'], row['backend']])}** {why}"
    if not row["sites"]:
        return f"| {name} | 0 of {count} | | | {_yes(proofs['identity'])} | | | {why} |"
    tokens = " → ".join(map(str, row["tokens"]))
    return (
        f"| {name} | {row['sites']} of {row['sites'] + count} | {tokens} | {row['flops']:.2f} | "
        f"{_yes(proofs['identity'])} | {proofs['permutation']:.0e} | {proofs['meaning']:.0e} | {why} |"
    )


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _walked(walk: dict[str, Any]) -> list[str]:
    """The section on timm's registry."""
    if not walk:
        return []
    rows = walk["rows"]
    counts = Counter(row["outcome"] for row in rows)
    lines = [
        "",
        "## timm's whole registry",
        "",
        f"The smallest model of each of timm's {len(rows)} model files (`python benchmarks/timm_walk.py`, timm "
        f"{walk['timm']}), full size, random weights: {counts['accelerated']} accelerated, {counts['declined']} "
        f"declined, {counts['plain']} without attention, {counts['failed']} failed.",
        "",
        "| file | model | outcome | sites | why not |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["outcome"] != "plain":
            sites = f"{row.get('matched', 0)} of {row.get('matched', 0) + row.get('declined', 0)}"
            why = row.get("error") or "; ".join(dict.fromkeys(_reason(reason) for reason in row["reasons"]))
            lines.append(f"| {row['module']} | {row['model']} | {row['outcome']} | {sites} | {why} |")
    return lines


def _families(walk: dict[str, Any]) -> list[str]:
    """The section on transformers' families: the accelerated ones by name, of the others the commonest reasons."""
    if not walk:
        return []
    counts = Counter(row["outcome"] for row in walk["rows"])
    why: Counter[str] = Counter()
    for row in walk["rows"]:
        if row["outcome"] == "declined":
            why.update({_reason(reason) for reason in row["reasons"]})
    lines = [
        "",
        "## transformers' families",
        "",
        f"A small model with random weights for each of {len(walk['rows'])} classes of configs "
        f"(`python benchmarks/transformers_walk.py`, transformers {walk['transformers']}): {counts['accelerated']} "
        f"accelerated, {counts['declined']} declined, {counts['plain']} without attention, {counts['failed']} failed. "
        f"Of the other {counts['not built'] + counts['out of time']} no small model that runs on inputs of the usual "
        "names was found, which says nothing of the compiler. Most that are declined are decoders:",
        "",
        *(f"- {count} families: {reason}" for reason, count in why.most_common(8)),
        "",
        "| family | model | sites | undecided |",
        "|---|---|---|---|",
    ]
    for row in walk["rows"]:
        if row["outcome"] == "accelerated":
            undecided = "; ".join(dict.fromkeys(row.get("undecided", {}).values()))
            sites = f"{row['matched']} of {row['matched'] + row['declined']}"
            lines.append(f"| {row['module']} | {row['model']} | {sites} | {undecided} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="words, one of which a model's name must hold")
    parser.add_argument("--render", action="store_true", help="run nothing, write the page only")
    args = parser.parse_args()
    console = Console()
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}
    rows = {name: known[name] for name in CATALOGUE if name in known}
    names = [name for name in CATALOGUE if not args.only or any(word in name for word in args.only)]
    torch.set_grad_enabled(False)
    for name in [] if args.render else track(names, "models", console=console):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rows[name] = examine(CATALOGUE[name])
            except Exception as error:  # noqa: BLE001 - a row says what failed
                traceback.print_exc()
                rows[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        if outcome(rows[name]) == "failed":
            console.print(f"{name}: {rows[name].get('error') or rows[name]['proofs']['failures']}", highlight=False)
        torch._dynamo.reset()
        gc.collect()
    rows = {name: rows[name] for name in CATALOGUE if name in rows}
    result = {"torch": torch.__version__, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    walks = [RESULTS.with_name(f"{name}_walk.json") for name in ("timm", "transformers")]
    PAGE.write_text(render(rows, *(json.loads(path.read_text()) if path.is_file() else {} for path in walks)))
    console.print(dict(Counter(outcome(row) for row in rows.values())))


if __name__ == "__main__":
    main()
