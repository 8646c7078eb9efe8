"""What can be asked of `tofu_fx.testing.prove`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.zoo import ZOO
from tofu_fx.testing import prove


def test_the_strategies_that_are_asked_for_are_proved() -> None:
    entry = ZOO["einops_mean"]
    proofs = prove(entry.model(), entry.batch(), strategies=("mlerp", "prune")).check()
    assert {name.partition(",")[0] for name in proofs.meaning} == {"mlerp", "prune"}
    assert len(proofs.meaning) > 2, "in each placement"


@pytest.mark.parametrize("strategies", [(), ("prune",), ("mlerp", "auto"), "mlerp"])
def test_other_strategies_are_refused(strategies: Sequence[str]) -> None:
    entry = ZOO["einops_mean"]
    with pytest.raises(ValueError, match='strategies: expected "mlerp" and others of'):
        prove(entry.model(), entry.batch(), strategies=strategies)
