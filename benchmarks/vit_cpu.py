"""Speed on CPU: a ViT through plain inductor and through tofu, in one process, interleaved, medians.

    python benchmarks/vit_cpu.py                      # ViT-S/16, 224, batch 8, fp32: about 15 minutes on two cores
    python benchmarks/vit_cpu.py --only plain mlerp   # some of the rows
    python benchmarks/vit_cpu.py --quick              # three layers and few rounds, to see that it runs

Each row is compiled with an empty inductor cache, which gives the cold compile time. Then all rows run in turn, round
after round, so that a machine whose speed drifts drifts for all of them; a row's time is the median over the rounds,
its speed-up the median of its ratios to plain inductor in the same round. Last, a clock says what share of a run is
spent in the token operators, and the compiler's passes are timed for growing depth.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from clock import share_in_operators
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch._inductor.utils import fresh_cache

import tofu_fx

RESULTS = Path(__file__).parent / "results"
#: of the matrices of a calibrated plan that compares tokens by what the output feels ("fisher")
COLUMNS = 64


def rows(r: int, layers: int, tokens: int) -> dict[str, dict[str, Any] | None]:
    """The configurations: plain, each strategy at r per layer, and other schedules that end with as many tokens."""
    last = tokens - r * layers
    every = {3: [r * 3 if i % 3 == 0 else 0 for i in range(layers)]}
    return {
        "plain": None,
        "mlerp": {"r": r, "strategy": "mlerp"},
        "mean": {"r": r, "strategy": "mean"},
        "prune": {"r": r, "strategy": "prune"},
        "auto": {"r": r},
        "mlerp, no proportional attention": {"r": r, "strategy": "mlerp", "proportional_attention": False},
        f"mlerp, {3 * r} in every third layer": {"r": every[3], "strategy": "mlerp"},
        "mlerp, counts in multiples of 8": {"r": multiples(tokens, last, layers, 8), "strategy": "mlerp"},
        f"mlerp, by matrices of {COLUMNS} columns": {"r": r, "strategy": "mlerp", "match": "fisher"},
        "default (ratio 0.5)": {},
    }


def by_matrices(model: torch.nn.Module, x: torch.Tensor, options: dict[str, Any] | None) -> dict[str, Any]:
    """A plan that compares tokens by matrices, random ones here: time does not depend on what is in them."""
    plan = tofu_fx.explain(model, x, options={**(options or {}), "match": "auto"}).plan
    sites = [row.model_copy(update={"match": "fisher"}) for row in plan.sites]
    matrices = {(row.graph, row.id): torch.randn(row.dim, COLUMNS) / row.dim**0.5 for row in sites}
    return {"plan": tofu_fx.Plan(sites=sites).with_matrices(matrices)}


def multiples(tokens: int, last: int, layers: int, of: int) -> list[int]:
    """An even schedule from ``tokens`` to about ``last`` whose counts are multiples of ``of``."""
    counts = [tokens] + [round((tokens + (last - tokens) * i / layers) / of) * of for i in range(1, layers + 1)]
    return [a - b for a, b in itertools.pairwise(counts)]


def compile_cold(model: torch.nn.Module, x: torch.Tensor, options: dict[str, Any] | None) -> tuple[Any, float]:
    """The compiled model and the seconds of its first call, with an empty cache and a model of its own."""
    model = copy.deepcopy(model)
    if options is None:
        compiled = torch.compile(model, backend="inductor")
    else:
        compiled = torch.compile(model, backend="tofu", options={**options, "on_error": "raise"})
    with fresh_cache():
        start = time.perf_counter()
        compiled(x)
        return compiled, time.perf_counter() - start


def pass_seconds(depth: int, batch: int) -> float:
    """Seconds that the compiler's own passes take for a ViT-B of this depth (median of three)."""
    model = timm.create_model("vit_base_patch16_224", depth=depth).eval()
    x = torch.randn(batch, 3, 224, 224)
    times = [sum(tofu_fx.explain(model, x, options={"r": 8}).graphs[0].seconds.values()) for _ in range(3)]
    return statistics.median(times)


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    overrides = {"depth": 3} if args.quick else {}
    model = timm.create_model(args.model, **overrides).eval()
    size = model.default_cfg["input_size"][-1]
    x = torch.randn(args.batch, 3, size, size)
    tokens, layers = model.patch_embed.num_patches + model.num_prefix_tokens, len(model.blocks)
    configurations = {
        k: v for k, v in rows(args.r, layers, tokens).items() if not args.only or k in ["plain", *args.only]
    }
    compiled, found = {}, {}
    for name, options in configurations.items():
        planned = options is not None and options.get("match") == "fisher"
        compiled[name], seconds = compile_cold(model, x, by_matrices(model, x, options) if planned else options)
        console.print(f"compiled {name}: {seconds:.1f} s")
        found[name] = {"options": options, "cold_compile_s": round(seconds, 1)}
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in track(range(args.rounds + 2), description="rounds", console=console):
        for name, run in compiled.items():
            start = time.perf_counter()
            run(x)
            times[name].append(time.perf_counter() - start)
    for name, run in compiled.items():
        ratios = [p / t for p, t in zip(times["plain"][2:], times[name][2:], strict=True)]
        found[name].update(
            median_ms=round(1e3 * statistics.median(times[name][2:]), 1),
            speedup=round(statistics.median(ratios), 3),
            compile_ratio=round(found[name]["cold_compile_s"] / found["plain"]["cold_compile_s"], 2),
            operators_share=round(share_in_operators(partial(run, x)), 4) if name != "plain" else 0.0,
        )
    return {
        "model": args.model,
        "batch": args.batch,
        "image": size,
        "r": args.r,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": platform.processor() or platform.machine(),
        "rows": found,
        "pass_seconds_vit_b": {} if args.quick else {d: round(pass_seconds(d, 2), 3) for d in (6, 12, 24)},
    }


def show(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{result['model']}, batch {result['batch']}, {result['image']} px, r = {result['r']}")
    for column in ("row", "ms", "speed-up", "cold compile s", "of plain's", "in tofu operators"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for name, row in result["rows"].items():
        table.add_row(
            name,
            f"{row['median_ms']:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['cold_compile_s']:.0f}",
            f"{row['compile_ratio']:.2f}x",
            f"{100 * row['operators_share']:.1f} %",
        )
    console.print(table)
    if result["pass_seconds_vit_b"]:
        console.print(f"seconds of the compiler's passes, ViT-B by depth: {result['pass_seconds_vit_b']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--r", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "vit_cpu.json")
    args = parser.parse_args()
    if args.quick:
        args.rounds = min(args.rounds, 3)
    torch._dynamo.config.recompile_limit = 64
    console = Console()
    with torch.no_grad():
        result = measure(args, console)
    show(result, console)
    if not args.quick:
        args.output.parent.mkdir(exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"written to {args.output}")


if __name__ == "__main__":
    main()
