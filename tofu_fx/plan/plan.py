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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tofu_fx.errors import PlanError
from tofu_fx.plan.counts import walk
from tofu_fx.plan.options import MOST, MOST_SIDE, BranchKind, Match
from tofu_fx.sites.site import Site
from tofu_fx.wording import expectation, place, printable, refusal_of, shown

if TYPE_CHECKING:
    from rich.table import Table

VERSION: Literal[2] = 2

#: what a key of a plan may be, in the words of its messages
EXPECTED: dict[str, str] = {
    "graph": "a whole number from 0 on, the graph's",
    "id": "a text, the site's name",
    "module_path": "a text",
    "tokens": f"a whole number from 1 to {MOST}",
    "heads": f"a whole number from 1 to {MOST}",
    "dim": f"a whole number from 1 to {MOST}",
    "strategy": "'prune', 'mean' or 'mlerp'",
    "match": "'keys', 'heads', 'queries_keys', 'features' or 'sketch'",
    "r": f"a whole number from 0 to {MOST}, the tokens that go",
    "placement": "'stream' or 'branch'",
    "branches": "a list of 'attention', 'mlp' and 'cross'",
    "cell": f"a whole number from 2 to {MOST_SIDE}, the side of a cell in tokens",
    "grid": f"height and width of the image in tokens, as two ints from 1 to {MOST_SIDE}",
    "sites": "a list of rows",
}
Count = Annotated[int, Field(ge=1, le=MOST)]
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Spread(_Record):
    """A measured quantity: its mean, and its standard deviation over tokens and samples."""

    mean: float
    std: float = Field(ge=0)


class PlanRow(_Record):
    """What happens at one site.

    ``graph`` (which of the model's Dynamo graphs), ``id``, ``tokens``, ``heads`` and ``dim`` identify the site;
    ``strategy``, ``match`` (what tokens are compared by) and ``r`` are the decision, as is the ``placement``: with
    "branch" the ``branches`` of the block that run on fewer tokens, and the side of the ``cell`` of which one token
    stays (``grid`` is height and width of the image). The rest is what calibration measured there, None or empty in
    other plans: the ``linearity`` of the branch behind the site between samples (arXiv 2312.01026) and between the
    tokens that would be merged (``pair_linearity``), the ``error`` at the model's output that is put down to this
    site, and the ``reason`` for the decision in words. ``stream`` is the number of the stream that the site is of, in
    its graph: only for counting tokens in reports.
    """

    graph: int = Field(default=0, ge=0, le=MOST)
    id: str
    module_path: str
    tokens: Count
    heads: Count
    dim: Count
    strategy: Literal["prune", "mean", "mlerp"]
    match: Match = "keys"
    r: int = Field(ge=0, le=MOST)
    placement: Literal["stream", "branch"] = "stream"
    branches: list[BranchKind] = Field(default_factory=list)
    cell: int | None = Field(default=None, ge=2, le=MOST_SIDE)
    grid: list[Side] | None = Field(default=None, min_length=2, max_length=2)
    linearity: Spread | None = None
    pair_linearity: Spread | None = None
    error: float | None = None
    reason: str = ""
    stream: int | None = Field(default=None, ge=0)

    @classmethod
    def of(cls, site: Site, graph: int = 0) -> PlanRow:
        """What was decided about a site."""
        return cls(
            graph=graph,
            id=site.id,
            module_path=site.module_path,
            tokens=site.tokens,
            heads=site.heads,
            dim=site.dim,
            strategy=site.strategy,  # type: ignore[arg-type]
            match=site.match,  # type: ignore[arg-type]
            r=site.r,
            placement=site.placement,
            branches=list(site.kinds) if site.placement == "branch" else [],  # type: ignore[arg-type]
            stream=site.stream if site.placement == "stream" else None,
            cell=site.cell if site.cells else None,
            grid=list(site.grid[1:]) if site.cells and site.grid and site.grid[0] == 1 else None,
        )

    @property
    def identity(self) -> tuple[int, str, int, int]:
        """What a site is known by beside its number of tokens."""
        return self.graph, self.id, self.heads, self.dim


class Figures(_Record):
    """What a plan costs and gives on the calibration inputs, relative to the plain model. None where not known.

    ``error`` is in the plan's own ``metric``, ``flops`` a share of the plain model's, ``speedup`` a ratio of times.
    """

    error: float | None = None
    flops: float | None = None
    speedup: float | None = None


class Calibration(_Record):
    """How a plan was made: the target, what it was measured with and on, and what was predicted and measured."""

    target: Literal["speedup", "flops", "error", "none"]
    value: float | None
    policy: Literal["sensitivity", "linearity"]
    threshold: float | None
    metric: str
    seed: int
    samples: int
    forward_passes: float
    seconds: float
    device: str
    libraries: dict[str, str]
    predicted: Figures
    measured: Figures
    compared: dict[str, Figures] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


