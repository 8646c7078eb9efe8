"""What a walk over a library says of each model: its outcome, what it rests on, and the table of all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_map_only

import tofu_fx
from tofu_fx.testing import Proofs, prove

#: million parameters from which a model is explained and not proved
LARGE = 60


def judge(model: torch.nn.Module, inputs: Mapping[str, Any] | torch.Tensor, millions: float) -> dict[str, Any]:
    """The outcome for one model, and what it rests on; ``inputs``: a tensor, or a call's keywords."""
    args, kwargs = ((inputs,), {}) if isinstance(inputs, torch.Tensor) else ((), dict(inputs))
    options = {"r": 2, "on_error": "raise", "profitable_only": False}
    found = tofu_fx.explain(model, *args, options=options, **kwargs)
    for placement in ("stream", "branch") if found.sites else ():  # no pass may fail in any
        tofu_fx.explain(model, *args, options={**options, "placement": placement}, **kwargs)
    unknown: Counter[str] = Counter()
    for graph in found.graphs:
        unknown.update(graph.unknown_ops)
    row: dict[str, Any] = {
        "outcome": "accelerated" if found.matched else "declined" if found.sites else "plain",
        "graphs": len(found.graphs),
        "matched": found.matched,
        "declined": found.declined,
        "reasons": dict(Counter(plain(site.reason) for site in found.sites if site.reason)),
        "messages": list(dict.fromkeys(plain(graph.outcome) for graph in found.graphs)),
        "unknown_ops": dict(unknown),
        "compiler_seconds": round(sum(sum(graph.seconds.values()) for graph in found.graphs), 2),
        "proofs": "not needed: nothing is rewritten",
    }
    if found.matched and millions > LARGE:
        row["proofs"] = f"left out: more than {LARGE} million parameters"
    elif found.matched:
        proofs = _proved(model, args, kwargs)
        meaning = max(proofs.meaning.values(), default=0.0)
        errors = {"permutation": proofs.permutation, "meaning": meaning, "changed": proofs.changed}
        row["proofs"] = {"identity": proofs.identity, **{key: float(f"{e:.2g}") for key, e in errors.items()}}
        row["undecided"] = proofs.undecided
        # Where the model itself reads nothing of what is reduced (LiLT's last layout layer) nothing can be proved.
        failures = [failure for failure in proofs.failures if not failure.startswith("nothing")]
        if failures:
            row.update(outcome="failed", error="; ".join(failures))
        elif proofs.failures:
            row["proofs"] = proofs.failures[0]
    return row


def _proved(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proofs:
    """The proofs; what does not hold in float32 is tried again in float64, which tells a fault from rounding."""
    proofs = _reduced(model, args, kwargs)
    if not proofs.failures or not proofs.identity:
        return proofs
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, (args, kwargs))
    return _reduced(model.double(), args, kwargs)


def _reduced(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proofs:
    """The proofs with two tokens a site, or one where the last sites of a hierarchy have no two to give."""
    try:
        return prove(model, *args, **kwargs)
    except Exception as error:
        if "arrive there" not in str(error):
            raise
        return prove(model, *args, r=1, **kwargs)


def plain(text: str) -> str:
    """A message without the folders of this machine and without colour."""
    return re.sub(r"\x1b\[[0-9;]*m", "", re.sub(r"/\S*/site-packages/", "", text))


#: the colour of each outcome, in the order of the table
COLOURS = {
    "accelerated": "green",
    "failed": "bold red",
    "out of time": "red",
    "declined": "yellow",
    "plain": "dim",
    "not built": "dim italic",
}


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Print a line for each model and the counts."""
    table = Table(title=title, title_justify="left")
    for name in ("file", "model", "outcome", "matched", "declined", "why not, or what failed"):
        table.add_column(name, justify="right" if name in ("matched", "declined") else "left", overflow="fold")
    for row in sorted(rows, key=lambda row: (list(COLOURS).index(row["outcome"]), row["module"])):
        said = row.get("error") or "; ".join(f"{n} x {reason}" for reason, n in row.get("reasons", {}).items())
        counts = [str(row.get(key, "")) for key in ("matched", "declined")]
        table.add_row(row["module"], row["model"], row["outcome"], *counts, said, style=COLOURS[row["outcome"]])
    console.print(table, markup=False)
    outcomes = Counter(row["outcome"] for row in rows)
    console.print(f"{len(rows)} models: " + ", ".join(f"{outcomes[name]} {name}" for name in COLOURS if outcomes[name]))
    unknown: Counter[str] = Counter()
    for row in rows:
        unknown.update(row.get("unknown_ops", {}))
    console.print("ops without a rule: " + (", ".join(f"{op} {n}" for op, n in unknown.most_common()) or "none"))
