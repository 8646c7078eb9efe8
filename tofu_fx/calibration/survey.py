"""What calibration measures before it plans: outputs, linearity and sensitivity of every site, and what time costs."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from tofu_fx.calibration.batches import Batch, device_of
from tofu_fx.calibration.cost import CostModel, count_operations, fit_weights
from tofu_fx.calibration.fisher import COLUMNS, DRAWS, SAMPLES, measure_information
from tofu_fx.calibration.linearity import site_linearity, spread
from tofu_fx.calibration.output_error import METRICS, OutputError, choose_metric
from tofu_fx.calibration.progress import Progress
from tofu_fx.calibration.rehearsal import Choice, Choices
from tofu_fx.calibration.sensitivity import Sensitivity, candidates, curve_kind, first_kind
from tofu_fx.calibration.timing import time_calls
from tofu_fx.calibration.trial import Trial
from tofu_fx.errors import CalibrationError
from tofu_fx.plan.records import Spread
from tofu_fx.plan.words import RANK

#: of the inputs, about as many are used to measure single sites; whole plans are measured on all
SITE_SAMPLES = 16
#: shares of the arriving tokens that go at every site, in the plans by which the cost model is fitted
PROFILES = (0.0, 0.03, 0.1, 0.25, 0.5)
#: a device on which none of these takes less than this share of the untouched time does not get faster by fewer tokens
WORTH = 0.97


@dataclass
class Survey:
    """A model measured on the calibration inputs."""

    trial: Trial
    batches: Sequence[Batch]
    bar: Progress
    random: random.Random
    user_metric: Any = None
    plain: list[Any] = field(default_factory=list)
    sensitivity: dict[str, Sensitivity] = field(default_factory=dict)
    #: site id -> linearity between samples, and between the tokens that would be merged
    linearity: dict[str, tuple[Spread | None, Spread | None]] = field(default_factory=dict)
    #: site id -> the matrix of "fisher" with all its columns, and why others have none
    information: dict[str, torch.Tensor] = field(default_factory=dict)
    without_information: dict[str, str] = field(default_factory=dict)
    passes: float = 0.0

    def run_plain(self) -> None:
        """The plain model's outputs; from then on the sites and the metric are known.

        Raises:
            CalibrationError: outputs that are no numbers, or no site.
        """
        self.bar.phase("plain model", len(self.batches))
        for number, batch in enumerate(self.batches):
            outputs = self.trial.plain(batch)
            leaves = torch.utils._pytree.tree_leaves(outputs)
            floats = [value for value in leaves if isinstance(value, torch.Tensor) and value.is_floating_point()]
            if any(bool(value.isnan().any()) for value in floats):
                raise CalibrationError(
                    f"the plain model's outputs hold NaN for calibration batch {number}: nothing can be compared with "
                    "them; check the weights and the inputs"
                )
            self.plain.append(outputs)
            self.passes += batch.samples / self.samples
            self.bar.advance(1)
        self.trial.require_sites()
        self.metric: OutputError = choose_metric(self.user_metric, self.plain[0], self.trial.last_graph)
        nothing = float(self.metric(self.plain[0], self.plain[0]).mean())
        if not abs(nothing) <= 1e-6:
            raise CalibrationError(
                f"metric: {self.metric.name} of equal outputs is {nothing:.3g}; it must be an error, 0 where nothing "
                "changed (a score such as accuracy is not)"
            )

    @property
    def samples(self) -> int:
        """All calibration samples."""
        return sum(batch.samples for batch in self.batches)

    @property
    def few(self) -> list[int]:
        """The batches on which single sites are measured."""
        numbers: list[int] = []
        for number in range(len(self.batches)):
            if self.samples_of(numbers) < SITE_SAMPLES:
                numbers.append(number)
        return numbers

    def samples_of(self, numbers: Sequence[int]) -> int:
        """The samples of some batches."""
        return sum(self.batches[number].samples for number in numbers)

    def errors(self, outputs: Any, number: int) -> list[float]:
        """The errors of a batch's outputs, one for each sample (a metric's single number counts for each)."""
        found = self.metric(outputs, self.plain[number]).tolist()
        return found if len(found) > 1 else found * self.batches[number].samples

    def score(self, name: str) -> Spread | None:
        """A site's linearity: between samples where there are several, else between tokens."""
        between, pairs = self.linearity[name]
        return between or pairs

    def measure_information(self, seed: int) -> None:
        """What the outputs feel of the tokens behind each site; from then on "fisher" is a choice, where it can be."""
        parts = sum(-(-batch.samples // SAMPLES) for batch in self.batches)
        self.bar.phase("gradients", parts)
        found = measure_information(self.trial, self.batches, self.metric.name == "kl", seed, self.bar.advance)
        self.passes += 1 + 2 * DRAWS  # a backward pass counts as two
        self.information = found.matrices(max(COLUMNS))
        self.without_information = found.refusals
        self.trial.project({name: matrix[:, :RANK] for name, matrix in self.information.items()})
        for reason in dict.fromkeys(found.refusals.values()):
            names = [name for name, why in found.refusals.items() if why == reason]
            where = f"{names[0]}" if len(names) == 1 else f"{len(names)} sites"
            self.bar.say(f"tokens are not compared by 'fisher' at {where}: {reason}")

    # ---- sites -------------------------------------------------------------------------------------------------------

    def measure_sites(self) -> None:
        """Linearity and sensitivity of every site, batch by batch, each from the values of one untouched run."""
        entries = self.trial.rehearsed()
        errors: dict[tuple[str, Choice], list[float]] = {}
        scores: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {entry.site.id: [] for entry in entries}
        self.bar.phase("single sites", len(self.few) * sum(1 + len(candidates(entry)) for entry in entries))
        for number in self.few:
            batch, plain = self.batches[number], self.plain[number]
            self._check_untouched(batch, plain)
            for entry in entries:
                found = self._linearity(entry.site.id)
                scores[entry.site.id].extend([found] if found is not None else [])
                self.bar.advance(1)
                for choice in candidates(entry):
                    outputs = self.trial.reduced(batch, {entry.site.id: choice})
                    errors.setdefault((entry.site.id, choice), []).extend(self.errors(outputs, number))
                    self.passes += batch.samples / self.samples
                    self.bar.advance(1)
        self.trial.forget()
        self.sensitivity = {entry.site.id: Sensitivity(entry.site, curve_kind(entry)) for entry in entries}
        for (name, choice), values in errors.items():
            self.sensitivity[name].measured[choice] = self.metric.loss(values)
        for name, pairs in scores.items():
            self.linearity[name] = spread([score for score, _ in pairs]), spread([score for _, score in pairs])

    def _linearity(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        found = self.trial.recorded(name)
        if found is None:
            return None
        rehearsal, entry, inputs, start = found
        x = start.values[entry.fuse.args[0]]  # type: ignore[index]
        partners = _partners(x.shape[0], self.random)
        scores = site_linearity(rehearsal, entry, inputs, start, torch.tensor(partners, device=x.device))
        return None if scores is None else (scores[0].cpu(), scores[1].cpu())

    def _check_untouched(self, batch: Batch, plain: Any) -> None:
        """Run a batch with no token removed: what does not give the plain outputs cannot be measured."""
        leaves = torch.utils._pytree.tree_leaves(plain)
        steps = [torch.finfo(v.dtype).eps for v in leaves if isinstance(v, torch.Tensor) and v.is_floating_point()]
        metric = METRICS["relative_l2"] if steps else self.metric  # the user's knows what to do with whole numbers
        error = float(metric(self.trial.record(batch), plain).mean())
        # An attention with an empty mask may take another kernel, which rounds otherwise.
        if error <= max(1e-4, 20 * max(steps, default=0.0)):
            return
        again = float(metric(self.trial.plain(batch), plain).mean())
        said = f"with no token removed the outputs differ by {error:.3g} ({metric.name}) from the plain model's"
        if not again <= error / 10:
            raise CalibrationError(f"{said}, and so do its own from one call to the next: it is random in eval mode")
        raise CalibrationError(f"{said}: the model does something that calibration misses; please report it")

    # ---- costs -------------------------------------------------------------------------------------------------------

    def operations(self) -> list[CostModel]:
        """A cost model of each graph that counts operations."""
        return count_operations(self.trial.rehearsals, self.trial.beside)

    def seconds(self) -> list[CostModel] | None:
        """A cost model of each graph in seconds of this device; None where its time does not depend on the tokens."""
        models = self.operations()
        batch = self.batches[0].split(max(1, self.batches[0].samples // 2))[0]
        device = device_of(self.trial.model, [batch])
        self.bar.phase("cost model", len(PROFILES))
        rows, seconds = [], []
        for share in PROFILES:
            choices = self._removing(share)
            self.trial.reduced(batch, choices)  # the first call of a shape traces
            timed = time_calls({"plan": partial(self.trial.reduced, batch, choices)}, device, rounds=3, warmup=0)
            parts = [model.features(choices) for model in models]
            rows.append([sum(column) for column in zip(*parts, strict=True)])
            seconds.append(timed["plan"].seconds)
            self.bar.advance(1)
        weights = fit_weights(rows, seconds)
        fitted = [sum(w * value for w, value in zip(weights, row, strict=True)) for row in rows]
        if min(fitted) > WORTH * fitted[0]:
            return None
        flop, byte, reduction, constant = weights
        weighted = [replace(m, per_flop=flop, per_byte=byte, per_reduction=reduction) for m in models]
        return [replace(weighted[0], constant=constant), *weighted[1:]]

    def _removing(self, share: float) -> Choices:
        """The same share of the arriving tokens gone at every site."""
        counted = self.trial.walk(lambda site, arriving: min(math.floor(share * arriving), site.cap(arriving)))
        return {site.id: Choice(*first_kind(site), passage.removed) for site, passage in counted}


def _partners(samples: int, rng: random.Random) -> list[int]:
    """A partner for each sample, itself for none (of several)."""
    order = list(range(samples))
    rng.shuffle(order)
    partner = [0] * samples
    for place, sample in enumerate(order):
        partner[sample] = order[(place + 1) % samples]
    return partner
