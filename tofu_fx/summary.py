"""What is said of a compiled model, whose graphs come one after another: a warning only if nothing at all was reduced.

Graph breaks and DistributedDataParallel's buckets make several graphs of a model, most of them without attention. All
those of one call are collected, and Dynamo is asked to call back when the call ends.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakKeyDictionary

from tofu_fx.compilation import Compilation
from tofu_fx.dynamo import Call, enclosing_call, frame_id
from tofu_fx.errors import TofuWarning

logger = logging.getLogger("tofu_fx")
NOTHING = "nothing was accelerated: "


@dataclass(frozen=True)
class Outcome:
    """What became of one graph.

    ``compilation`` is None where the passes could not run; ``warnings`` are said of this graph, whatever became of the
    model's others. States: "reduced"; "idle": nothing could be reduced; "empty": there was nothing to reduce, without
    any product of matrices; "failed": on the way, so that the graph is compiled untouched.
    """

    compilation: Compilation | None
    message: str
    warnings: tuple[str, ...] = ()
    state: Literal["reduced", "idle", "empty", "failed"] = "idle"

    @property
    def rewritten(self) -> bool:
        """Whether the rewritten graph is to be compiled, not the one that came."""
        return self.state == "reduced" or (self.compilation is not None and bool(self.compilation.unread))


@dataclass
class Model:
    """What one ``torch.compile`` has done so far."""

    #: the functions, by Dynamo's numbers, of which a graph was reduced in an earlier call
    reduced: set[int | None] = field(default_factory=set)
    #: what was said already, and is not to be said again
    said: set[str] = field(default_factory=set)

    def say_once(self, message: str) -> None:
        """Warn, the first time."""
        if message not in self.said:
            self.said.add(message)
            warn(message)


_MODELS: WeakKeyDictionary[object, Model] = WeakKeyDictionary()


@dataclass
class Summary:
    """The graphs that are compiled during one call of a model; to be called when that call ends."""

    model: Model
    graphs: list[tuple[int | None, Outcome]] = field(default_factory=list)

    def __call__(self) -> None:
        """Say what became of them all."""
        graphs, self.graphs = self.graphs, []
        message = summarise([outcome for _, outcome in graphs])
        reduced = {number for number, outcome in graphs if outcome.state == "reduced"}
        # A function that runs whole for these inputs although it was reduced for others is news; what never had
        # anything to reduce, in a model that has been reduced, is none.
        news = not self.model.reduced or any(number in self.model.reduced for number, _ in graphs)
        self.model.reduced |= reduced
        states = {outcome.state for _, outcome in graphs}
        if "idle" in states and not states & {"reduced", "failed"} and news:
            warn(message)
        else:
            logger.info(message)


def note(outcome: Outcome) -> Model:
    """Take down what became of a graph, to be told when the call ends; at once where no end of it is known."""
    call = enclosing_call()
    summary = _summary_of(call)
    summary.graphs.append((frame_id(), outcome))
    if call is None:
        summary()
    return summary.model


def _summary_of(call: Call | None) -> Summary:
    if call is None:
        return Summary(Model())
    for known in call.at_end:
        if isinstance(known, Summary):
            return known
    summary = Summary(Model() if call.model is None else _MODELS.setdefault(call.model, Model()))
    call.at_end.append(summary)
    return summary


def summarise(outcomes: Sequence[Outcome]) -> str:
    """One line for all graphs of a model: "3 of 4 attention sites reduced in 3 graphs", or why nothing was."""
    compilations = [outcome.compilation for outcome in outcomes if outcome.compilation is not None]
    reducing = sum(len(compilation.reducing) for compilation in compilations)
    if reducing:
        where = f" in {len(outcomes)} graphs" if len(outcomes) > 1 else ""
        return f"{reducing} of {sum(len(c.sites) for c in compilations)} attention sites reduced{where}"
    # Why an attention was left alone says more than that another graph has none, or is without any product.
    told = [outcome for outcome in outcomes if outcome.state != "empty"] or list(outcomes)
    told = [o for o in told if o.compilation is None or o.compilation.sites] or told
    reasons = list(dict.fromkeys(outcome.message for outcome in told))
    if len(reasons) <= 1:
        return "".join(reasons)
    bare = [reason.removeprefix(NOTHING) for reason in reasons]
    return f"{NOTHING}{'; '.join(bare[:3])}{'; ...' if len(bare) > 3 else ''} ({len(outcomes)} graphs)"


def warn(message: str) -> None:
    """Warn in the name of the compiler."""
    warnings.warn(f"tofu_fx: {message}", TofuWarning, stacklevel=4)
