"""``tofu_fx.explain``: what the compiler would do with a model, without compiling it."""

from __future__ import annotations

import io
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.fx import GraphModule

from tofu_fx.backend import refuse_pipeline, rewrite, run_once
from tofu_fx.calibration.batches import Batch
from tofu_fx.plan.counts import stream_of
from tofu_fx.plan.flops import count_flops
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.plan.records import PlanRow
from tofu_fx.sites.site import Planned, Site, ever_planned
from tofu_fx.summary import Outcome, summarise
from tofu_fx.wording import printable


@dataclass
class SiteRow:
    """One attention: where it is, what happens there, and the reason where nothing does.

    ``stream`` is equal for the sites of one stream, in a graph; in branches each site has one of its own.
    """

    graph: int
    id: str
    module_path: str
    heads: int
    tokens_in: int
    tokens_out: int
    strategy: str
    r: int
    reason: str
    stream: Hashable = None


@dataclass
class GraphReport:
    """One Dynamo graph: its sites, barriers, operations, code before and after, seconds in each pass."""

    outcome: str
    sites: list[SiteRow]
    barriers: list[str]
    before: str
    after: str
    flops_before: int
    flops_after: int
    seconds: dict[str, float]
    unknown_ops: dict[str, int]
    plan_rows: list[PlanRow]
    #: see :class:`tofu_fx.backend.Outcome`
    state: str
    #: where rows that nobody reads are not computed
    unread: list[str] = field(default_factory=list)


@dataclass
class Explanation:
    """What the compiler would do. ``print()`` shows it as a table; the fields are there to be read."""

    graphs: list[GraphReport] = field(default_factory=list)
    #: one line for the whole model: "3 of 4 attention sites reduced in 3 graphs", or why nothing was accelerated
    summary: str = ""

    @property
    def sites(self) -> list[SiteRow]:
        """Every attention of every graph."""
        return [row for graph in self.graphs for row in graph.sites]

    @property
    def matched(self) -> int:
        """Sites at which tokens can be reduced."""
        return sum(not row.reason for row in self.sites)

    @property
    def declined(self) -> int:
        """Sites left alone, each with its reason."""
        return sum(bool(row.reason) for row in self.sites)

    @property
    def barriers(self) -> list[str]:
        """The places where tokens must be whole: op, reason and source line."""
        return [barrier for graph in self.graphs for barrier in graph.barriers]

    @property
    def unread(self) -> list[str]:
        """Where rows that nobody reads are not computed: how many, of how many, and in which module it begins."""
        return [place for graph in self.graphs for place in graph.unread]

    @property
    def flops_before(self) -> int:
        """Operations (multiply-add = 2) of one call as traced."""
        return sum(graph.flops_before for graph in self.graphs)

    @property
    def flops_after(self) -> int:
        """Operations of one call on fewer tokens, the matching of tokens among them."""
        return sum(graph.flops_after for graph in self.graphs)

    @property
    def tokens_before(self) -> int:
        """Tokens at the first reduced site (0 where there is none)."""
        return next((row.tokens_in for row in self.sites if not row.reason), 0)

    @property
    def tokens_after(self) -> int:
        """Tokens after the last reduced site of the stream that ``tokens_before`` is of."""
        return self.tokens_of_streams[0][1] if self.tokens_of_streams else 0

    @property
    def tokens_of_streams(self) -> list[tuple[int, int]]:
        """Tokens at the first and after the last reduced site of each stream; equal pairs once."""
        streams: dict[Hashable, list[SiteRow]] = {}
        for row in self.sites:
            if not row.reason:
                streams.setdefault((row.graph, row.stream), []).append(row)
        return list(dict.fromkeys((rows[0].tokens_in, rows[-1].tokens_out) for rows in streams.values()))

    @property
    def before(self) -> str:
        """The graphs as readable code, as traced."""
        return "\n\n".join(graph.before for graph in self.graphs)

    @property
    def after(self) -> str:
        """The graphs as readable code, as they would be compiled."""
        return "\n\n".join(graph.after for graph in self.graphs)

    @property
    def plan(self) -> Plan:
        """The decisions as a Plan, to save, edit and pass as ``options={"plan": ...}``."""
        return Plan(sites=[row for graph in self.graphs for row in graph.plan_rows])

    def print(self, console: Console | None = None) -> None:
        """Print the table, the totals, the barriers and the time of each pass."""
        console = console or Console()
        table = Table(title="tofu: attention sites", title_justify="left")
        for name in ("site", "heads", "tokens", "strategy", "why not"):
            table.add_column(name, justify="right" if name in ("heads", "tokens") else "left", overflow="fold")
        for row in self.sites:
            tokens = str(row.tokens_in) if row.reason else f"{row.tokens_in} → {row.tokens_out}"
            cells = (row.id, str(row.heads), tokens, "" if row.reason else row.strategy, row.reason)
            table.add_row(*(Text(printable(cell)) for cell in cells))
        console.print(table)
        console.print(Text(printable(self.summary)))
        for number, graph in enumerate(self.graphs):
            if len(self.graphs) > 1 and graph.state != "empty":
                console.print(Text(printable(f"graph {number}: {graph.outcome}")))
        ratio = f" ({self.flops_after / self.flops_before:.2f} of plain)" if self.flops_before else ""
        counts = ", ".join(f"{before} → {after}" for before, after in self.tokens_of_streams) or "0 → 0"
        console.print(
            f"sites: {self.matched} matched, {self.declined} declined;  tokens: {counts};  "
            f"FLOPs: {self.flops_before / 1e9:.2f} → {self.flops_after / 1e9:.2f} G{ratio}"
        )
        for place in self.unread:
            console.print(Text(printable(place)))
        for barrier in self.barriers:
            console.print(Text(printable(f"whole tokens at {barrier}")))
        seconds: dict[str, float] = {}
        for graph in self.graphs:
            for name, value in graph.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
        console.print("passes: " + ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items()))

    def __str__(self) -> str:
        text = io.StringIO()
        self.print(Console(file=text, width=120))
        return text.getvalue()


