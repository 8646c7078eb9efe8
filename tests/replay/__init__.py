"""The rewritten graphs of the catalogue as text: stored, compared with what the compiler makes now, and accepted.

tests/models/test_catalogue.py compares each model's with the stored one, from the compilations that its proofs made.
Where they differ it fails with the difference, and leaves the new text in tests/replay/new. Who wants the change
accepts it:

    python -m tests.replay            which models have changed, and how the first of them did
    python -m tests.replay --accept   store what the last test run made

The text holds no names of nodes, parameters, files or lines: ops, arguments, shapes, dtypes and strategies only. It
depends on the libraries that models come from, so their versions are stored too, and others are not compared.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import lzma
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

FOLDER = Path(__file__).parent
STORE, NEW = FOLDER / "graphs.txt.xz", FOLDER / "new"
_MODEL, _VERSIONS = "===== ", "versions: "
_SHOWN = 80  # lines of a difference
#: by the first word of a model's name: the libraries that its graph depends on, beside torch
_LIBRARIES = {"timm": ("timm",), "transformers": ("transformers",), "diffusers": ("diffusers",)}
_OTHERS = ("torchvision", "einops", "timm", "transformers")
ACCEPT = "python -m tests.replay --accept"


def text_of(compilations: Iterable[Any]) -> str:
    """What the compiler made of one model: of each of its graphs the sites and the rewritten graph, if it is one."""
    lines: list[str] = []
    for number, compilation in enumerate(compilations):
        sites = compilation.sites
        lines.append(f"graph {number}: {len(compilation.reducing)} of {len(sites)} sites reduced")
        for site in compilation.reducing:
            lines.append(
                f"site: {site.placement}, {site.strategy}, {site.match}, {site.tokens_in} -> {site.tokens_out} tokens, "
                f"{site.prefix} + {site.suffix} protected"
            )
        lines += graph_lines(compilation.gm.graph) if compilation.reducing else []
    return "\n".join(lines) + "\n"


def graph_lines(graph: Graph) -> list[str]:
    """A graph as lines without names: nodes are numbered, parameters and constants are told by their shapes."""
    places = {node: f"%{place}" for place, node in enumerate(graph.nodes)}
    return [f"{places[node]} = {_call(node, places)}{_form(node.meta.get('val'))}" for node in graph.nodes]


class _Place:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _call(node: Node, places: dict[Node, str]) -> str:
    if node.op in ("placeholder", "get_attr"):
        return "input" if node.op == "placeholder" else "constant"
    args, kwargs = map_arg((node.args, dict(sorted(node.kwargs.items()))), lambda value: _Place(places[value]))
    if node.op == "output":
        return f"output{args!r}"
    target = getattr(node.target, "__name__", "") if not hasattr(node.target, "_schema") else str(node.target)
    given = [repr(arg) for arg in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
    return re.sub(r" at 0x[0-9a-f]+", "", f"{target or node.target}({', '.join(given)})")


def _form(value: Any) -> str:
    """The shape and dtype of a value; a symbolic size is one whatever its name."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(size) if isinstance(size, int) else "s" for size in value.shape)
        return f"  [{sizes}] {str(value.dtype).removeprefix('torch.')}"
    return ""


# ---- what is stored ------------------------------------------------------------------------------------------------


def installed() -> dict[str, str]:
    """The versions of the libraries here, without what says how they were built."""
    found = {"torch": torch.__version__}
    for name in sorted({*_OTHERS, *(library for names in _LIBRARIES.values() for library in names)}):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return {name: version.split("+")[0] for name, version in found.items()}


@cache
def stored() -> tuple[dict[str, str], dict[str, str]]:
    """The versions at the time of storing, and the text of each model."""
    if not STORE.is_file():
        return {}, {}
    with lzma.open(STORE, "rt", encoding="utf-8") as file:
        first, *models = file.read().split(_MODEL)
    versions = dict(pair.split(" ") for pair in first.strip().removeprefix(_VERSIONS).split(", "))
    return versions, dict(model.split("\n", 1) for model in models)  # type: ignore[misc]


#: ops whose numbers are sizes, however small they are: of the others small ones are dims, places or counts
_SIZED = re.compile(
    r"aten\.(view|reshape|expand|unflatten|split_with_sizes|repeat|tile|as_strided|arange|zeros|new_zeros|conv|avg_pool"
    r"|max_pool|pad|constant_pad|_?upsample)"
)


