"""How many examples each property test of this folder draws: 200 in all for every change, 2000 in the nightly run."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

TOTAL = {"ci": 200, "nightly": 2000}

#: test -> its examples out of 200
SHARES = {
    "every pass on a transformer": 12,
    "proofs of a transformer": 8,
    "two towers": 3,
    "exact copies": 6,
    "lowering a raw graph": 49,
    "functionalising a raw graph": 58,
    "all passes on a raw graph": 34,
    "shuffled tokens of a raw graph": 30,
}


def share(name: str) -> Any:
    """The settings of one test under the profile that is loaded."""
    total = TOTAL.get(str(settings.get_current_profile_name()), TOTAL["ci"])
    return settings(max_examples=SHARES[name] * total // TOTAL["ci"])
