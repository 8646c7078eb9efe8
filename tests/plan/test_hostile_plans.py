"""Plans and options that are damaged, enormous or made to mislead: each ends in one short error in our own words."""

from __future__ import annotations

import io
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tofu_fx import OptionError, Options, Plan, PlanError
from tofu_fx.plan.options import EXPECTED as OPTIONS
from tofu_fx.plan.plan import EXPECTED as KEYS
from tofu_fx.plan.records import PlanRow
from tofu_fx.report.explain import Explanation, GraphReport, SiteRow
from tofu_fx.wording import printable, shortened, shown

ROW: dict[str, Any] = {
    "id": "blocks.0.attn", "module_path": "blocks.0.attn", "tokens": 36, "heads": 2, "dim": 8, "strategy": "mean",
    "r": 4,
}  # fmt: skip
ESCAPES = "\x1b[31mred\x1b]0;title\x07\u202e"


def refused(plan: Any) -> str:
    with pytest.raises(PlanError) as caught:
        Plan.load(plan)
    message = str(caught.value)
    assert len(message) < 700, message[:900]
    assert message.isprintable()
    assert "Input should" not in message
    return message


def wrong(**options: Any) -> str:
    with pytest.raises(OptionError) as caught:
        Options.parse(options)
    message = str(caught.value)
    assert len(message) < 700, message[:900]
    assert message.isprintable()
    assert "Input should" not in message
    return message


# ---- options ---------------------------------------------------------------------------------------------------------


def test_every_option_says_what_is_expected_of_it() -> None:
    assert set(OPTIONS) == set(Options.model_fields)


@pytest.mark.parametrize("key", [key for key in OPTIONS if key != "plan"])  # a plan is read later, as a PlanError
@pytest.mark.parametrize(
    "value", [object(), "\x1b[31mno", -1.5, math.nan, [[]], {"a": 1}], ids=lambda value: type(value).__name__
)
def test_a_wrong_value_of_any_option_is_told_in_our_words(key: str, value: Any) -> None:
    if key in ("inductor", "mode") and isinstance(value, (dict, str)):
        value = 3
    assert OPTIONS[key] in wrong(**{key: value})


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), np.float32(0.5), Fraction(1, 2)], ids=repr)
def test_ratio_is_any_real_number(value: Any) -> None:
    parsed = Options.parse({"ratio": value})
    assert type(parsed.ratio) is float
    assert parsed.ratio == 0.5


@pytest.mark.parametrize(
    "value",
    [torch.tensor(0.5), np.array(0.5), True, "0.5", math.nan, math.inf, -math.inf, 10**400, 1, 0.5j],
    ids=lambda value: type(value).__name__,
)
def test_ratio_is_nothing_else(value: Any) -> None:
    assert "option 'ratio'" in wrong(ratio=value)


@pytest.mark.parametrize(
    "options",
    [{"cell": 10**9}, {"r": 10**30}, {"r": [1, 10**5000]}, {"seed": 2**63}, {"grid": (1, 10**9)}, {"grid": (True, 4)}],
    ids=lambda value: next(iter(value)),
)
def test_huge_numbers_are_refused(options: dict[str, Any]) -> None:
    assert f"option {next(iter(options))!r}" in wrong(**options)


def test_a_wrong_value_of_megabytes_is_shown_in_a_hundred_characters() -> None:
    assert "'melt" in wrong(strategy="melt" * 10**6)
    assert "unknown option 'xxx" in wrong(**{"x" * 10**6: 1})
    assert "option 'grid'" in wrong(grid=list(range(10**5)))


def test_a_value_nested_too_deeply_is_told_by_its_type() -> None:
    deep: list[Any] = []
    for _ in range(10**5):
        deep = [deep]
    assert "option 'r'" in wrong(r=deep)
    refused({"sites": deep})
    while deep:  # freed level by level
        deep = deep[0]


