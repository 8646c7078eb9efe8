"""What the tests of rewritten graphs share."""

from __future__ import annotations

import pytest
import torch

from tests.standalone.small import Model


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()
