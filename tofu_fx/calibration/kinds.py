"""Which kind of reduction each site gets: by its measured errors, or by its linearity (Token Fusion, section 3.2)."""

from __future__ import annotations

import math

from tofu_fx.calibration.sensitivity import Curve, Kind, Sensitivity, first_kind
from tofu_fx.calibration.survey import Survey


def best_kind(found: Sensitivity, prune: bool | None = None) -> Kind:
    """The kind of least measured error at a site, of all, of those that prune, or of those that merge."""
    curves = {kind: c for kind, c in found.curves().items() if prune is None or (kind[0] == "prune") == prune}
    merge, match = first_kind(found.site)
    return min(curves, key=lambda kind: curves[kind].errors[-1], default=("prune" if prune else merge, match))


def by_linearity(survey: Survey, pruned: float) -> tuple[dict[str, Kind], float]:
    """Prune at the share of the sites whose linearity is lowest, merge at the others; and the threshold."""
    known = {name: s.mean for name in survey.linearity if (s := survey.score(name)) is not None}
    ranked = sorted(known.values())
    count = round(pruned * len(ranked))
    if 0 < count < len(ranked):
        threshold = (ranked[count - 1] + ranked[count]) / 2
    else:
        threshold = 0.0 if count == 0 else math.nextafter(1.0, 2.0)
    decided = {
        name: best_kind(found, prune=known.get(name, 1.0) < threshold) for name, found in survey.sensitivity.items()
    }
    return decided, threshold


def curves_of(survey: Survey, chosen: dict[str, Kind]) -> dict[str, Curve]:
    """The error curve of each site's kind."""
    known = {name: found.curves() for name, found in survey.sensitivity.items()}
    return {name: curves[chosen[name]] for name, curves in known.items() if chosen[name] in curves}
