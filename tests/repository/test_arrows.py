"""Who imports whom: arrows between rooms point one way only, and nothing imports in a circle.

Read from the source by `ast`, without importing anything. Imports inside of functions count like all others. Those
under `if TYPE_CHECKING` do not: they are never run, and only name the types of what is passed in. Neither does what
Python imports by itself on the way to a module, the packages above it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import networkx as nx

ROOT = Path(__file__).parents[2]

#: anyone may import these, and they import nothing but each other
LEAVES = ("errors", "wording", "extras")

#: a room and the rooms that it may import, beside itself and the leaves
ARROWS: dict[str, tuple[str, ...]] = {
    "fx": (),
    "ops": (),
    "axes": ("fx",),
    "rows": ("axes", "fx"),
    "sites": ("axes", "fx", "ops"),
    "plan": ("sites", "axes", "fx", "ops"),
    "rewriting": ("plan", "sites", "axes", "fx", "ops"),
    "compilation": ("rewriting", "plan", "sites", "rows", "axes", "fx"),
    "passes": ("rewriting", "plan", "sites", "rows", "axes", "fx", "ops", "compilation"),
    "pipeline": ("passes", "compilation", "rewriting", "plan", "fx"),
    "dynamo": (),
    "backend": ("pipeline", "compilation", "rewriting", "plan", "sites", "fx", "dynamo"),
    "calibration": ("backend", "pipeline", "compilation", "rewriting", "plan", "sites", "axes", "fx", "ops"),
    "standalone": ("backend", "compilation", "rewriting", "plan", "sites", "fx", "ops"),
    "report": ("calibration", "backend", "pipeline", "compilation", "plan", "sites", "axes", "fx", "ops"),
    "tofu_fx": ("standalone", "report", "calibration", "plan"),  # what a user sees: tofu_fx/__init__.py
}
#: these stand above all others, which never import them
BELOW = (*ARROWS, *LEAVES)
ARROWS["testing"] = BELOW
ARROWS["cli"] = ARROWS["demo"] = (*BELOW, "testing", "cli", "demo")

#: modules that are a room together with another
SHARED = {"summary": "backend"}


class Arrow(NamedTuple):
    """One import: the module it stands in, the module it imports, and the line."""

    start: str
    end: str
    line: str

    def __str__(self) -> str:
        return f"{self.line}: {self.start} imports {self.end}"


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the package and its file; `passes/` is installed as `tofu_fx.passes`."""
    found = {}
    for folder, package in ((root / "tofu_fx", "tofu_fx"), (root / "passes", "tofu_fx.passes")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def arrows_of(root: Path) -> list[Arrow]:
    """All imports between modules of the package, in order."""
    modules = modules_of(root)
    found = []
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in _run(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, package, modules):
                line = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
                found.append(Arrow(name, target, line))
    return found


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, without what stands under `if TYPE_CHECKING` (its `else` counts)."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from _run(other)
        else:
            yield from _run(child)


def _targets(node: ast.AST, package: str, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a statement imports."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        source = ".".join([*above, *([node.module] if node.module else [])])
        names = [f"{source}.{alias.name}" for alias in node.names]
        names = [name if name in modules else source for name in names]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
        names = [value.value for value in node.args[:1] if isinstance(value, ast.Constant)]  # type: ignore[misc]
    yield from (name for name in dict.fromkeys(names) if name in modules)


def room_of(module: str) -> str:
    """The room that a module is of: the folder, or a file of the top folder by its own name."""
    first = module.split(".")[1] if "." in module else module
    return SHARED.get(first, first)


def refused(arrows: list[Arrow]) -> list[str]:
    """The arrows that the table does not allow, and the rooms that it does not know."""
    found = []
    for arrow in arrows:
        start, end = room_of(arrow.start), room_of(arrow.end)
        allowed = LEAVES if start in LEAVES else (start, *ARROWS.get(start, ()), *LEAVES)
        if end not in allowed:
            found.append(f"{start} -> {end}: {arrow}")
    return found


def circles(arrows: list[Arrow], by_room: bool) -> list[list[str]]:
    """Modules, or rooms, that import each other, directly or through others."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for arrow in arrows:
        start, end = (room_of(name) if by_room else name for name in arrow[:2])
        if start != end or not by_room:
            graph.add_edge(start, end)
    return sorted(sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1)


def test_every_import_is_an_arrow_of_the_table() -> None:
    found = refused(arrows_of(ROOT))
    assert not found, "\n".join(found)


def test_no_modules_import_each_other() -> None:
    found = circles(arrows_of(ROOT), by_room=False)
    assert not found, "\n".join(map(", ".join, found))


def test_no_rooms_import_each_other() -> None:
    found = circles(arrows_of(ROOT), by_room=True)
    assert not found, "\n".join(map(", ".join, found))


def test_table_has_a_row_for_every_room_and_no_other() -> None:
    rooms = {room_of(module) for module in modules_of(ROOT)} - set(LEAVES)
    assert rooms == set(ARROWS)


def test_oracle_imports_nothing_of_the_compiler() -> None:
    for path in (ROOT / "tests" / "oracle").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        froms = [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in froms + plain if name.split(".")[0] in ("tofu_fx", "passes")], path


# ---- the test of the test: what it would see -----------------------------------------------------------------------


def invented(root: Path, files: dict[str, str]) -> list[Arrow]:
    """The arrows of a package that consists of these files and empty ones beside."""
    files = {**dict.fromkeys(("tofu_fx/__init__.py", "tofu_fx/ops/fuse.py", "tofu_fx/cli/main.py"), ""), **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return arrows_of(root)


def test_violation_is_seen_wherever_it_stands_and_however_it_is_written(tmp_path: Path) -> None:
    spellings = {
        "plain": "import tofu_fx.cli.main\n",
        "from": "from tofu_fx.cli import main\n",
        "name": "from tofu_fx.cli.main import run\n",
        "relative": "from ..cli import main\n",
        "lazy": "def later():\n    from tofu_fx.cli.main import run\n    return run\n",
        "by name": "import importlib\nmain = importlib.import_module('tofu_fx.cli.main')\n",
        "beside types": "if TYPE_CHECKING:\n    pass\nelse:\n    from tofu_fx.cli import main\n",
    }
    for place, (name, text) in enumerate(spellings.items()):
        (found,) = refused(invented(tmp_path / str(place), {"tofu_fx/fx/nodes.py": text}))
        assert found.startswith("fx -> cli: tofu_fx/fx/nodes.py:"), name


def test_pass_is_a_module_of_the_package(tmp_path: Path) -> None:
    files = {
        "passes/verify.py": "from tofu_fx.cli import main\n",
        "tofu_fx/fx/nodes.py": "import tofu_fx.passes.verify\n",
    }
    assert [line.split(": tofu_fx.")[0] for line in refused(invented(tmp_path, files))] == [
        "fx -> passes: tofu_fx/fx/nodes.py:1",
        "passes -> cli: passes/verify.py:1",
    ]


def test_allowed_imports_and_those_for_types_are_no_violation(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nimport torch\nfrom tofu_fx.ops import fuse\n"
    text += "if TYPE_CHECKING:\n    from tofu_fx.cli import main\n"
    arrows = invented(tmp_path, {"tofu_fx/sites/site.py": text})
    assert [(arrow.start, arrow.end) for arrow in arrows] == [("tofu_fx.sites.site", "tofu_fx.ops.fuse")]
    assert not refused(arrows)


def test_room_that_the_table_does_not_know_may_import_nothing_of_another(tmp_path: Path) -> None:
    assert refused(invented(tmp_path, {"tofu_fx/attic.py": "import tofu_fx.ops.fuse\n"}))


def test_circles_of_modules_and_of_rooms_are_seen(tmp_path: Path) -> None:
    arrows = invented(
        tmp_path,
        {
            "tofu_fx/plan/a.py": "from tofu_fx.plan import b\n",
            "tofu_fx/plan/b.py": "def later():\n    from . import a\n",
            "tofu_fx/plan/c.py": "import tofu_fx.sites.d\n",
            "tofu_fx/sites/d.py": "import tofu_fx.ops.fuse\n",
            "tofu_fx/sites/e.py": "import tofu_fx.plan.a\n",
        },
    )
    assert circles(arrows, by_room=False) == [["tofu_fx.plan.a", "tofu_fx.plan.b"]]
    assert circles(arrows, by_room=True) == [["plan", "sites"]]
