"""Plant faults in a copy of the package, one by one, and see who notices: `prove`, and the tests.

    python -m tests.mutations                  all of them; what is in the results file already is not run again
    python -m tests.mutations --jobs 2         in two processes
    python -m tests.mutations --only NAME      one fault, by its name or a part of it; again if need be
    python -m tests.mutations --show           the results as a table

The results are in tests/mutations.json. A fault is "seen" by `prove` if a proof fails, something is raised, or sites
are no longer reduced. What is run is first run without any fault: there it must hold. Needs fork: Linux and macOS.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch  # here, so that a process that is forked for a fault has it; the package itself it must not have
import torch._dynamo

from tests.mutants import MUTANTS, SAMPLE, Mutant

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "mutations.json"
_COPIED = ("tofu_fx", "passes", "tests", "docs", "benchmarks", "README.md", "pyproject.toml")
_LINKED = ("examples",)


class Moved(Exception):
    """The text of a fault is not in its file, or more than once."""


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The text of the file with the fault in it.

    Raises:
        Moved: the fault's old text does not stand there exactly once.
    """
    text = (root / mutant.file).read_text(encoding="utf-8")
    found = text.count(mutant.old)
    if found != 1:
        raise Moved(
            f"{mutant.name!r}: its text stands {found} times in {mutant.file}, not once; write it anew in "
            f"tests/mutants.py: {mutant.old.strip()!r}"
        )
    return text.replace(mutant.old, mutant.new)


@contextlib.contextmanager
def planted(mutant: Mutant | None, tests: bool = True) -> Any:
    """A copy of the repository with one fault in it (none: as it is); ``tests`` False: the package alone."""
    with tempfile.TemporaryDirectory(prefix="mutation") as name:
        folder = Path(name)
        for part in _COPIED if tests else ("tofu_fx", "passes"):
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, folder / part)
        for part in _LINKED if tests else ():
            (folder / part).symlink_to(ROOT / part)
        (folder / "sitecustomize.py").write_text(_FINDER.format(folder=str(folder)))
        if mutant is not None:
            (folder / mutant.file).write_text(mutated(mutant), encoding="utf-8")
        yield folder


# However the package is installed, every process that has this on its path imports the copy.
_FINDER = """
import importlib.util
import sys


class Copy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        folders = {{"tofu_fx": "{folder}/tofu_fx", "tofu_fx.passes": "{folder}/passes"}}
        if name in folders:
            folder = folders[name]
            return importlib.util.spec_from_file_location(
                name, folder + "/__init__.py", submodule_search_locations=[folder]
            )


sys.meta_path.insert(0, Copy)
"""


def warm() -> None:
    """Have what compiling a model imports, so that the processes that are forked for each fault have it."""
    torch.set_num_threads(1)  # a process that has started threads must not be forked
    torch.backends.mha.set_fastpath_enabled(False)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    with torch.no_grad():
        torch.compile(layer, backend="eager")(torch.zeros(1, 2, 8))
    torch._dynamo.reset()


def proved(models: Sequence[str], folder: Path) -> str:
    """Run `prove` of the package in ``folder`` on models of tests/mutation_models.py, in a process of its own.

    Returns:
        What was seen first, as "model: failure"; empty if all holds.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_prove, args=(list(models), str(folder), theirs))
    process.start()
    theirs.close()
    try:
        return str(ours.recv())
    except EOFError:
        return "the process died"
    finally:
        process.join()


def _prove(models: list[str], folder: str, answer: Any) -> None:
    """In the forked process: import the copy, prove, and send what was seen."""
    if "tofu_fx" in sys.modules:
        answer.send("error: the package was imported before the fault was planted")
        return
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            exec((Path(folder) / "sitecustomize.py").read_text(), {})
            spec = importlib.util.spec_from_file_location("mutation_models", ROOT / "tests" / "mutation_models.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules["mutation_models"] = module
            spec.loader.exec_module(module)
            answer.send(module.seen(models, folder))
        except Exception as error:  # noqa: BLE001 - a fault that keeps the package from being imported is seen, too
            answer.send(f"{type(error).__name__}: {str(error).strip()[:300]}")


def sample() -> None:
    """Print, as one line of JSON, what `prove` sees of the sample's faults, each on its first model, and of none."""
    warm()
    mutants = [next(mutant for mutant in MUTANTS if mutant.name == name) for name in SAMPLE]
    found = {}
    with planted(None, tests=False) as folder:
        found["no fault"] = proved(sorted({mutant.models[0] for mutant in mutants}), folder)
        for mutant in mutants:
            whole = (folder / mutant.file).read_text(encoding="utf-8")
            (folder / mutant.file).write_text(mutated(mutant), encoding="utf-8")
            found[mutant.name] = proved(mutant.models[:1], folder)
            (folder / mutant.file).write_text(whole, encoding="utf-8")
    print(json.dumps(found))


