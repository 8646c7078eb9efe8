"""A Plan: for every attention site how many tokens go, and how. JSON to save, read, edit and pass back.

``tofu_fx.calibrate`` makes one from measurements and writes down what it measured; ``explain().plan`` makes one from
the options. Only ``strategy``, ``match`` and ``r`` of the rows decide anything, and may be edited; what identifies a
site is checked against the graph.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr, ValidationError

from tofu_fx.errors import PlanError
from tofu_fx.plan import projections
from tofu_fx.plan.projections import Projections
from tofu_fx.plan.records import EXPECTED, VERSION, PlanRecord, PlanRow
from tofu_fx.plan.table import draw_plan, plan_table
from tofu_fx.wording import expectation, place, printable, refusal_of, shown

if TYPE_CHECKING:
    from rich.table import Table


class Plan(PlanRecord):
    """The decisions for one model, in the order of its sites, and how they were made.

    ``matrices`` are those by which tokens are projected where a row says "fisher": ``(graph, id)`` -> ``[C, k]``.
    """

    _matrices: Projections = PrivateAttr(default_factory=dict)

    @property
    def matrices(self) -> Projections:
        """For each site that has one, by the number of its graph and its id: the matrix ``[C, k]``, float16 on CPU."""
        return self._matrices

    def with_matrices(self, matrices: Projections) -> Plan:
        """The same plan with these matrices.

        Raises:
            PlanError: a row of "fisher" has none, or one is not sound.
        """
        found = {key: value.detach().cpu().half() for key, value in matrices.items()}
        projections.check(self.sites, found, "the plan")
        plan = self.model_copy(update={"projections": projections.hash_of(found)})
        plan._matrices = found  # noqa: SLF001 - a plan of this class
        return plan

    def __eq__(self, other: object) -> bool:
        """Whether they say the same; of the matrices the hash is compared."""
        return isinstance(other, Plan) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]  # its rows are lists

    def model_post_init(self, context: Any) -> None:
        """Write the fingerprint of a plan that has none yet."""
        super().model_post_init(context)
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", fingerprint(self.sites))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON and, if it has any, its matrices beside it, with the suffix ``.safetensors``.

        Files that stood there are replaced when both are written, or not at all.
        """
        contents = {Path(path): self.to_json().encode()}
        if self.matrices:
            contents[projections.path_beside(path)] = projections.packed(self.matrices)
        try:
            _replace(contents)
        except OSError as error:
            raise PlanError(f"plan {os.fspath(path)!r} cannot be written: {error.strerror}") from None

    def to_json(self) -> str:
        """The JSON that ``save`` writes: one line for each decision and figure, what is unknown left out."""
        return json.dumps(self.model_dump(exclude_none=True), indent=2, allow_nan=False) + "\n"

    @classmethod
    def load(cls, plan: Any) -> Plan:
        """A plan from a Plan, the path of one, or its dict.

        Raises:
            PlanError: naming the file, the row and the key that is wrong.
        """
        if isinstance(plan, Plan):
            return plan
        where, path = "the plan", None
        if isinstance(plan, (str, os.PathLike)):
            where, path = f"plan {os.fspath(plan)!r}", plan
            plan = _read_json(plan, where)
        if isinstance(plan, dict) and plan.get("version", VERSION) != VERSION:
            raise PlanError(
                f"{where} has version {shown(plan['version'])}, this tofu_fx reads version {VERSION}: "
                "make the plan again with this version"
            )
        try:
            read = cls.model_validate(plan)
        except ValidationError as error:
            raise PlanError(f"{where}: {_explain(error.errors()[0])}") from None
        if read.fingerprint != fingerprint(read.sites):
            raise PlanError(
                f"{where}: its sites are not those that it was made for: of a row only 'strategy', 'match' and 'r' "
                "may be edited"
            )
        if read.projections is not None and path is None:
            raise PlanError(
                f"{where}: a dict holds no matrices, which its 'projections' asks for; give the plan's path"
            )
        if path is not None and read.projections is not None:
            read._matrices = projections.read(path, read.projections)  # noqa: SLF001 - a plan of this class
        projections.check(read.sites, read.matrices, where)
        return read

    def table(self) -> Table:
        """The plan as a rich table: one row for each site, with the reasons."""
        return plan_table(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw linearity, strategy, tokens and predicted error per site into a picture (needs matplotlib)."""
        draw_plan(self, path)


def fingerprint(rows: Sequence[PlanRow]) -> str:
    """A hash of the sites that a plan is for (not of its decisions)."""
    sites = [[*row.identity, row.tokens] for row in rows]
    return hashlib.sha256(json.dumps(sites).encode()).hexdigest()[:16]


def _read_json(path: str | os.PathLike[str], where: str) -> Any:
    """What a JSON file holds.

    Raises:
        PlanError: it is no file, or holds something else.
    """
    refused = refusal_of(path)
    if refused:
        raise PlanError(f"{where} cannot be read: {refused}")
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise PlanError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PlanError(f"{where} is not JSON: it is not a text in UTF-8") from None
    except ValueError as error:
        raise PlanError(f"{where} is not JSON: {printable(str(error))}") from None
    except RecursionError:
        raise PlanError(f"{where} is no plan: its JSON is nested too deeply") from None


def _explain(error: Any) -> str:
    """What is wrong at a key of a plan, in our words."""
    loc, kind = error["loc"], error["type"]
    if not loc:
        return f"expected a dict with 'sites' at its top level, got {shown(error['input'])}"
    if kind == "missing":
        return f"{place(loc)}: this key is missing; expected {expectation(error, EXPECTED)}"
    if kind == "extra_forbidden":
        return f"{place(loc)}: unknown key; leave it out, or mind the spelling"
    return f"{place(loc)}: expected {expectation(error, EXPECTED)}, got {shown(error['input'])}"


def _replace(contents: Mapping[Path, bytes]) -> None:
    """Write all files beside their places, then put them there."""
    written: dict[str, Path] = {}
    try:
        for target, content in contents.items():
            with tempfile.NamedTemporaryFile(
                dir=target.absolute().parent, prefix=f".{target.name}.", delete=False
            ) as file:
                written[file.name] = target
                file.write(content)
            os.chmod(file.name, 0o666 & ~_umask())
        for name, target in written.items():
            os.replace(name, target)
    except BaseException:
        for name in written:
            Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
