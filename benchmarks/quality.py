"""Quality at a cost: calibrated plans against the schedules that need no calibration, on three trained models.

    python benchmarks/quality.py saliency --seed 0    # DINOv2 saliency on photographs: about 25 minutes on two cores
    python benchmarks/quality.py search               # the same model: 500 random plans at two costs, 30 minutes
    python benchmarks/quality.py cifar --seed 0       # CIFAR-10 classifier of examples/train_cifar.py: 40 minutes
    python benchmarks/quality.py sentences --seed 0   # a sentence encoder (`sentence_model.py`): ten minutes
    python benchmarks/quality.py times                # how long calibration itself takes: ten minutes
    python benchmarks/quality.py show                 # print what is in the results file

Plans are calibrated on some inputs and measured on others, at shares of the plain model's operations (head included).
The schedules that they are compared with remove the same number of tokens in each layer, as many as the share needs:
the paper's depth rule (prune in the first half, MLERP after), MLERP, the mean and prune everywhere; and the peers of
`peers.py` at the counts of the uniform schedules, as if what they compare tokens with cost no more. Each part writes
its own section of the results file; the models' one for each seed, which draws the inputs to calibrate with,
and the means over the seeds are shown with their standard errors.

The weights, photographs and pictures are not part of the repository; the examples say where they are looked for.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import sentence_model
import torch
from peers import PEERS, merging
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import tofu_fx
from tofu_fx.calibration.batches import read_batches
from tofu_fx.calibration.cost import CostModel, share_of_operations
from tofu_fx.calibration.output_error import METRICS
from tofu_fx.calibration.rehearsal import Choice, Choices
from tofu_fx.calibration.trial import Trial
from tofu_fx.calibration.uniform import UNIFORM, plan_of, uniform, uniform_plans
from tofu_fx.plan.options import Options
from tofu_fx.plan.words import Match

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
BUDGETS = (0.75, 0.6, 0.5)
BATCH = 16
MATCHES = tuple(kind for kind in get_args(Match) if kind != "sketch")  # a stream's sites have no sketch to choose
CALIBRATED = "calibrated"


def example(name: str) -> Any:
    """A module of examples/."""
    if str(ROOT / "examples") not in sys.path:
        sys.path.append(str(ROOT / "examples"))
    return __import__(name)


def mean_absolute(outputs: Tensor, plain: Tensor) -> Tensor:
    """Mean absolute error of each map against the plain model's, ``[B]``."""
    return (outputs - plain).abs().flatten(1).mean(1)


def outputs_of(model: nn.Module, inputs: Tensor, plan: tofu_fx.Plan | None) -> Tensor:
    """All outputs, plain or reduced, eagerly."""
    call: Callable[..., Tensor] = model
    if plan is not None:
        torch._dynamo.reset()
        options = {"plan": plan, "inner_backend": "eager", "on_error": "raise"}
        call = torch.compile(model, backend="tofu", options=options, dynamic=False)
    missing = -len(inputs) % BATCH  # one shape, so that one graph is made
    padded = torch.cat([inputs, inputs[:missing]])
    return torch.cat([call(part) for part in padded.split(BATCH)])[: len(inputs)]


def peers_at(
    backbone: nn.Module, model: nn.Module, inputs: Tensor, plans: dict[tuple[str, float], tofu_fx.Plan]
) -> Iterator[tuple[str, float, Tensor]]:
    """Outputs of the model with each peer's merging at the counts of each uniform schedule."""
    for (schedule, budget), plan in plans.items():
        if schedule != "uniform mean":
            continue
        counts = [row.r for row in plan.sites]
        for name, grouping in PEERS.items():
            with merging(backbone, grouping, counts):
                yield name, budget, torch.cat([model(part) for part in inputs.split(BATCH)])


def plans_at(
    model: nn.Module, inputs: Tensor, budgets: Sequence[float], metric: Any, console: Console
) -> dict[tuple[str, float], tofu_fx.Plan]:
    """The calibrated plan and the uniform ones for each budget."""
    plans = uniform_plans(model, inputs, budgets)
    for budget in budgets:
        plan = tofu_fx.calibrate(model, inputs, flops=budget, metric=metric, inner_backend="eager", batch_size=BATCH)
        console.print(plan.table())
        plans[CALIBRATED, budget] = plan
    return plans


