"""What a plan holds, as it stands in its JSON: its rows, and how they were measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from tofu_fx.plan.words import MOST, MOST_SIDE, BranchKind, PlanMatch
from tofu_fx.sites.site import Planned

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
    "match": "'keys', 'heads', 'queries_keys', 'features', 'sketch' or 'fisher'",
    "r": f"a whole number from 0 to {MOST}, the tokens that go",
    "placement": "'stream' or 'branch'",
    "branches": "a list of 'attention', 'mlp' and 'cross'",
    "cell": f"a whole number from 2 to {MOST_SIDE}, the side of a cell in tokens",
    "grid": f"height and width of the image in tokens, as two ints from 1 to {MOST_SIDE}",
    "projections": "the hash of the matrices beside the plan, a text",
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

    ``graph`` (which of the model's Dynamo graphs), ``id``, ``tokens``, ``heads`` and ``dim`` (the width of all
    heads together) identify the site; ``strategy``, ``match`` (what tokens are compared by) and ``r`` are the
    decision, as is the ``placement``: with "branch" the ``branches`` of the block that run on fewer tokens, and the
    side of the ``cell`` of which one token stays (``grid`` is height and width of the image). The rest is what
    calibration measured there, None or empty in other plans: the ``linearity`` of the branch after the site between
    samples (arXiv 2312.01026) and between the tokens that would be merged (``pair_linearity``), the ``error`` at
    the model's output that is attributed to this site, and the ``reason`` for the decision in words. ``stream`` is
    the number of the stream that the site is of, in its graph: only for counting tokens in reports.
    """

    graph: int = Field(default=0, ge=0, le=MOST)
    id: str
    module_path: str
    tokens: Count
    heads: Count
    dim: Count
    strategy: Literal["prune", "mean", "mlerp"]
    match: PlanMatch = "keys"
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
    def of(cls, site: Planned, graph: int = 0) -> PlanRow:
        """What was decided about a site."""
        return cls(
            graph=graph,
            id=site.id,
            module_path=site.module_path,
            tokens=site.tokens,
            heads=site.heads,
            dim=site.width,
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


class PlanRecord(_Record):
    """The decisions for one model, in the order of its sites, and how they were made."""

    version: Literal[2] = VERSION
    model: str | None = None
    fingerprint: str = ""
    calibration: Calibration | None = None
    #: the hash of the file of matrices that stands beside the plan; None where no row needs any
    projections: str | None = None
    sites: list[PlanRow]
