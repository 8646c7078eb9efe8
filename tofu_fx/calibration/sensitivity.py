"""What each site's candidates cost at the model's output, measured; and what is predicted from that for whole plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from tofu_fx.calibration.recording import Rehearsed
from tofu_fx.calibration.rehearsal import Choice
from tofu_fx.plan.counts import walk
from tofu_fx.plan.schedule import default_match
from tofu_fx.sites.site import Planned

#: shares of a site's free tokens that are removed to measure its error curve; half is the most that can go at once
SHARES = (0.08, 0.22, 0.5)
#: the share at which the other candidates are measured; their curves are taken to have the first one's form
COMMON_SHARE = SHARES[1]

#: how tokens are reduced: strategy, and what they are compared by
Kind = tuple[str, str]


def first_kind(site: Planned) -> Kind:
    """How tokens are reduced at a site where nothing was measured: by MLERP, the paper's; in a branch by the mean."""
    return "mean" if site.placement == "branch" else "mlerp", default_match(site)


def curve_kind(entry: Rehearsed) -> Kind:
    """The kind whose whole curve is measured at a site: that of `first_kind`, by what the output feels if it can be."""
    merge, match = first_kind(entry.site)
    return merge, "fisher" if "fisher" in entry.metrics else match


def kinds(entry: Rehearsed) -> list[Kind]:
    """The kinds of reduction that are candidates at a site: `curve_kind`, other ways to merge, and prune at the end."""
    merge, match = first_kind(entry.site)
    first = curve_kind(entry)
    other = [("mlerp", match)] if merge != "mlerp" else []
    # A group's mean is what has the least of Ward's cost, but not the norm of its members.
    other += [(way, "fisher") for way in ("mlerp", "mean", "prune") if way != merge and "fisher" in entry.metrics]
    return [first, *((merge, kind) for kind in entry.metrics if kind != first[1]), *other, ("prune", match)]


def candidates(entry: Rehearsed) -> list[Choice]:
    """What is tried at one site while all others are left alone."""
    tried = [Choice(*curve_kind(entry), removed(entry.site, share)) for share in SHARES]
    tried += [Choice(*kind, removed(entry.site, COMMON_SHARE)) for kind in kinds(entry)[1:]]
    return list(dict.fromkeys(tried))


def removed(site: Planned, share: float) -> int:
    """A share of a site's free tokens, at least one and at most what can go."""
    return max(1, min(round(share * free_tokens(site, site.tokens)), site.cap(site.tokens)))


def free_tokens(site: Planned, tokens: int) -> int:
    """Of the tokens that arrive, those that are not protected."""
    return max(tokens - site.prefix - site.suffix, 1)


@dataclass(frozen=True)
class Curve:
    """The error of one kind of reduction at one site over the share of tokens that goes, in the power that adds up.

    Between what was measured the logarithms are interpolated, beyond it extrapolated.
    """

    shares: tuple[float, ...]
    errors: tuple[float, ...]

    def __call__(self, share: Any) -> Any:
        """Errors for an array of shares; 0 for none."""
        share = numpy.asarray(share, dtype=float)
        known, values = numpy.log(self.shares), numpy.log(numpy.maximum.accumulate(numpy.maximum(self.errors, 1e-12)))
        with numpy.errstate(divide="ignore"):
            at = numpy.log(share)
        inside = numpy.interp(at, known, values)
        first = (values[1] - values[0]) / (known[1] - known[0]) if len(known) > 1 else 1.0
        below = values[0] + max(first, 1.0) * (at - known[0])
        return numpy.where(share > 0, numpy.exp(numpy.where(at < known[0], below, inside)), 0.0)

    def scaled(self, factor: float) -> Curve:
        """The same form, higher or lower."""
        return Curve(self.shares, tuple(factor * error for error in self.errors))


@dataclass
class Sensitivity:
    """The measured errors of one site's candidates, and its curves."""

    site: Planned
    #: the kind whose whole curve is measured
    first: Kind
    measured: dict[Choice, float] = field(default_factory=dict)

    def curves(self) -> dict[Kind, Curve]:
        """A curve for each kind that was measured without a failure."""
        free = free_tokens(self.site, self.site.tokens)
        first = self.first
        points = sorted((c.r / free, e) for c, e in self.measured.items() if (c.strategy, c.match) == first)
        finite = [(share, error) for share, error in points if numpy.isfinite(error)]
        if not finite:
            return {}
        curve = Curve(tuple(share for share, _ in finite), tuple(error for _, error in finite))
        found = {first: curve}
        for choice, error in self.measured.items():
            kind = (choice.strategy, choice.match)
            if kind != first and numpy.isfinite(error):
                found[kind] = curve.scaled(error / max(float(curve(choice.r / free)), 1e-12))
        return found


@dataclass(frozen=True)
class Predictor:
    """The error of a plan: each site's curve at the share that goes there, weighted, added up.

    ``weights`` start at one, and are fitted to the plans that were measured (``fitted``).
    """

    sites: Sequence[Planned]
    #: site id -> the stream that it is of
    stream_of: Mapping[str, Any]
    curves: Mapping[str, Curve]
    weights: Mapping[str, float]

    def contribution(self, site: Planned, arriving: int, gone: Any) -> Any:
        """What is attributed to one site."""
        if site.id not in self.curves:
            return numpy.where(numpy.asarray(gone) > 0, numpy.inf, 0.0)
        return self.weights[site.id] * self.curves[site.id](numpy.asarray(gone) / free_tokens(site, arriving))

    def contributions(self, choices: Mapping[str, Choice]) -> list[float]:
        """What is attributed to each site of a plan."""
        counted = walk(
            self.sites,
            lambda site, _: choices[site.id].r if site.id in choices else 0,
            stream=lambda site, _: self.stream_of[site.id],
        )
        return [float(self.contribution(site, passage.arriving, passage.removed)) for site, passage in counted]

    def fitted(self, plans: Sequence[tuple[Mapping[str, Choice], float]], trust: float = 0.3) -> Predictor:
        """Weights that explain the measured plans (choices, error in the power that adds up).

        First one factor for all sites, then a factor for each, held near it: ``trust`` is the relative deviation of a
        site's factor that counts as much as the same relative error of a plan.
        """
        plain = replace(self, weights=dict.fromkeys(self.weights, 1.0))
        rows = numpy.array([plain.contributions(choices) for choices, _ in plans])
        errors = numpy.array([max(error, 1e-12) for _, error in plans])
        sums = rows.sum(axis=1)
        usable = numpy.isfinite(sums) & (sums > 0) & numpy.isfinite(errors)
        if not usable.any():
            return self
        rows, errors, sums = rows[usable], errors[usable], sums[usable]
        common = float(numpy.exp(numpy.log(errors / sums).mean()))
        count = rows.shape[1]
        table = numpy.concatenate([common * rows / errors[:, None], trust * numpy.eye(count)])
        wanted = numpy.concatenate([numpy.ones(len(rows)), trust * numpy.ones(count)])
        found, *_ = numpy.linalg.lstsq(table, wanted, rcond=None)
        factors = common * numpy.clip(found, 0.3, 3.0)
        return replace(self, weights=dict(zip(self.weights, map(float, factors), strict=True)))
