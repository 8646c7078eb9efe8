"""Most tests of the operators run on all implementations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.ops.streams import implementation


@pytest.fixture(params=["cpp", "aten", "portable"])
def on_both(request: Any) -> Iterator[None]:
    """Use as a mark: ``pytestmark = pytest.mark.usefixtures("on_both")``."""
    with implementation(request.param):
        yield
