"""Options become what the design says; wrong ones are in tests/front/test_bad_input.py."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tofu_fx import OptionError, Options
from tofu_fx.plan.schedule import spread


def test_defaults_are_those_of_the_documentation() -> None:
    options = Options.parse(None)
    assert (options.ratio, options.r, options.strategy, options.placement) == (None, None, "auto", "auto")
    assert (options.on_error, options.inner_backend) == ("fallback", "inductor")
    assert options.reduces


@pytest.mark.parametrize(
    ("given_options", "reduces"),
    [({"ratio": 0.0}, False), ({"ratio": 0}, False), ({"r": 0}, False), ({"r": [0, 0]}, False), ({"r": [0, 1]}, True),
     ({"r": 3}, True), ({"ratio": 0.01}, True), ({}, True)],
)  # fmt: skip
def test_nothing_is_reduced_only_where_every_number_is_zero(given_options: dict[str, Any], reduces: bool) -> None:
    assert Options.parse(given_options).reduces is reduces


def test_options_cannot_be_changed_after_they_were_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Options.parse({"ratio": 0.5}).ratio = 2.0  # type: ignore[misc]


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse({"ration": 1, "strategy": "melt", "inductor": 3})
    assert all(key in str(caught.value) for key in ("'ration'", "'strategy'", "'inductor'"))


def test_mode_given_twice_must_agree() -> None:
    assert Options.parse({"mode": "max-autotune"}, "max-autotune").mode == "max-autotune"
    with pytest.raises(OptionError, match="disagree"):
        Options.parse({"mode": "max-autotune"}, "reduce-overhead")


def test_unknown_mode_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match="max-autotune"):
        Options.parse({"mode": "fastest"})


@given(tokens=st.integers(1, 5000), percent=st.integers(0, 99), layers=st.integers(1, 60))
def test_ratio_is_the_share_gone_after_the_last_layer_spread_evenly(tokens: int, percent: int, layers: int) -> None:
    counts = spread(tokens, percent / 100, layers)
    assert len(counts) == layers
    assert sum(counts) == round(tokens * percent / 100)
    assert max(counts) - min(counts) <= 2
    assert min(counts) >= 0