def test_options_that_are_no_dict_are_told() -> None:
    with pytest.raises(OptionError, match="expected a dict of options"):
        Options.parse([("ratio", 0.5)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [("branches", ["attention", "mlp"]), ("cell", 4), ("seed", 0), ("grid", [6, 6]), ("max_downsample", 2),
     ("reuse", "none")],
)  # fmt: skip
def test_options_of_branches_do_nothing_on_the_stream_and_are_refused_there(key: str, value: Any) -> None:
    message = wrong(placement="stream", **{key: value})
    assert all(word in message for word in (f"option {key!r} does nothing with placement 'stream'", "'branch'"))
    assert Options.parse({"placement": "branch", key: value})
    assert Options.parse({"placement": "auto", key: value})


def test_what_is_given_as_it_is_by_default_is_no_contradiction() -> None:
    assert Options.parse({"placement": "stream", "cell": 2, "reuse": "block", "branches": ["attention"], "seed": None})


@pytest.mark.parametrize(
    ("key", "value"),
    [("placement", "branch"), ("placement", "stream"), ("branches", ["attention", "mlp"]), ("cell", 4),
     ("strategy", "mlerp"), ("match", "heads")],
)  # fmt: skip
def test_what_the_rows_of_a_plan_decide_is_refused_beside_it(key: str, value: Any) -> None:
    assert f"option {key!r} comes from the plan's rows" in wrong(plan=Plan(sites=[PlanRow(**ROW)]), **{key: value})


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"r": math.nan}, ["sites.0.r", "a whole number"]),
        ({"r": 10**30}, ["sites.0.r", "a whole number"]),
        ({"tokens": 10**12}, ["sites.0.tokens"]),
        ({"heads": 0}, ["sites.0.heads"]),
        ({"heads": -3}, ["sites.0.heads"]),
        ({"grid": [1]}, ["sites.0.grid", "height and width", "two ints"]),
        ({"grid": []}, ["sites.0.grid"]),
        ({"grid": [6, 6, 6]}, ["sites.0.grid"]),
        ({"grid": [6, 0]}, ["sites.0.grid"]),
        ({"grid": "6x6"}, ["sites.0.grid"]),
        ({"cell": 10**9}, ["sites.0.cell"]),
        ({"linearity": {"mean": math.nan, "std": 0.0}}, ["sites.0.linearity.mean", "a finite number"]),
        ({"linearity": {"mean": 0.0, "std": math.inf}}, ["sites.0.linearity.std"]),
        ({"error": math.inf}, ["sites.0.error", "a finite number"]),
        ({"strategy": "melt" * 10**6}, ["sites.0.strategy", "'mlerp'"]),
        ({"id": 3}, ["sites.0.id", "a text"]),
        ({"\x1b[31m" * 10**5: 1}, ["unknown key"]),
        ({"branches": ["attention", "ffn"]}, ["sites.0.branches"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_key_of_a_row_is_named_with_what_is_expected(update: dict[str, Any], words: list[str]) -> None:
    message = refused({"sites": [{**ROW, **update}]})
    assert all(word in message for word in words), message


def test_every_key_that_decides_something_says_what_is_expected_of_it() -> None:
    for key in (
        "graph",
        "id",
        "tokens",
        "heads",
        "dim",
        "strategy",
        "match",
        "r",
        "placement",
        "branches",
        "cell",
        "grid",
    ):
        assert key in PlanRow.model_fields
        assert KEYS[key] in refused({"sites": [{**ROW, key: object()}]})


@pytest.mark.parametrize(
    "plan",
    [None, 3, [], {"sites": None}, {}, b"x", {"version": "2" * 10**7, "sites": []}],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_plan_at_all(plan: Any) -> None:
    refused(plan)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 10**6, "nested too deeply"),
        (b'{"sites": ' + b'{"a": ' * 10**6, "nested too deeply"),
        (b"\xff\xfe\x00", "not a text in UTF-8"),
        (b"", "is not JSON"),
        (b"\x00" * 100, "is not JSON"),
        (b'{"sites": [], "model": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"sites": [], "model": NaN}', "model: expected a text, got nan"),
    ],
    ids=["list", "dict", "utf16", "empty", "zeros", "digits", "nan"],
)
def test_a_file_that_is_no_plan(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    message = refused(tmp_path / "plan.json")
    assert words in message
    assert "plan.json" in message


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "pipe or a device" in refused(tmp_path / "pipe")  # to open it would wait for a writer
    assert "it is a folder" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "nowhere")
    assert "not the name of a file" in refused("a\0b")
    assert r"\x1b[31m" in refused("\x1b[31m.json")


def test_numbers_that_json_does_not_have_are_never_written() -> None:
    row = PlanRow(**ROW).model_copy(update={"error": math.inf})
    with pytest.raises(ValueError, match="JSON"):
        Plan(sites=[row]).to_json()


# ---- the terminal ----------------------------------------------------------------------------------------------------


def seen(show: Any) -> str:
    text = io.StringIO()
    show(Console(file=text, width=200, force_terminal=False))
    return text.getvalue()


def harmless(text: str) -> None:
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert r"\x1b[31mred" in text.replace("\n", "")


def test_escape_sequences_of_a_plan_are_written_out_in_its_table() -> None:
    row = {**ROW, "id": f"blocks[red].{ESCAPES}", "reason": ESCAPES}
    plan = Plan.load({"model": ESCAPES, "sites": [row]})
    text = seen(lambda console: console.print(plan.table()))
    harmless(text)
    assert "blocks[red]" in text  # no markup, either


def test_escape_sequences_are_written_out_where_two_plans_differ() -> None:
    from tofu_fx.plan.table import plan_diff

    plans = [Plan.load({"model": ESCAPES, "sites": [{**ROW, "id": ESCAPES, "r": r}]}) for r in (1, 2)]
    harmless(seen(lambda console: console.print(plan_diff(*plans, names=(ESCAPES, "other")))))


def test_escape_sequences_are_written_out_by_explain() -> None:
    row = SiteRow(0, f"[red]{ESCAPES}", "", 2, 36, 36, "", 0, f"{ESCAPES} [/]")
    graph = GraphReport(f"{ESCAPES} [/nothing]", [row], [ESCAPES], "", "", 0, 0, {}, {}, [], "reduced")
    text = seen(Explanation([graph, graph]).print)
    harmless(text)
    assert "[red]" in text
    assert "[/nothing]" in text


def test_a_dollar_in_a_name_is_no_formula(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    Plan.load({"model": r"$\broken{", "sites": [{**ROW, "id": r"$\frac$"}]}).plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


# ---- words -----------------------------------------------------------------------------------------------------------


def test_values_are_shown_on_one_short_printable_line() -> None:
    assert shown("a\nb\x1b") == r"'a\nb\x1b'"
    assert len(shown("x" * 10**7)) <= 100
    assert len(shown(b"x" * 10**5)) <= 100
    assert shown(10**5000) == "a value of type int"
    assert shown(torch.zeros(2, 2)) == "tensor([[0., 0.], [0., 0.]])"
    assert printable("\udcff") == r"\udcff"  # half a character, from a file name that is not UTF-8
    assert printable("a\nb") == "a\nb"
    assert len(shortened("abc" * 100, 20)) <= 20
