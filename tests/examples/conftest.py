"""What the tests of examples share."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    # Test runners keep all cores busy, and two threads that wait for each other there take longer than one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