def facts(plans: dict[tuple[str, float], tofu_fx.Plan], budgets: Sequence[float]) -> dict[str, Any]:
    """What the calibrated plans say of themselves."""
    found: dict[str, Any] = {"plans": {}, "calibration": {}}
    for budget in budgets:
        plan = plans[CALIBRATED, budget]
        assert plan.calibration is not None
        found["plans"][str(budget)] = [[row.strategy, row.match, row.r] for row in plan.sites]
        wanted = {"predicted", "measured", "seconds", "samples", "policy", "threshold", "notes", "forward_passes"}
        found["calibration"][str(budget)] = plan.calibration.model_dump(include=wanted, exclude_none=True)
    rows = plans[CALIBRATED, budgets[0]].sites
    found["linearity"] = [row.linearity.mean if row.linearity else None for row in rows]
    found["pair_linearity"] = [row.pair_linearity.mean if row.pair_linearity else None for row in rows]
    return found


def saliency_inputs(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """The saliency model, 48 photographs to calibrate with, and the others. Seed 0 takes every fifth, others draw."""
    files = example("saliency_model")
    photos = files.normalise(files.load_photos())
    chosen = torch.arange(0, len(photos), 5)[:48]
    if seed:
        chosen = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed))[:48]
    others = torch.ones(len(photos), dtype=torch.bool).index_fill_(0, chosen, False)
    return files.load_model(), photos[chosen], photos[others]


