"""What a long random run tries: transformers and raw graphs with options of the backend, each a small record."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tofu_fx.testing.compare import randomise
from tofu_fx.testing.raw_graphs import ALIKE, ATTENTIONS, BY_PLACE, IN_PLACE, MIXING, GraphBuilder
from tofu_fx.testing.spec import ODD, WAYS, Spec
from tofu_fx.testing.transformers import Transformer

#: the steps of a raw graph, called by their number
STEPS = (*ATTENTIONS, *ALIKE, *IN_PLACE, *BY_PLACE, *MIXING)


@dataclass(frozen=True)
class Steps:
    """A raw graph: for each step its number in `STEPS` and which two of the values so far it takes.

    Returned is the last value: whole, or pooled over its tokens (``pooling`` "mean" or "max").
    """

    steps: tuple[tuple[int, int, int], ...] = ()
    pooling: str = "none"


@dataclass(frozen=True)
class Use:
    """How the backend is called. ``dynamic``: the batch is a symbol; ``grid``: the tokens are said to be an image's."""

    placement: str = "stream"
    strategy: str = "mlerp"
    match: str = "auto"
    r: int = 1
    proportional_attention: bool = True
    mlp: bool = False
    reuse: str = "block"
    cell: int = 2
    grid: bool = False
    dynamic: bool = False
    unread: str = "keep"
    inner_backend: str = "eager"


USES: dict[str, tuple[Any, ...]] = {
    "placement": ("stream", "stream", "branch"),
    "strategy": ("mlerp", "auto", "prune", "mean"),
    "match": ("auto", "keys", "heads", "queries_keys", "features", "sketch"),
    "r": (1, 2, 3),
    "proportional_attention": (True, True, True, False),
    "mlp": (False, False, True),
    "reuse": ("block", "resolution", "none"),
    "cell": (2, 3),
    "grid": (False, True),
    "dynamic": (False, False, True),
    "unread": ("keep", "drop"),
    "inner_backend": ("eager", "eager", "eager", "aot_eager"),
}


