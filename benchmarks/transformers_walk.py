"""What becomes of the transformers library: a small model of each of its families, with random weights.

    python benchmarks/transformers_walk.py                            # all; what is in the results already is skipped
    python benchmarks/transformers_walk.py --only convbert vit --again

A family's config is made small by the names of its dims (`transformers_small.py`), and its base model is called with
what its `forward` asks for. Where none of that makes a model that runs, the outcome is "not built", which says nothing
of the compiler. Each family has a process of its own, which is given up after `--seconds`. The other outcomes are
those of `timm_walk.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import CONFIG_MAPPING, MODEL_MAPPING
from transformers_small import calls, configs, model_of
from walking import judge, plain, show

from tofu_fx.testing import randomise, same_bits, tensors

RESULTS = Path(__file__).parent / "results" / "transformers_walk.json"
#: million parameters that a small model may have; more of them are no small model
MOST = 120
TITLE = "transformers, a small model for each family"


def load(family: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A small model of a family, and the keywords of a call that it takes.

    Raises:
        RuntimeError: none was found, or it is random; says what the first try said, which is of the smallest.
    """
    said: list[Exception | str] = []
    for config in configs(family):
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in model_of(config).parameters())
            if count > MOST * 1e6:
                said.append(f"its small config has {count / 1e6:.0f} million parameters")
                continue
            torch.manual_seed(0)
            model = randomise(model_of(config))
        except Exception as error:  # noqa: BLE001 - its next config is tried
            said.append(error)
            continue
        for call in calls(model, config):
            try:
                model(**call)
            except Exception as error:  # noqa: BLE001 - its next call is tried
                said.append(error)
            else:
                if not same_bits(*(tensors(dict(model(**call))) for _ in range(2))):
                    raise RuntimeError("its outputs are others in each call, on the same inputs")
                return model, call
    raise RuntimeError(str(said[0]) if said else "no config of it could be made small")


@torch.no_grad()
def walk(family: str, told: Any) -> None:
    """Put the row of one family into a queue."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    row: dict[str, Any] = {"module": family, "model": "", "outcome": "not built"}
    start = time.perf_counter()
    try:
        model, call = load(family)
        row.update(model=type(model).__name__, input={name: list(value.shape) for name, value in call.items()})
        row["outcome"] = "failed"
        row.update(judge(model, call, sum(p.numel() for p in model.parameters()) / 1e6))
    except Exception as error:  # noqa: BLE001 - a row says what failed
        row["error"] = f"{type(error).__name__}: {plain(str(error))[:600]}"
        if row["outcome"] == "failed":
            row["where"] = plain("".join(traceback.format_tb(error.__traceback__)[-3:]))
    row["seconds"] = round(time.perf_counter() - start, 1)
    told.put(row)


def apart(family: str, seconds: float) -> dict[str, Any]:
    """The row of one family, from a process of its own."""
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    process = context.Process(target=walk, args=(family, told), daemon=True)
    process.start()
    row: dict[str, Any] = {"module": family, "model": "", "outcome": "out of time", "seconds": seconds}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            row = told.get(timeout=0.5)
            break
        except queue.Empty:
            if not process.is_alive() and told.empty():
                row.update(outcome="failed", error=f"its process ended with {process.exitcode}")
                break
    process.kill()
    process.join()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="families of transformers, such as convbert")
    parser.add_argument("--again", action="store_true", help="walk what is in the results already, too")
    parser.add_argument("--seconds", type=float, default=240.0, help="for each family at most")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="each N-th family from I")
    args = parser.parse_args()
    console = Console()
    rows: dict[str, dict[str, Any]] = {}
    if args.output.exists():
        rows = {row["module"]: row for row in json.loads(args.output.read_text())["rows"]}
    known = sorted(family for family, kind in CONFIG_MAPPING.items() if kind in MODEL_MAPPING)
    wanted = [family for family in known if family in (args.only or known)][args.part[0] :: args.part[1]]
    for number, family in enumerate(wanted):
        if family in rows and not args.again:
            continue
        rows[family] = row = apart(family, args.seconds)
        said = f"{number + 1}/{len(wanted)} {family}: {row['outcome']}, {row['seconds']} s {row.get('error', '')[:300]}"
        console.print(said, markup=False, highlight=False)
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        result = {**versions, "rows": [rows[key] for key in sorted(rows)]}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    show(TITLE, [rows[family] for family in wanted if family in rows], console)


if __name__ == "__main__":
    main()
