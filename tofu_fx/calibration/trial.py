"""A model as calibration sees it: called with a batch, plain or under the choices of a plan.

Dynamo traces the model once for each shape of its inputs; each of its graphs becomes a `Rehearsal`. The model itself is
called through Dynamo, so a model of several graphs, or with Python between its layers, works as it does compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from tofu_fx.calibration.batches import Batch
from tofu_fx.calibration.recording import Rehearsed
from tofu_fx.calibration.refusals import model_refusals
from tofu_fx.calibration.rehearsal import Choices, Rehearsal, Snapshot
from tofu_fx.calibration.timing import room_for_variants
from tofu_fx.errors import CalibrationError, PassError, Unsupported
from tofu_fx.plan.counts import Passage, streams, walk
from tofu_fx.plan.flops import count_flops
from tofu_fx.plan.options import Options
from tofu_fx.sites.site import Planned, Site, ever_planned


@dataclass
class Recorded:
    """One call of one graph in an untouched run: what it was called with, what came out, and the values inside."""

    rehearsal: Rehearsal | None
    inputs: Sequence[Any]
    outputs: Any
    snapshots: Sequence[Snapshot]


@dataclass
class Trial(AbstractContextManager["Trial"]):
    """A model under calibration. As a context manager it is in eval mode, without gradients, and put back after."""

    model: Any
    options: Options
    #: the sites at which tokens can go
    sites: list[Planned] = field(default_factory=list)
    #: the sites that a plan must have a row for: also those that fewer than two free tokens would reach
    planned: list[Planned] = field(default_factory=list)
    #: for each site the number of its graph
    graph_of: dict[str, int] = field(default_factory=dict)
    rehearsals: list[Rehearsal] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)
    #: the last graph of the model, as traced
    last_graph: Graph | None = None
    #: operations of one call in the graphs that have no site
    beside: int = 0
    #: site id -> the matrix of "fisher", ``[C, k]``; None before they are measured
    matrices: Mapping[str, Tensor] | None = None
    #: all that was traced, of other batch sizes, too
    _traced: list[Rehearsal] = field(default_factory=list)
    _record: list[Recorded] = field(default_factory=list)
    _recorded: Batch | None = None
    _recording: bool = False
    _choices: Choices | None = None
    _tokens: dict[str, Tensor] | None = None
    _calls: int = 0
    _ran: bool = False

    def __enter__(self) -> Trial:
        """Take the model in hand."""
        modules = list(self.model.modules()) if isinstance(self.model, torch.nn.Module) else []
        self._modes = [(module, module.training) for module in modules]
        for module in modules:
            module.training = False
        self._buffers = [
            (module, name, buffer, buffer.clone(), buffer._version)
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        torch._dynamo.reset()
        self._room = room_for_variants()
        self._room.__enter__()
        self._call: Callable[..., Any] = torch.compile(self.model, backend=self._backend, dynamic=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the model as it was found."""
        for module, training in self._modes:
            module.training = training
        for module, name, buffer, value, version in self._buffers:
            if buffer._version != version:
                buffer.copy_(value)
            module._buffers[name] = buffer
        self._room.__exit__(None, None, None)
        torch.set_grad_enabled(self._grad)
        self.forget()
        torch._dynamo.reset()

    def streams(self) -> list[list[Planned]]:
        """The sites of each stream in order."""
        return streams(self.sites, lambda site, _: self.stream_of[site.id])

    def walk(
        self, removes: Callable[[Planned, int], int], sites: Sequence[Planned] | None = None
    ) -> Iterator[tuple[Planned, Passage]]:
        """``tofu_fx.plan.counts.walk`` over the sites of all graphs, or over some of them."""
        stream_of = self.stream_of
        return walk(self.sites if sites is None else sites, removes, stream=lambda site, _: stream_of[site.id])

    def limited(self, wanted: Mapping[str, int], sites: Sequence[Planned] | None = None) -> dict[str, int]:
        """Tokens to remove at each site: those wanted, or the most that can go of those that arrive."""
        counted = self.walk(lambda site, arriving: min(wanted[site.id], site.cap(arriving)), sites)
        return {site.id: passage.removed for site, passage in counted}

    def require_sites(self) -> None:
        """Raise CalibrationError, with the reasons, where the model (called once) has no site."""
        if not self.sites:
            reasons = "; ".join(self.declined[:3]) or "its graphs have no attention"
            raise CalibrationError(f"the model has no site at which tokens can be reduced: {reasons}")

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """For compiling the model in other ways: what Dynamo compiled of it meanwhile is forgotten, this trial's is
        traced again when it is needed.
        """
        torch._dynamo.reset()
        try:
            yield
        finally:
            torch._dynamo.reset()

    def plain(self, batch: Batch) -> Any:
        """The outputs of the untouched model.

        Raises:
            CalibrationError: the model refuses the batch.
        """
        self._choices = None
        with model_refusals(self.model, batch):
            return self._run(batch)

    def record(self, batch: Batch) -> Any:
        """The outputs of a run that reduces nothing; later calls of ``reduced`` with this batch start from it."""
        self.forget()
        self._choices, self._recording = {}, True
        try:
            outputs = self._run(batch)
        finally:
            self._recording = False
        self._recorded = batch
        return outputs

    def reduced(self, batch: Batch, choices: Choices) -> Any:
        """The outputs under some choices."""
        if batch is not self._recorded:
            self.forget()
        self._choices = choices
        return self._run(batch)

    def differentiable(self, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """The outputs of a run that reduces nothing, and zeros ``[B, N, C]`` added to the tokens behind each site.

        What gradient these have is that of the tokens.

        Parameters keep no gradients, and nothing else is left of the run.
        """
        self.forget()
        self._choices, self._tokens = {}, {}
        try:
            return self._run(batch), self._tokens
        finally:
            self._tokens = None

    def project(self, matrices: Mapping[str, Tensor]) -> None:
        """Compare tokens by these matrices where "fisher" is chosen; at sites without one it is no choice."""
        self.matrices = matrices
        for rehearsal in self._traced:
            rehearsal.project(matrices)

    def forget(self) -> None:
        """Let go of what was recorded."""
        self._record, self._recorded = [], None

    def recorded(self, name: str) -> tuple[Rehearsal, Rehearsed, Sequence[Any], Snapshot] | None:
        """Graph, site, inputs and values ahead of it in the recorded run; None where it cannot be started from.

        A batch of another size has a graph of its own, so the site is that of the recorded one.
        """
        for call in self._record:
            for number, entry in enumerate(call.rehearsal.sites if call.rehearsal else ()):
                if entry.site.id == name and call.snapshots:
                    assert call.rehearsal is not None
                    return call.rehearsal, entry, call.inputs, call.snapshots[number]
        return None

    def rehearsed(self) -> list[Rehearsed]:
        """Every site, in the order of ``sites``."""
        return [entry for rehearsal in self.rehearsals for entry in rehearsal.sites]

    @property
    def stream_of(self) -> dict[str, tuple[int, int]]:
        """For each site its stream: the graph's number, and the stream's in the graph."""
        return {site.id: (self.graph_of[site.id], site.stream) for site in self.sites}

    def _run(self, batch: Batch) -> Any:
        self._calls = 0
        try:
            outputs = self._call(*batch.args, **batch.kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise (error.inner_exception or error) from None
        if self._choices is not None and not self._calls:
            # Beyond its limit of compiled versions Dynamo runs the model as it is: that would measure nothing.
            raise CalibrationError(
                "Dynamo ran the model without its graphs, so that nothing would be measured; calibrate with batches of "
                "one size"
            )
        self._ran = True
        return outputs

    def _backend(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.last_graph = gm.graph
        try:
            rehearsal = Rehearsal.of(gm, inputs, self.options)
        except Unsupported as reason:
            self.declined.append(str(reason))
            return gm.forward
        except PassError as error:
            raise CalibrationError(f"the model cannot be calibrated, because a pass failed on it: {error}") from error
        if self.matrices is not None:
            rehearsal.project(self.matrices)
        self._traced.append(rehearsal)
        compilation = rehearsal.compilation
        self.last_graph = compilation.before.graph if compilation.before is not None else gm.graph
        self._decline(compilation.sites)
        self._note(rehearsal)
        return lambda *args: self._graph(gm, rehearsal, args)

    def _note(self, rehearsal: Rehearsal) -> None:
        sites = [entry.site for entry in rehearsal.sites]
        if not sites and not self._ran:
            before, unread = rehearsal.compilation.before, rehearsal.compilation.unread_flops
            self.beside += count_flops(before.graph) - unread if before is not None else 0
        known = {site.id for site in self.sites}
        again = [site.id for site in sites if site.id in known]
        if again and not self._ran:  # later it is the same graph for another batch size
            raise CalibrationError(
                f"several graphs of the model have a site {again[0]!r} (a graph break in a loop over its blocks?): the "
                "rows of a plan could not be distinguished; find the break with TORCH_LOGS=graph_breaks, and remove it"
            )
        if sites and not again:
            number = len(self.rehearsals)
            planned = ever_planned(rehearsal.compilation.sites)
            self.graph_of.update((site.id, number) for site in planned)
            self.planned.extend(planned)
            self.sites.extend(sites)
            self.rehearsals.append(rehearsal)

    def _decline(self, sites: Sequence[Site]) -> None:
        reasons = [f"{site.id}: {site.decline}" for site in sites if not site.matched]
        self.declined.extend(reason for reason in reasons if reason not in self.declined)

    def _graph(self, gm: GraphModule, rehearsal: Rehearsal, args: Sequence[Any]) -> Any:
        number, self._calls = self._calls, self._calls + 1
        if self._tokens is not None:
            with torch.enable_grad():
                return rehearsal.run(args, {}, tokens=self._tokens)[0] if rehearsal.sites else gm.forward(*args)
        if self._choices is None or not rehearsal.sites:
            outputs = gm.forward(*args)
            if self._recording:
                self._record.append(Recorded(None, args, outputs, ()))
            return outputs
        if self._recording:
            resumable = rehearsal.resumable
            outputs, snapshots = rehearsal.snapshots(args) if resumable else (rehearsal.run(args, {})[0], ())
            self._record.append(Recorded(rehearsal, args, outputs, snapshots))
            return outputs
        if number >= len(self._record):
            return rehearsal.run(args, self._choices)[0]
        first = next((i for i, call in enumerate(self._record) if self._touched(call) is not None), len(self._record))
        call = self._record[number]
        if number < first:
            return call.outputs
        place = self._touched(call)
        start = call.snapshots[place] if number == first and place is not None and call.snapshots else None
        return rehearsal.run(args, self._choices, start)[0]

    def _touched(self, call: Recorded) -> int | None:
        """The first site of a recorded call at which the choices do something."""
        assert self._choices is not None
        for number, entry in enumerate(call.rehearsal.sites if call.rehearsal else ()):
            choice = self._choices.get(entry.site.id)
            if choice is not None and choice.r:
                return number
        return None