@dataclass(frozen=True)
class Case:
    """One thing to try. ``duplicates``: the patches are copies of two or three, so that merging them loses nothing."""

    subject: Spec | Steps
    use: Use = field(default_factory=Use)
    batch: int = 2
    seed: int = 0
    duplicates: bool = False

    @property
    def kind(self) -> str:
        """ "transformers" or "graphs"."""
        return "graphs" if isinstance(self.subject, Steps) else "transformers"

    def tidy(self) -> Case:
        """The nearest case that can be built."""
        case = self
        if isinstance(case.subject, Steps):
            return replace(case, batch=2, duplicates=False, use=replace(case.use, dynamic=False, grid=False))
        spec = case.subject.tidy()
        if (
            case.duplicates
        ):  # what distinguishes copies is left out, and so is a grid, which pairs cells, not neighbours
            spec = replace(spec, positions="none", rotary=False, mask="none")
            use = replace(case.use, grid=False, proportional_attention=True)
            spec = replace(spec, pooling="tokens") if spec.pooling == "conv" and use.placement == "branch" else spec
            case = replace(case, use=replace(use, r=min(use.r, (spec.patches - RUNS) // (spec.depth + 1))))
        if (spec.mixing != "none" and case.batch < 2) or (spec.mixing == "groups" and case.batch % 2):
            case = replace(case, batch=2)
        if case.use.placement == "stream":
            case = replace(case, use=replace(case.use, grid=False, mlp=False, cell=2, reuse="block"))
        if not case.use.grid:
            case = replace(case, use=replace(case.use, cell=2))
        return replace(case, subject=spec)

    def options(self, r: int | tuple[int, ...] | None = None) -> dict[str, Any]:
        """The options of the backend; ``r`` in place of the case's own."""
        use = self.use
        found: dict[str, Any] = {
            "r": use.r if r is None else r, "strategy": use.strategy, "match": use.match, "placement": use.placement,
            "proportional_attention": use.proportional_attention, "unread": use.unread,
        }  # fmt: skip
        if use.placement == "branch":
            found.update(branches=("attention", "mlp") if use.mlp else ("attention",), reuse=use.reuse)
        if use.grid and isinstance(self.subject, Spec) and self.subject.prefix + self.subject.suffix == 0:
            found.update(grid=self.subject.grid, cell=use.cell)
        return found

    def made(self) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """The model in eval mode with random parameters, and what it is called with; the same on every call."""
        torch.manual_seed(self.seed)
        if isinstance(self.subject, Steps):
            return _graph(self.subject, self.seed)
        model = Transformer(self.subject)
        randomise(model, self.seed)
        return model, self.inputs(self.batch)

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs of a transformer, with its batch marked as one that changes if the case says so."""
        assert isinstance(self.subject, Spec)
        transformer = Transformer(replace(self.subject, depth=0))
        inputs = transformer.example_inputs(batch, self.seed)
        if self.duplicates:
            inputs = (copies(inputs[0], self.seed), *inputs[1:])
        for value in inputs if self.use.dynamic and batch > 1 else ():
            torch._dynamo.maybe_mark_dynamic(value, 0)
        return inputs

    def __repr__(self) -> str:
        return brief(self)


RUNS = 3


def copies(x: Tensor, seed: int) -> Tensor:
    """``[B, N, C]`` of `RUNS` tokens in each sample, copied in runs of random lengths.

    In a run of two and more there is an even and an odd place, before any reduction and after it, so that each
    reduction finds copies to merge while there are at least 2 r + `RUNS` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for sample in x:
        cuts = (torch.randperm(sample.shape[0] - 1, generator=generator)[: RUNS - 1] + 1).sort().values
        rows.append(sample[torch.bucketize(torch.arange(sample.shape[0]), cuts, right=True)])
    return torch.stack(rows)


class _Graph(nn.Module):
    """A graph on copies of its inputs: it may change them in place, and they are used again."""

    def __init__(self, gm: Any) -> None:
        super().__init__()
        self.gm = gm

    def forward(self, *inputs: Tensor) -> Any:
        return self.gm(*[value.clone() for value in inputs])


def _graph(steps: Steps, seed: int) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    graph = GraphBuilder(seed)
    for number, left, right in steps.steps:
        values = graph.values
        values.append(STEPS[number](graph, values[left % len(values)], values[right % len(values)]))
    drawn = graph.finish([graph.values[-1]]) if steps.pooling == "none" else graph.finish([], steps.pooling)
    return _Graph(drawn.gm).eval(), drawn.inputs


def draw(seed: int, number: int, only: str | None = None) -> Case:
    """The case of this number in the run of this seed; ``only`` "transformers" or "graphs"."""
    chance = random.Random(f"{seed}/{number}")
    use = Use(**{name: chance.choice(ways) for name, ways in USES.items()})
    if (only or chance.choice(("transformers", "transformers", "graphs"))) == "graphs":
        count, steps = chance.randint(1, 6), []
        for place in range(count):
            number = chance.randrange(len(ATTENTIONS)) if place == 0 else chance.randrange(len(STEPS))
            steps.append((number, chance.randint(0, 9), chance.randint(0, 9)))
        # The newest value goes on, mostly: else hardly anything would be computed from the first attention.
        steps = [(number, a if chance.random() < 0.3 else -1, b) for number, a, b in steps]
        return Case(Steps(tuple(steps), chance.choice(("none", "mean", "max"))), use, 2, chance.randint(0, 99)).tidy()
    spec = {}
    for name, ways in WAYS.items():
        spec[name] = ways[0] if name in ODD and chance.random() < 0.75 else chance.choice(ways)
    return Case(Spec(**spec), use, chance.randint(1, 4), chance.randint(0, 99), chance.random() < 0.4).tidy()


def simpler(case: Case, chunk: int) -> Iterator[Case]:
    """The case with ``chunk`` neighbouring parts of it put back to what they are by default, chunk by chunk.

    The parts are fields of the case, the options and the spec, and the steps of a graph, which are left out.
    """
    parts = _parts(case)
    for start in range(0, len(parts), chunk):
        changed = case
        for part in reversed(parts[start : start + chunk]):
            changed = part(changed)
        changed = changed.tidy()
        if changed != case:
            yield changed


def _parts(case: Case) -> list[Callable[[Case], Case]]:
    """The ways in which a case can be made simpler, each one part of it."""
    found: list[Callable[[Case], Case]] = []
    if isinstance(case.subject, Steps):
        found += [lambda c, i=i: _without_step(c, i) for i in range(len(case.subject.steps))]  # type: ignore[misc]
    for holder in ("subject", "use"):
        record = getattr(case, holder)
        for entry in fields(record):
            value = getattr(record, entry.name)
            least = _LEAST.get(entry.name, entry.default) if isinstance(record, Spec) else entry.default
            if entry.name != "steps" and value != least:
                goals = [least] if value == entry.default else [entry.default, least]
                found += [lambda c, h=holder, n=entry.name, v=v: _changed(c, h, n, v) for v in goals]  # type: ignore[misc]
    found += [lambda c, n=n: replace(c, batch=n) for n in (2, 1) if n < case.batch]  # type: ignore[misc]
    return [*found, lambda c: replace(c, seed=0), lambda c: replace(c, duplicates=False)]


def _changed(case: Case, holder: str, name: str, value: Any) -> Case:
    record = getattr(case, holder)
    return replace(case, **{holder: replace(record, **{name: value})})


#: simpler than the defaults
_LEAST: dict[str, Any] = {"depth": 1, "prefix": 0, "pooling": "mean"}


def _without_step(case: Case, place: int) -> Case:
    assert isinstance(case.subject, Steps)
    steps = case.subject.steps
    return replace(case, subject=replace(case.subject, steps=steps[:place] + steps[place + 1 :]))


def brief(record: Any) -> str:
    """A record as the call that makes it, without the fields that are as by default."""
    shown = []
    for entry in fields(record):
        value = getattr(record, entry.name)
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        if value != default:
            shown.append(f"{entry.name}={brief(value) if is_dataclass(value) else repr(value)}")
    return f"{type(record).__name__}({', '.join(shown)})"