class Plan(_Record):
    """The decisions for one model, in the order of its sites, and how they were made."""

    version: Literal[2] = VERSION
    model: str | None = None
    fingerprint: str = ""
    calibration: Calibration | None = None
    sites: list[PlanRow]

    def model_post_init(self, _: Any) -> None:
        """Write the fingerprint of a plan that has none yet."""
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", fingerprint(self.sites))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; a file that stood there is replaced as a whole or not at all."""
        target = Path(path)
        try:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=target.absolute().parent, prefix=f".{target.name}.", delete=False
            ) as file:
                try:
                    file.write(self.to_json())
                    file.close()
                    os.chmod(file.name, 0o666 & ~_umask())
                    os.replace(file.name, target)
                except BaseException:
                    file.close()
                    Path(file.name).unlink(missing_ok=True)
                    raise
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
        where = "the plan"
        if isinstance(plan, (str, os.PathLike)):
            where = f"plan {os.fspath(plan)!r}"
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
        return read

    def rows_for(self, sites: Sequence[Site]) -> tuple[list[PlanRow], list[str]]:
        """The rows of the graph that has these sites, and what must be said about the fit.

        Where only the numbers of tokens differ (another image size), the plan's counts are taken as shares.

        Raises:
            PlanError: naming the first site that differs between the plan and the graph, or a row that takes more
                tokens than it can.
        """
        if not sites:  # one of several graphs of a model, without attention
            return [], []
        graphs = sorted({row.graph for row in self.sites}) or [0]
        options = [[row for row in self.sites if row.graph == graph] for graph in graphs]
        names = [site.id for site in sites]
        rows = next((rows for rows in options if [row.id for row in rows] == names), options[0])
        self._check_sites(rows, sites)
        if all(row.tokens == site.tokens for row, site in zip(rows, sites, strict=True)):
            _check_counts(rows, sites)
            return rows, []
        row, site = next((r, s) for r, s in zip(rows, sites, strict=True) if r.tokens != s.tokens)
        note = (
            f"the plan was made for {row.tokens} tokens at {site.id!r}, the graph has {site.tokens}: "
            "its counts are taken as shares of the tokens"
        )
        return _as_shares(rows, sites), [note]

    def _check_sites(self, rows: Sequence[PlanRow], sites: Sequence[Site]) -> None:
        counts = f"the plan has {len(rows)} sites, the graph {len(sites)}"
        for i in range(max(len(rows), len(sites))):
            if i >= len(sites):
                raise PlanError(f"{counts}: {shown(rows[i].id)} is not in it")
            if i >= len(rows):
                raise PlanError(f"{counts}: it says nothing of {shown(sites[i].id)}")
            for key in ("id", "heads", "dim"):
                got, wanted = getattr(sites[i], key), getattr(rows[i], key)
                if got != wanted:
                    raise PlanError(
                        f"the plan is of another model: site {i} has {key} {shown(got)} in the graph, "
                        f"{shown(wanted)} in the plan; make the plan again for this model"
                    )

    def table(self) -> Table:
        """The plan as a rich table: one row for each site, with the reasons."""
        from tofu_fx.plan.table import plan_table

        return plan_table(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw linearity, strategy, tokens and predicted error per site into a picture (needs matplotlib)."""
        from tofu_fx.plan.table import draw_plan

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


def _check_counts(rows: Sequence[PlanRow], sites: Sequence[Site]) -> None:
    wanted = {site.id: row.r for row, site in zip(rows, sites, strict=True)}
    for site, passage in walk(sites, lambda site, _: wanted[site.id]):
        cap = site.cap(passage.arriving)
        if passage.removed > cap:
            raise PlanError(
                f"the plan takes {passage.removed} tokens at {shown(site.id)}, but of the {passage.arriving} that "
                f"arrive there (of which {site.lead + site.tail} are protected) at most {cap} can go at once"
            )


def _as_shares(rows: Sequence[PlanRow], sites: Sequence[Site]) -> list[PlanRow]:
    """The rows for other numbers of tokens: behind each site the same share of the free tokens is left."""
    row_of = {site.id: row for row, site in zip(rows, sites, strict=True)}
    planned = walk(sites, lambda site, _: row_of[site.id].r, tokens=lambda site: row_of[site.id].tokens)
    behind = {site.id: passage.leaving for site, passage in planned}

    def removes(site: Site, arriving: int) -> int:
        protected = site.lead + site.tail
        share = (behind[site.id] - protected) / max(row_of[site.id].tokens - protected, 1)
        keep = protected + round(share * (site.tokens - protected))
        return max(0, min(arriving - keep, site.cap(arriving)))

    return [
        row_of[site.id].model_copy(update={"tokens": site.tokens, "r": passage.removed})
        for site, passage in walk(sites, removes)
    ]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
