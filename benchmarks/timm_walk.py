"""What becomes of timm: the smallest model of each of its module files, with random weights and its real dims.

    python benchmarks/timm_walk.py                          # all files; what is in the results already is skipped
    python benchmarks/timm_walk.py --only beit eva --again  # some files, anew

Every model is explained (`tofu_fx.explain`) and, where tokens can be reduced, proved (`tofu_fx.testing.prove`). The
outcome is "accelerated" (tokens can be reduced at one attention at least), "declined" (there is attention, and a reason
for each), "plain" (no attention) or "failed" (with the error, or the proof that does not hold).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from timm.models import get_pretrained_cfg
from timm.models._registry import _module_to_models
from walking import judge, plain, show

from tofu_fx.testing import randomise

RESULTS = Path(__file__).parent / "results" / "timm_walk.json"
#: words of small models' names, and of those that are nobody's smallest
SMALL = re.compile("femto|atto|pico|nano|xtiny|xs|tiny|mini|_[stbmf]0|s1[28]|18|small|little|10|26|050|35")
BIG = re.compile("base|large|huge|giant|gigantic|xl|_l|_b[4-7]|so400m|384|448|512|1024")
#: how many models of a file are built (without memory) to find the smallest
CANDIDATES = 30
#: with three stages of stride 2 after a patch of 4, there are still 4 x 4 tokens in the last one
SIDE = 128


def smallest(module: str) -> tuple[str, int]:
    """The model of a timm file with the fewest parameters (not one made for tests), and how many these are."""
    names = sorted(_module_to_models[module])
    names = [name for name in names if not name.startswith("test_")] or names
    names.sort(key=lambda name: bool(BIG.search(name)) - bool(SMALL.search(name)))
    counts: dict[str, int] = {}
    for name in names[:CANDIDATES]:
        with contextlib.suppress(Exception), torch.device("meta"):
            counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    if not counts:
        model = timm.create_model(names[0])
        return names[0], sum(p.numel() for p in model.parameters())
    name = min(counts, key=lambda name: (counts[name], name))
    return name, counts[name]


def sides(name: str) -> list[tuple[int, ...]]:
    """Input sizes to try, smallest first; one where it is fixed."""
    config = get_pretrained_cfg(name)
    size = tuple(config.input_size) if config is not None else (3, 224, 224)
    if config is not None and config.fixed_input_size:
        return [size]
    least = max(SIDE, *(config.min_input_size or (0,))[-1:]) if config is not None else SIDE
    return [(size[0], least, least), size] if least < size[-1] else [size]


def load(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model with random weights, and an input of the smallest size that it takes."""
    torch.manual_seed(0)
    model = randomise(timm.create_model(name)).eval()
    error: Exception | None = None
    for size in sides(name):
        x = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
        try:
            model(x)
            return model, x
        except Exception as found:  # noqa: BLE001 - a row says what failed
            error = found
    raise RuntimeError(f"the model itself does not run: {error}")


def walk(module: str) -> dict[str, Any]:
    """The row of one file."""
    row: dict[str, Any] = {"module": module, "model": "", "outcome": "failed"}
    start = time.perf_counter()
    try:
        row["model"], count = smallest(module)
        row["million_parameters"] = round(count / 1e6, 1)
        model, x = load(row["model"])
        row["input"] = list(x.shape)
        row.update(judge(model, x, count / 1e6))
    except Exception as error:  # noqa: BLE001 - a row says what failed
        row["error"] = f"{type(error).__name__}: {plain(str(error))[:600]}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FILE", help="module files of timm, such as beit")
    parser.add_argument("--again", action="store_true", help="walk what is in the results already, too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console()
    rows: dict[str, dict[str, Any]] = {}
    if args.output.exists():
        rows = {row["module"]: row for row in json.loads(args.output.read_text())["rows"]}
    wanted = [module for module in sorted(_module_to_models) if module in (args.only or _module_to_models)]
    for module in wanted:
        if module in rows and not args.again:
            continue
        rows[module] = row = walk(module)
        said = f"{module}: {row['model']}, {row['outcome']}, {row['seconds']} s {row.get('error', '')}"
        console.print(said, markup=False, highlight=False)
        result = {"timm": timm.__version__, "torch": torch.__version__, "rows": [rows[key] for key in sorted(rows)]}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        gc.collect()
        torch._dynamo.reset()
    show("timm, one model for each module file", [rows[module] for module in wanted if module in rows], console)


if __name__ == "__main__":
    main()
