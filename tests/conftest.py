"""The two profiles (ci and nightly), and in what order and on which worker tests run."""

from __future__ import annotations

import gc
import math
import os
import re
from typing import Any

import pytest
import torch
import torch._dynamo.guards
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
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the nightly tests, with their reasons, unless they are asked for; have the long ones begin first."""
    if PROFILE != "nightly" and "nightly" not in config.option.markexpr:
        for item in items:
            marker = item.get_closest_marker("nightly")
            if marker is not None:
                (why,) = marker.args
                item.add_marker(pytest.mark.skip(reason=f"HYPOTHESIS_PROFILE=nightly runs it: {why}"))
    items.sort(key=lambda item: item.get_closest_marker("long") is None)  # stable: the others keep their order


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: the garbage collector need not walk over it again with every model."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    """No compiled code or recompile limit of one test reaches another; the thread count is the caller's."""
    torch.backends.mha.set_fastpath_enabled(False)  # it hides the attention; test_bad_input.py switches it on
    yield
    torch._dynamo.reset()


# With every compilation Dynamo flushes the processor's caches to log how long its guards take: half of the time that a
# small function takes to compile, and slow for whoever else uses the machine.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[attr-defined, assignment, unused-ignore]

#: The models of the tests are tiny: by the true rates hardly a reduction would pay. Marker: true_rates.
TRUE_RATES, profit.rates_of = profit.rates_of, lambda device, dtype: profit.Rates(1e-9, math.inf, 0.0)


@pytest.fixture(autouse=True)
def _true_rates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("true_rates") is not None:
        monkeypatch.setattr(profit, "rates_of", TRUE_RATES)


#: Files whose tests share a model, a plan or a folder that takes long to make: two workers would make it twice.
_SHARING = re.compile(
    r"test_(calibrate|calibrate_branches|branches|diffusers|diffusion_example|cifar_example|saliency|cli_models|sweep)\.py"
)


#: Tests that share the server of tests/fresh.py.
_FRESH = re.compile(r"test_readme\.py::test_(python|other)|test_docs\.py::test_(snippets|a_rule)")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that share what takes long to make run on the same worker, the largest groups first.

    A group is a file, or of tests/test_models.py what has the same parameter. All others go one by one to whichever
    worker is free.
    """
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class BySharing(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if _FRESH.search(nodeid):
                return "tests/fresh.py"
            if _SHARING.search(file):
                return file
            shared = re.match(r"(.*test_models\.py)::.*\[([^\]]*)\]$", nodeid)
            return "-".join(shared.groups()) if shared else nodeid

    return BySharing(config, log)