def tested(selection: str, folder: Path) -> str:
    """Run tests in a copy. The first that fails; empty if all pass."""
    command = [sys.executable, "-m", "pytest", *shlex.split(selection), "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "--tb=line"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 5:
        raise ValueError(f"no test is chosen by {selection!r}")
    return failed[0].split(" - ")[0].split(" ", 1)[1] if failed else f"pytest ended with {done.returncode}"


def run(mutant: Mutant) -> dict[str, Any]:
    """Plant one fault; who saw it."""
    began = time.monotonic()
    with planted(mutant) as folder:
        found = {"prove": proved(mutant.models, folder), "tests": tested(mutant.tests, folder)}
    return {"file": mutant.file, "hash": fingerprint(mutant), **found, "seconds": round(time.monotonic() - began)}


def fingerprint(mutant: Mutant) -> str:
    """What changes where the fault or what is run on it changes."""
    parts = (mutant.file, mutant.old, mutant.new, *mutant.models, mutant.tests)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def check_sound(mutants: Iterable[Mutant]) -> None:
    """Raise where what is run fails without a fault: then nothing would be shown by its failing."""
    with planted(None) as folder:
        wrong = proved(sorted({model for mutant in mutants for model in mutant.models}), folder)
        for selection in sorted({mutant.tests for mutant in mutants}):
            wrong = wrong or tested(selection, folder)
            print(f"without a fault: {selection}: {wrong or 'holds'}", flush=True)
    if wrong:
        raise SystemExit(f"without any fault there is a failure: {wrong}")


def chosen(words: str | None) -> list[Mutant]:
    """The faults whose name has these words; all, without."""
    found = [mutant for mutant in MUTANTS if words is None or words.lower() in mutant.name.lower()]
    if not found:
        raise SystemExit(f"no fault is called {words!r}; they are: {', '.join(mutant.name for mutant in MUTANTS)}")
    return found


def load() -> dict[str, Any]:
    """The results so far."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return found


def save(results: dict[str, Any]) -> None:
    """Write the results, in the order of the faults; those of faults that are no more are dropped."""
    ordered = {mutant.name: results[mutant.name] for mutant in MUTANTS if mutant.name in results}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """The results for reading, and what nobody saw."""
    lines = ["| fault | file | seen by prove | seen by a test |", "|---|---|---|---|"]
    for mutant in MUTANTS:
        found = results.get(mutant.name)
        if found is None:
            lines.append(f"| {mutant.name} | {mutant.file} | not run | not run |")
            continue
        prove = found["prove"].split("\n")[0][:80] or f"no: {mutant.unseen or 'NO REASON IS GIVEN'}"
        lines.append(f"| {mutant.name} | {mutant.file} | {prove} | {found['tests'].removeprefix('tests/') or 'NO'} |")
    known = [results[mutant.name] for mutant in MUTANTS if mutant.name in results]
    survivors = [
        m.name for m in MUTANTS if m.name in results and not any(results[m.name][k] for k in ("prove", "tests"))
    ]
    proof, tests = (sum(bool(found[key]) for found in known) for key in ("prove", "tests"))
    lines += ["", f"{len(known)} faults: {proof} seen by prove, {tests} by the tests; survivors: {survivors or 'none'}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if a fault survives everything, or survives `prove` without a reason."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="NAME", help="faults whose name has these words; run again")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--again", action="store_true", help="run all again")
    parser.add_argument("--unchecked", action="store_true", help="do not first run everything without a fault")
    parser.add_argument("--show", action="store_true", help="show the results, run nothing")
    given = parser.parse_args(arguments)
    results = load()
    warm()
    if not given.show:
        for mutant in MUTANTS:
            mutated(mutant)  # an error now, not after half an hour
        wanted = chosen(given.only)
        if not (given.again or given.only):
            wanted = [m for m in wanted if results.get(m.name, {}).get("hash") != fingerprint(m)]
        if wanted and not given.unchecked:
            check_sound(wanted)
        with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
            running = {pool.submit(run, mutant): mutant for mutant in wanted}
            for done in concurrent.futures.as_completed(running):
                name, found = running[done].name, done.result()
                results[name] = found
                save(results)
                print(f"{name}: prove: {found['prove'][:90] or 'no'}; tests: {found['tests'] or 'no'}", flush=True)
    print(table(results))
    seen = {m.name: results[m.name] for m in MUTANTS if m.name in results}
    lost = [
        m for m in MUTANTS if m.name in seen and not seen[m.name]["prove"] and not (m.unseen and seen[m.name]["tests"])
    ]
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
