"""Calibrations are quick here: the speed of what they find is measured where a test asks for it."""

from __future__ import annotations

import pytest

from tofu_fx.calibration import calibrate


@pytest.fixture(autouse=True)
def _no_speed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two compilations and their rounds are half of what a small model's calibration takes. Marker: true_speed.

    What the fixtures of modules calibrate is measured: they are made before this one.
    """
    if request.node.get_closest_marker("true_speed") is None:
        monkeypatch.setattr(calibrate, "_speed", lambda survey, choices, inner_backend: 1.25)