def saliency(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    model, calibration, others = saliency_inputs(args.seed)
    others = others[: args.limit]
    plans = plans_at(model, calibration, args.budgets, mean_absolute, console)
    plain = outputs_of(model, others, None)
    found = [(name, budget, outputs_of(model, others, plan)) for (name, budget), plan in plans.items()]
    rows = []
    for name, budget, maps in [*found, *peers_at(model.backbone, model, others, plans)]:
        off = (maps - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        rows.append(
            {
                "schedule": name,
                "flops": budget,
                "error": round(mean_absolute(maps, plain).mean().item(), 5),
                "relative_l2": round(off.mean().item(), 5),
            }
        )
    return {"photographs": len(others), "calibrated_on": len(calibration), "rows": rows, **facts(plans, args.budgets)}


def cifar(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    files = example("cifar_model")
    model = files.load_model()
    pictures, labels = files.load_cifar("test", min(args.limit, 5000))
    others, _ = files.load_cifar("train", 48 * (args.seed + 1))
    others = others[-48:]
    plans = plans_at(model, files.prepare(others), args.budgets, None, console)
    inputs = files.prepare(pictures)
    scores = outputs_of(model, inputs, None)
    plain = scores.argmax(1)
    right = round(100 * (plain == labels).double().mean().item(), 2)
    rows: list[dict[str, Any]] = [{"schedule": "plain", "flops": 1.0, "top1": right, "kl": 0.0}]
    found = [(name, budget, outputs_of(model, inputs, plan)) for (name, budget), plan in plans.items()]
    for name, budget, outputs in [*found, *peers_at(model.backbone, model, inputs, plans)]:
        classes = outputs.argmax(1)
        rows.append(
            {
                "schedule": name,
                "flops": budget,
                "kl": round(METRICS["kl"](outputs, scores).mean().item(), 5),
                "top1": round(100 * (classes == labels).double().mean().item(), 2),
                "same_as_plain": round(100 * (classes == plain).double().mean().item(), 2),
            }
        )
    return {"pictures": len(labels), "rows": rows, **facts(plans, args.budgets)}


def off_course(outputs: Tensor, plain: Tensor) -> Tensor:
    """One less the cosine of each embedding with the plain model's, ``[B]``."""
    return (1 - (outputs * plain).sum(1)).clamp(min=0)  # rounding may take it below


def neighbours(embeddings: Tensor) -> Tensor:
    """The nearest other one of each, ``[B]``."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)


def sentences(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    texts = sentence_model.load_sentences(1000 + 48 * (args.seed + 1))
    model, inputs = sentence_model.load_model(), sentence_model.encode(texts)
    inputs, calibration = inputs[: min(args.limit, 1000)], inputs[-48:]
    plans = plans_at(model, calibration, args.budgets, off_course, console)
    plain = outputs_of(model, inputs, None)
    rows = []
    for (name, budget), plan in plans.items():
        outputs = outputs_of(model, inputs, plan)
        same = (neighbours(outputs) == neighbours(plain)).double().mean().item()
        cosine = 1 - off_course(outputs, plain).mean().item()
        rows.append(
            {"schedule": name, "flops": budget, "cosine": round(cosine, 5), "same_neighbour": round(100 * same, 2)}
        )
    return {"sentences": len(inputs), "rows": rows, **facts(plans, args.budgets)}


def random_choices(trial: Trial, share: Callable[[Choices], float], budget: float, rng: random.Random) -> Choices:
    """A plan of random tokens and kinds whose cost is within the budget and near it."""
    steepness, match = rng.choice([0.5, 1.0, 2.0]), rng.choice([*MATCHES, "mixed"])
    strategy = rng.choice(["mlerp", "mlerp", "mlerp", "mixed"])
    weights = {site.id: rng.random() ** steepness for site in trial.sites}
    matches = {s.id: rng.choice(MATCHES) if match == "mixed" else match for s in trial.sites}
    strategies = {s.id: rng.choice(["prune", "mlerp"]) if strategy == "mixed" else strategy for s in trial.sites}

    def scaled(scale: float) -> Choices:
        choices = {}
        for members in trial.streams():
            count = members[0].tokens
            for site in members:
                r = min(int(scale * weights[site.id]), site.cap(count))
                choices[site.id] = Choice(strategies[site.id], matches[site.id], r)
                count -= r
        return choices

    low, high = 0.0, 2000.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if share(scaled(middle)) > budget else (low, middle)
    return scaled(high)


def search(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """How good random plans get: measured on some of the calibration photographs, the best one also on the others."""
    model, calibration, others = saliency_inputs()
    some, others = calibration[:: max(1, len(calibration) // BATCH)][:BATCH], others[: args.limit]
    plain_others = outputs_of(model, others, None)
    (batch,) = read_batches(some, BATCH)
    found: dict[str, Any] = {}
    with Trial(model, Options()) as trial:
        plain = trial.plain(batch)
        models = [CostModel.of(rehearsal) for rehearsal in trial.rehearsals]
        share = partial(share_of_operations, models)

        def error(choices: Choices) -> float:
            return mean_absolute(trial.reduced(batch, choices), plain).mean().item()

        best: dict[float, tuple[float, Choices]] = {}
        for budget in args.budgets[1:] or args.budgets:
            rng = random.Random(args.seed)
            tried = []
            for _ in track(range(args.plans), f"random plans at {budget}", console=console):
                choices = random_choices(trial, share, budget, rng)
                tried.append((error(choices), share(choices), choices))
            least = min(tried, key=lambda item: item[0])
            best[budget] = least[0], least[2]
            uniforms = {}
            for name, kind_of in UNIFORM.items():
                choices = uniform(trial, share, budget, kind_of)
                if choices is not None:
                    uniforms[name] = round(error(choices), 5)
            errors = sorted(item[0] for item in tried)
            found[str(budget)] = {
                "plans": len(tried),
                "best": round(errors[0], 5),
                "median": round(errors[len(errors) // 2], 5),
                "uniform": uniforms,
                "best_plan": [[c.strategy, c.match, c.r] for c in least[2].values()],
                "all": [[round(e, 5), round(f, 4)] for e, f, _ in tried],
            }
        chosen = {budget: plan_of(trial, choices) for budget, (_, choices) in best.items()}
    for budget, plan in chosen.items():
        maps = outputs_of(model, others, plan)
        found[str(budget)]["best_on_others"] = round(mean_absolute(maps, plain_others).mean().item(), 5)
    return {"photographs": len(some), "others": len(others), "seed": args.seed, "budgets": found}


def times(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """How long calibration takes, compiling included, and how that grows with inputs and sites."""
    timm, found = __import__("timm"), {}
    for samples, depth in ((48, 12), (24, 12), (48, 6)):
        model = timm.create_model("vit_small_patch16_224", depth=depth).eval()
        inputs = torch.randn(samples, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with torch._inductor.utils.fresh_cache():
            plan = tofu_fx.calibrate(model, inputs, flops=0.6)
        assert plan.calibration is not None
        measured = plan.calibration.measured
        found[f"{samples} inputs, {depth} sites"] = {
            "seconds": plan.calibration.seconds, "forward_passes": plan.calibration.forward_passes,
            "speedup": measured.speedup, "flops": measured.flops,
        }  # fmt: skip
        console.print(found, highlight=False)
    return {"model": "vit_small_patch16_224", "times": found}


def over_seeds(values: Sequence[float]) -> str:
    """Their mean and, of several, its standard error."""
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) < 2 else f"{mean} ±{statistics.stdev(values) / len(values) ** 0.5:.1g}"


def show(results: dict[str, Any], console: Console) -> None:
    columns = (
        ("saliency", "error", "map error"),
        ("cifar", "kl", "KL"),
        ("cifar", "top1", "top-1 %"),
        ("sentences", "cosine", "cosine"),
        ("sentences", "same_neighbour", "sentences whose nearest one is the same, %"),
    )
    for part, column, unit in columns:
        seeds = list(results.get(part, {}).get("seeds", {}).values())
        rows = [row for seed in seeds for row in seed["rows"]]
        if not rows:
            continue
        title = f"{part}: {unit} at shares of the plain model's FLOPs, {len(seeds)} seeds"
        table = Table(title=title, title_justify="left")
        budgets = sorted({row["flops"] for row in rows}, reverse=True)
        table.add_column("schedule")
        for budget in budgets:
            table.add_column(f"{budget:g}", justify="right")
        for name in dict.fromkeys(row["schedule"] for row in rows):
            cells = {
                b: [r[column] for r in rows if (r["schedule"], r["flops"]) == (name, b) and column in r]
                for b in budgets
            }
            table.add_row(name, *(over_seeds(cells[b]) if cells[b] else "" for b in budgets))
        console.print(table)
        for name in ("linearity", "pair_linearity"):
            console.print(f"{name}: {' '.join(f'{value:.2f}' for value in seeds[0][name])}", highlight=False)
    for name, row in results.get("times", {}).get("times", {}).items():
        console.print(f"calibration of ViT-S/16, {name}: {row['seconds']:.0f} s", highlight=False)
    for budget, found in results.get("search", {}).get("budgets", {}).items():
        console.print(
            f"{found['plans']} random plans at {budget}: best {found['best']}, median {found['median']}; uniform "
            f"{found['uniform']}; the best on other photographs {found.get('best_on_others')}",
            highlight=False,
        )


SEEDED = ("saliency", "cifar", "sentences")
PARTS = {"saliency": saliency, "search": search, "cifar": cifar, "sentences": sentences, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "show"])
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="shares of the operations")
    parser.add_argument("--limit", type=int, default=2000, help="photographs or pictures to measure on, at most")
    parser.add_argument("--plans", type=int, default=500, help="random plans at each budget")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration inputs, and of the random plans")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    console = Console()
    results = json.loads(args.output.read_text()) if args.output.is_file() else {}
    if args.part != "show":
        start = time.perf_counter()
        with torch.no_grad():
            found = PARTS[args.part](args, console)
        found.update(
            seconds=round(time.perf_counter() - start), torch=torch.__version__, threads=torch.get_num_threads()
        )
        if args.part in SEEDED:
            results.setdefault(args.part, {}).setdefault("seeds", {})[str(args.seed)] = found
        else:
            results[args.part] = found
        args.output.parent.mkdir(exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    show(results, console)


if __name__ == "__main__":
    main()
