"""What it saves not to compute tokens that nobody reads: operations and time, with and without reductions, on CPU.

    python benchmarks/unread_tokens.py                       # about 20 minutes on two cores
    python benchmarks/unread_tokens.py --only "ViT-S/16"     # some of the models
    python benchmarks/unread_tokens.py --quick               # two layers and few rounds, to see that it runs

Five models that read few tokens of their last block, at their real sizes with random weights: the class token of two
ViTs and of BERT, of each text the token at its end (CLIP's text tower), the last position of a causal language model's
prefill. Each is compiled by plain inductor and by tofu, with ``unread`` "keep" and "drop"; all run in turn, round after
round, and a row's speed-up is the median of its ratios to plain inductor in the same round. "Apart" is how far the
outputs are from the plain model's, of what is largest among them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as hf
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from vit_cpu import compile_cold

import tofu_fx
from tofu_fx.testing import relative_error

RESULTS = Path(__file__).parent / "results"
BATCH, WORDS, PREFILL = 8, 128, 256


class Reading(nn.Module):
    """A model of transformers, called with one tensor, of whose outputs one is read."""

    def __init__(self, model: nn.Module, output: str, **kwargs: Any) -> None:
        super().__init__()
        self.model, self.output, self.kwargs = model, output, kwargs

    def forward(self, x: Tensor) -> Tensor:
        """The output, of whatever shape it has."""
        return self.model(x, **self.kwargs)[self.output]


@dataclass(frozen=True)
class Subject:
    """A model, what it is called with, and how tokens are reduced in it (nothing: it is causal)."""

    make: Callable[[int], nn.Module]
    inputs: Callable[[], Tensor]
    reduce: dict[str, Any] | None


def _vit(name: str) -> Callable[[int], nn.Module]:
    return lambda layers: timm.create_model(name, depth=layers)


def _bert(layers: int) -> nn.Module:
    return Reading(hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=layers)), "logits")


def _clip(layers: int) -> nn.Module:
    dims = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "projection_dim": 512}
    config = hf.CLIPTextConfig(num_hidden_layers=layers, eos_token_id=49407, **dims)
    return Reading(hf.CLIPTextModelWithProjection(config), "text_embeds")


def _language_model(layers: int) -> nn.Module:
    dims = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "vocab_size": 32000}
    config = hf.LlamaConfig(num_hidden_layers=layers, **dims)
    return Reading(hf.LlamaForCausalLM(config), "logits", logits_to_keep=1, use_cache=False)


def _images() -> Tensor:
    return torch.randn(BATCH, 3, 224, 224)


def _words() -> Tensor:
    return torch.randint(1000, 30000, (BATCH, WORDS))


def _texts() -> Tensor:
    """As CLIP's tokenizer makes them: words, then the end, at other lengths, then the end again as padding."""
    words = torch.randint(1000, 40000, (BATCH, 77))
    lengths = torch.randint(5, 76, (BATCH, 1))
    return torch.where(torch.arange(77) < lengths, words, 49407)


def _prompt() -> Tensor:
    return torch.randint(1000, 30000, (1, PREFILL))


SUBJECTS = {
    "ViT-S/16": Subject(_vit("vit_small_patch16_224"), _images, {"r": 13}),
    "ViT-B/16": Subject(_vit("vit_base_patch16_224"), _images, {"r": 13}),
    "BERT, class head": Subject(_bert, _words, {"ratio": 0.5}),
    "CLIP's text tower": Subject(_clip, _texts, None),
    "language model, prefill": Subject(_language_model, _prompt, None),
}


def ways(subject: Subject) -> dict[str, dict[str, Any] | None]:
    """The rows: plain inductor, and tofu's options."""
    found: dict[str, dict[str, Any] | None] = {"plain": None, "drop": {"r": 0, "unread": "drop"}}
    if subject.reduce is not None:
        said = ", ".join(f"{key} = {value}" for key, value in subject.reduce.items())
        found[f"{said}, keep"] = {**subject.reduce, "unread": "keep"}
        found[f"{said}, drop"] = {**subject.reduce, "unread": "drop"}
    return found


def measure(subject: Subject, layers: int, rounds: int, console: Console) -> dict[str, Any]:
    """Operations, times and errors of one model's rows."""
    torch.manual_seed(0)
    model, x = subject.make(layers).eval(), subject.inputs()
    found, compiled = dict[str, Any](), dict[str, Any]()
    for name, options in ways(subject).items():
        compiled[name], seconds = compile_cold(model, x, options)
        explained = tofu_fx.explain(model, x, options=options or {"r": 0, "unread": "keep"})
        found[name] = {
            "gflop": round(explained.flops_after / 1e9, 3),
            "cold_compile_s": round(seconds, 1),
            "apart": float(f"{relative_error(compiled[name](x), model(x)):.2g}"),
            "unread": explained.unread,
        }
        console.print(f"compiled {name}: {seconds:.1f} s")
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in track(range(rounds + 2), description="rounds", console=console):
        for name, run in compiled.items():
            start = time.perf_counter()
            run(x)
            times[name].append(time.perf_counter() - start)
    for name in compiled:
        ratios = [p / t for p, t in zip(times["plain"][2:], times[name][2:], strict=True)]
        found[name]["median_ms"] = round(1e3 * statistics.median(times[name][2:]), 1)
        found[name]["speedup"] = round(statistics.median(ratios), 3)
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """The results as a table."""
    table = Table(title="tokens that nobody reads")
    for column in ("model", "row", "GFLOP", "ms", "speed-up", "apart"):
        table.add_column(column, justify="left" if column in ("model", "row") else "right")
    for name, rows in result["models"].items():
        for way, row in rows.items():
            figures = f"{row['gflop']:.2f}", f"{row['median_ms']:.0f}", f"{row['speedup']:.2f}x", f"{row['apart']:.0e}"
            table.add_row(name, way, *figures)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), help="these models")
    parser.add_argument("--rounds", type=int, default=20, help="runs of each row (default 20)")
    parser.add_argument("--quick", action="store_true", help="two layers, two rounds, and no results file")
    args = parser.parse_args()
    console = Console()
    layers, rounds = (2, 2) if args.quick else (12, args.rounds)
    with torch.no_grad():
        models = {name: measure(SUBJECTS[name], layers, rounds, console) for name in args.only}
    result = {
        "batch": BATCH,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "models": models,
    }
    show(result, console)
    if not args.quick:
        (RESULTS / "unread_tokens.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