def steps(text: str) -> set[str]:
    """The steps of a model's graphs: each op with what it is given, without numbers of nodes or sizes."""
    found: set[str] = set()
    dims: dict[str, str] = {}
    for line in text.splitlines():
        node, _, rest = line.partition(" = ")
        if not rest:  # of a site, its placement and what tokens are compared by
            found.add(re.sub(r"\d+", "#", line))
            continue
        call, _, form = rest.partition("  [")
        dims[node] = f"<{form.count(',') + 1 if form else 0}>"
        if not call.startswith(("input", "constant", "output")):
            given = re.sub(r"%\d+", lambda match: dims[match[0]], call)
            sized = _SIZED.match(given) is not None
            given = re.sub(r"(?<![<\w.])(\d+)(?![>\w.])" if sized else r"(?<!<)\b(\d{2,}|[5-9])\b", "#", given)
            if sized:  # as many of them as there may be
                given = re.sub(r"[\[(][-#, ]+[\])]", lambda match: "[-#]" if "-#" in match[0] else "[#]", given)
            found.add(f"{given} {dims[node]} {form.rpartition(' ')[2]}")
    return found


@cache
def with_steps_of_their_own() -> tuple[str, ...]:
    """Few models, and short ones, among whose graphs every step of the catalogue is; each has one that no other has."""
    chosen = {name: steps(text) for name, text in stored()[1].items()}
    counts = Counter(step for own in chosen.values() for step in own)
    for name in sorted(chosen, key=lambda name: (-stored()[1][name].count("\n"), name)):
        if all(counts[step] > 1 for step in chosen[name]):
            counts.subtract(chosen.pop(name))
    return tuple(chosen)


def store(models: dict[str, str], versions: dict[str, str]) -> None:
    """Write the texts in the order given."""
    head = _VERSIONS + ", ".join(f"{name} {version}" for name, version in versions.items()) + "\n"
    text = head + "".join(f"{_MODEL}{name}\n{lines}" for name, lines in models.items())
    STORE.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    stored.cache_clear()


def not_compared(name: str) -> str:
    """Why a model's graph is not compared here; empty if it is."""
    then, now = stored()[0], installed()
    for library in ("torch", *_LIBRARIES.get(name.split(":")[0], _OTHERS)):
        if then and then.get(library) != now.get(library):
            return (
                f"the graphs were stored with {library} {then.get(library)}, {now.get(library)} is installed; to store "
                f"those of now: remove {STORE.name}, run pytest tests/models/test_catalogue.py, then {ACCEPT}"
            )
    return ""


def difference(name: str, now: str) -> str:
    """How a model's graph differs from the stored one, as a unified diff; empty if it does not, or is not compared."""
    if not_compared(name):
        return ""
    was = stored()[1].get(name, "")
    if was == now:
        return ""
    lines = list(difflib.unified_diff(was.splitlines(), now.splitlines(), "stored", "now", lineterm="", n=2))
    more = [f"... and {len(lines) - _SHOWN} lines more"] if len(lines) > _SHOWN else []
    return "\n".join([*lines[:_SHOWN], *more])


def check(name: str, compilations: Iterable[Any]) -> None:
    """Hold a model's graphs against the stored ones.

    Raises:
        AssertionError: they differ; the new text is left for `--accept`.
    """
    text = text_of(compilations)
    changed = difference(name, text)
    path = NEW / (re.sub(r"\W+", "_", name) + ".txt")
    if not changed:
        path.unlink(missing_ok=True)
        return
    NEW.mkdir(exist_ok=True)
    path.write_text(f"{name}\n{text}", encoding="utf-8")
    raise AssertionError(
        f"{name}: the rewritten graph is another than the stored one. If that is meant: {ACCEPT}\n{changed}"
    )


def pending() -> dict[str, str]:
    """The texts that the last test runs left, by model."""
    files = sorted(NEW.glob("*.txt")) if NEW.is_dir() else []
    return dict(path.read_text(encoding="utf-8").split("\n", 1) for path in files)  # type: ignore[misc]


def accept(order: Iterable[str]) -> list[str]:
    """Store what is pending; models that are not in ``order`` are dropped. Returns the models that changed."""
    versions, models = stored()
    new, here = pending(), installed()
    if new and versions and versions != here:
        models = {}  # one file holds one set of versions: those of now
    known = {**models, **new}
    missing = [name for name in order if name not in known]
    if missing and not models:
        raise SystemExit(f"{len(missing)} models have no graph yet: run pytest tests/models/test_catalogue.py first")
    store({name: known[name] for name in order if name in known}, here if new else versions or here)
    for path in NEW.glob("*.txt"):
        path.unlink()
    return list(new)
