"""Dense outputs and diffusion: what merged tokens cost a denoiser and a saliency map, and what they save.

    python benchmarks/dense.py denoiser     # quality on the denoiser of examples/, against tomesd: about 20 minutes
    python benchmarks/dense.py timesteps    # one plan for all timesteps, or one for each: about 15 minutes
    python benchmarks/dense.py placement    # stream against branches on the saliency ViT: about 10 minutes
    python benchmarks/dense.py speed        # against plain inductor and tomesd, both compiled: about 15 minutes
    python benchmarks/dense.py speed --device cuda --shapes sd15_gpu sdxl_gpu sd3_gpu flux_gpu

(times on two CPU cores). Each part writes its own entry of results/dense.json. tomesd 0.1.3 is the peer: it patches
the blocks of diffusers' models; give it by `pip install tomesd`, and peft is not needed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clock import share_in_operators
from dense_shapes import SHAPES
from dense_timesteps import timesteps
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tofu_fx
from tofu_fx.calibration.timing import compile_variant, device_name, room_for_variants, time_calls

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "dense.json"
sys.path.insert(0, str(ROOT / "examples"))

RATIOS = (0.3, 0.5, 0.6)
STRATEGIES = ("prune", "mean", "mlerp", "auto")
EAGER = {"inner_backend": "eager", "on_error": "raise", "profitable_only": False}


def patched(model: nn.Module, unet: Callable[[nn.Module], Any], **options: Any) -> nn.Module:
    """A copy of a model with tomesd in its blocks."""
    import tomesd

    model = copy.deepcopy(model)
    tomesd.apply_patch(unet(model), **options)
    return model


# ---- quality of a denoiser -------------------------------------------------------------------------------------------


def denoiser(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Rise of the held-out loss, and distance of generated pictures from the plain model's, at the same seeds."""
    import diffusion_model as example

    model = example.load_model()
    pictures, labels = example.load_pictures("cifar", "test", args.pictures)
    chosen = torch.arange(args.generated) % 10
    features = _features()

    def measure(call: Callable[..., Tensor]) -> tuple[float, Tensor]:
        loss = example.denoising_loss(call, pictures, labels, torch.Generator().manual_seed(0))
        return loss, example.sample(call, chosen, steps=args.steps, seed=0)

    plain_loss, plain = measure(model)
    rows = [{"row": "plain", "loss": round(plain_loss, 5)}]

    def add(name: str, ratio: float, call: Callable[..., Tensor]) -> None:
        loss, made = measure(call)
        error = ((made - plain) ** 2).mean(dim=(1, 2, 3))
        rows.append(
            {
                "row": name,
                "ratio": ratio,
                "loss": round(loss, 5),
                "rise": round(loss / plain_loss - 1, 5),
                "rmse": round(float(error.sqrt().mean()), 5),
                "psnr": round(float((10 * torch.log10(4 / error)).mean()), 2),
                "features": round(float(1 - torch.cosine_similarity(features(made), features(plain)).mean()), 5),
            }
        )
        console.print(rows[-1])

    for ratio in args.ratios:
        add("tomesd", ratio, patched(model, lambda m: m.unet, ratio=ratio, max_downsample=1, use_rand=False))
        add("tomesd, random", ratio, patched(model, lambda m: m.unet, ratio=ratio, max_downsample=1, use_rand=True))
        variants: dict[str, dict[str, Any]] = {f"tofu, {s}": {"strategy": s} for s in STRATEGIES}
        if ratio == 0.5:
            variants |= {
                "tofu, no log(size)": {"proportional_attention": False},
                "tofu, by keys": {"match": "keys"},
                "tofu, by queries and keys": {"match": "queries_keys"},
                "tofu, one match for each resolution": {"reuse": "resolution"},
                "tofu, another seed": {"seed": 1},
                "tofu, and the MLP": {"branches": ["attention", "mlp"]},
                "tofu, and cross-attention": {"branches": ["attention", "cross"]},
                "tofu, on the stream": {"placement": "stream"},
            }
        for name, options in variants.items():
            torch._dynamo.reset()
            add(name, ratio, torch.compile(model, backend="tofu", options={**EAGER, "ratio": ratio, **options}))
    return {"pictures": args.pictures, "generated": args.generated, "steps": args.steps, "rows": rows}


