"""Hypothesis profiles, and which tests belong on one worker."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from tofu_fx.plan import profit

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)  # the workers share the cores

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
# A failure is not shrunk here: one example takes a second, and shrinking takes hundreds. Nightly does both.
_QUICK = (Phase.explicit, Phase.generate)
settings.register_profile(
    "ci", max_examples=40, deadline=None, derandomize=True, phases=_QUICK, suppress_health_check=_SLOW
)
settings.register_profile("nightly", max_examples=2000, deadline=None, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    """No compiled code or recompile limit of one test reaches another; the thread count is the caller's."""
    torch.backends.mha.set_fastpath_enabled(False)  # it hides the attention; test_bad_input.py switches it on
    yield
    torch._dynamo.reset()


#: The models of the tests are tiny: by the true rates hardly a reduction would pay. Marker: true_rates.
TRUE_RATES, profit.rates_of = profit.rates_of, lambda device, dtype: profit.Rates(1e-9, math.inf, 0.0)


@pytest.fixture(autouse=True)
def _true_rates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("true_rates") is not None:
        monkeypatch.setattr(profit, "rates_of", TRUE_RATES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that share a compiled model (same file, same parameter) run on the same worker, so it compiles once."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByModel(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            shared = re.match(r"(.*test_models\.py)::.*\[([^\]]*)\]$", nodeid)
            return "-".join(shared.groups()) if shared else nodeid

    return ByModel(config, log)