def explain(
    model: Any, *example_inputs: Any, options: Options | Mapping[str, Any] | None = None, **example_kwargs: Any
) -> Explanation:
    """Trace ``model(*example_inputs, **example_kwargs)`` and report what ``backend="tofu"`` would do with it.

    The model runs once, eagerly and untouched; nothing is compiled. Grad mode and training mode are the caller's.

    Args:
        model: a module or function, as for torch.compile.
        example_inputs: what it is called with.
        options: the options of the backend.

    Raises:
        OptionError, PlanError: as the backend would.
        TofuError: a pipeline of several modules; says which to take.
    """
    refuse_pipeline(model)
    parsed = Options.parse(options)
    explanation = Explanation()

    outcomes: list[Outcome] = []

    def collect(gm: GraphModule, inputs: Any) -> Any:
        outcomes.append(rewrite(gm, parsed, inputs))
        return gm.forward

    run_once(model, collect, example_inputs, example_kwargs)
    explanation.graphs = [_report(outcome, number) for number, outcome in enumerate(outcomes)]
    explanation.summary = summarise(outcomes)
    return explanation


def share_of_flops(model: Any, batch: Batch, options: Mapping[str, Any]) -> float:
    """Operations of a call that are left under some options, as a share of the plain model's (1 where it has none).

    To be asked before anything is compiled: ``tofu_fx.explain`` clears what Dynamo has compiled.
    """
    explained = explain(model, *batch.args, options={**options, "on_error": "raise"}, **batch.kwargs)
    return explained.flops_after / explained.flops_before if explained.flops_before else 1.0


def _report(outcome: Outcome, number: int) -> GraphReport:
    compilation = outcome.compilation
    if compilation is None or compilation.before is None:
        return GraphReport(outcome.message, [], [], "", "", 0, 0, {}, {}, [], outcome.state)
    rows = [PlanRow.of(site, number) for site in ever_planned(compilation.sites)]
    after = compilation.gm if outcome.rewritten else compilation.before
    return GraphReport(
        outcome.message,
        [_row(site, number, place) for place, site in enumerate(compilation.sites)],
        [str(barrier) for barrier in compilation.barriers] if compilation.reducing else [],
        compilation.before.print_readable(print_output=False),
        after.print_readable(print_output=False),
        count_flops(compilation.before.graph),
        count_flops(after.graph),
        compilation.seconds,
        compilation.axes.unknown_ops,
        rows,
        outcome.state,
        [str(place) for place in compilation.unread],
    )


def _row(site: Site, number: int, place: int) -> SiteRow:
    into = out = site.tokens
    stream: Hashable = None
    strategy, (planned, *_) = "", (*ever_planned([site]), None)
    if isinstance(site, Planned):
        into, out, strategy = site.tokens_in, site.tokens_out, site.strategy if site.r else "none"
        stream = stream_of(site, place)
    r, reason = planned.r if planned else 0, str(site.decline or "")
    return SiteRow(number, site.id, site.module_path, site.heads, into, out, strategy, r, reason, stream)