def _features() -> Callable[[Tensor], Tensor]:
    """Pictures from -1 to 1 -> what a DINOv2 ViT-S makes of them, ``[n, C]``: two pictures of one thing are near."""
    from saliency_model import load_model, normalise

    backbone: Any = load_model().backbone

    def of(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            large = torch.nn.functional.interpolate((pictures + 1) / 2, size=224, mode="bilinear", antialias=True)
            return backbone.forward_features(normalise(large)).mean(dim=1)

    return of


# ---- stream against branches -----------------------------------------------------------------------------------------


def placement(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Error of the saliency map and share of the FLOPs, tokens reduced on the stream or in the branches."""
    from saliency_model import load_model, load_photos, normalise

    model = load_model()
    photos = normalise(load_photos(every=5, limit=args.photographs))
    with torch.no_grad():
        plain = torch.cat([model(part) for part in photos.split(8)])
    both = {"branches": ["attention", "mlp"]}
    variants: dict[str, dict[str, Any]] = {
        **{f"stream, r = {r}": {"placement": "stream", "r": r, "strategy": "mlerp"} for r in (4, 8, 12)},
        **{f"attention, ratio {q}": {"placement": "branch", "ratio": q} for q in (0.25, 0.5, 0.75)},
        "attention, ratio 0.5, whole features": {"placement": "branch", "ratio": 0.5, "match": "features"},
        **{f"attention and MLP, ratio {q}": {"placement": "branch", "ratio": q, **both} for q in (0.2, 0.3, 0.5)},
        "automatic, r = 8": {"r": 8, "strategy": "mlerp"},
    }
    rows = []
    for name, options in variants.items():
        share = tofu_fx.explain(model, photos[:8], options={**EAGER, **options})
        torch._dynamo.reset()
        call = torch.compile(model, backend="tofu", options={**EAGER, **options})
        with torch.no_grad():
            made = torch.cat([call(part) for part in photos.split(8)])
        rows.append(
            {
                "row": name,
                "flops": round(share.flops_after / share.flops_before, 4),
                "placement": share.plan.sites[0].placement,
                "error": round(float((made - plain).abs().mean()), 5),
            }
        )
        console.print(rows[-1])
    timed = {name: variants[name] for name in ("stream, r = 8", "attention, ratio 0.5", "attention and MLP, ratio 0.2")}
    with torch.no_grad(), room_for_variants():
        calls = {"plain": partial(compile_variant(model, None, "inductor"), photos[:8])}
        for name, options in timed.items():
            calls[name] = partial(compile_variant(model, options, "inductor"), photos[:8])
        for call in calls.values():
            call()
        for name, time_of in time_calls(calls, torch.device("cpu"), rounds=args.rounds).items():
            for row in rows:
                if row["row"] == name:
                    row["speedup"] = round(time_of.speedup, 3)
    return {"photographs": len(photos), "rows": rows}


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Blocks of real shapes through plain inductor, tofu and tomesd, in turns."""
    device = torch.device(args.device)
    found = {}
    for name in args.shapes:
        shape = SHAPES[name]
        model, inputs = shape.make()
        model, inputs = _moved(model, device, shape.dtype), _moved(inputs, device, shape.dtype)
        ways: dict[str, Any] = {
            "plain": model,
            "tofu": {"ratio": args.ratio},
            "tofu, prune": {"ratio": args.ratio, "strategy": "prune"},
            "tofu, all branches": {"ratio": args.ratio, "branches": ["attention", "mlp", "cross"]},
            "tofu, reuse": {"ratio": args.ratio, "reuse": "resolution"},
        }
        if shape.tomesd:
            ways["tomesd"] = patched(model, shape.patched, ratio=args.ratio, max_downsample=2, use_rand=False)
        ways = {way: chosen for way, chosen in ways.items() if not args.ways or way in args.ways}
        calls, rows = {}, {}
        with torch.no_grad(), room_for_variants():
            for way, chosen in ways.items():
                if isinstance(chosen, dict):
                    compiled = compile_variant(model, {**chosen, "placement": "branch"}, "inductor")
                else:
                    compiled = torch.compile(chosen, backend="inductor", dynamic=False)
                calls[way] = partial(_call, compiled, inputs)
                start = time.perf_counter()
                calls[way]()
                rows[way] = {"compile_s": round(time.perf_counter() - start, 1)}
            for way, time_of in time_calls(calls, device, rounds=args.rounds, warmup=2).items():
                rows[way] |= {"ms": round(1e3 * time_of.seconds, 2), "speedup": round(time_of.speedup, 3)}
                if way.startswith("tofu") and device.type == "cpu":
                    rows[way]["operators_share"] = round(share_in_operators(calls[way], 3), 4)
                console.print(name, way, rows[way])
        found[name] = {"what": shape.what, "rows": rows}
        torch._dynamo.reset()
    return {"device": device_name(device), "torch": torch.__version__, "ratio": args.ratio, "shapes": found}


def _call(compiled: Any, inputs: dict[str, Any]) -> Any:
    return compiled(**inputs)


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _moved(part, device, dtype) for key, part in value.items()}
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return value.to(device, dtype) if isinstance(value, nn.Module) else value


# ---- tables ----------------------------------------------------------------------------------------------------------


def show(results: dict[str, Any], console: Console) -> None:
    """The tables of what is in the results file."""
    for part, entry in results.items():
        groups = {part: entry["rows"]} if "rows" in entry else {}
        for name, shape in entry.get("shapes", {}).items():
            groups[f"{name}: {shape['what']}"] = [{"row": way, **row} for way, row in shape["rows"].items()]
        for title, rows in groups.items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            table = Table(*columns, title=title, title_justify="left")
            for row in rows:
                table.add_row(*(str(row.get(column, "")) for column in columns))
            console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("denoiser", "timesteps", "placement", "speed", "show"))
    parser.add_argument("--pictures", type=int, default=48, help="held-out pictures for the loss")
    parser.add_argument("--generated", type=int, default=20, help="pictures that are generated")
    parser.add_argument("--steps", type=int, default=15, help="steps of DDIM")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--ratio", type=float, default=0.5, help="of the tokens, for speed")
    parser.add_argument("--flops", type=float, default=0.92, help="share of the operations, for timesteps")
    parser.add_argument("--photographs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", default=[], help="some of the rows of speed; 'plain' must be the first")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["sd15", "dit_1024", "dit_4096"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    console = Console(width=max(Console().width, 120))
    results = json.loads(args.output.read_text()) if args.output.is_file() else {}
    if args.part != "show":
        part = {"denoiser": denoiser, "timesteps": timesteps, "placement": placement, "speed": speed}[args.part]
        name = args.part if args.device == "cpu" else f"{args.part}_{args.device}"
        results[name] = {**part(args, console), "threads": torch.get_num_threads()}
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    show(results, console)


if __name__ == "__main__":
    main()
