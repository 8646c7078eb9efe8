"""Every model of the catalogue: what is found in it, and the proofs. docs/models.md shows the same."""

from __future__ import annotations

import pytest

from tests import replay
from tests.harness import NIGHTLY, prove, rewritten
from tests.zoo import CATALOGUE
from tofu_fx.sites.site import Site

#: What the interpreter cannot decide, for some strategy, and why.
UNDECIDED = {
    "transformers: t5_encoder": "words that come twice, at no position of their own: exact copies",
    "transformers: modernbert": "words that come twice, at no position of their own: exact copies",
    "other: torchvision_maxvit": "scores as close as rounding",
    "timm: levit": "scores as close as rounding",
    "timm: mobilevit": "scores as close as rounding",
    "timm: efficientformer": "scores as close as rounding",
    "transformers: detr": "padded places, which are alike",
    "diffusers: WanTransformer3DModel": "a table that the interpreter cannot line up",
}

#: Graphs of a thousand nodes and more.
LONG = [name for name in CATALOGUE if "UNet2DConditionModel" in name]

#: What was proved of the stored graphs holds for as long as they are what is made. So for every change, only models are
#: proved anew among whose graphs every step of all graphs is, and of those beside them the graphs are compared. (Of a
#: model with a graph break more calls make more graphs, so it is called as often as a proof does.)
TEXTS = replay.stored()[1]
ANEW = {*replay.with_steps_of_their_own(), *(name for name, text in TEXTS.items() if "graph 1: " in text)}
PROVED = [name for name in CATALOGUE if NIGHTLY or name in ANEW or name not in TEXTS or replay.not_compared(name)]

#: Of the others, those that are left alone, in part, for a reason that is none of the proved ones'. What is left after
#: these has the steps and the reasons of other models: it is compared at night.
COMPARED: list[str] = []
_SAID = {words for name in PROVED for words in (*CATALOGUE[name].declined, CATALOGUE[name].reason)}
for _name in CATALOGUE:
    _own = {*CATALOGUE[_name].declined, CATALOGUE[_name].reason} - _SAID
    if _name not in PROVED and _own:
        COMPARED.append(_name)
        _SAID |= _own


def marked(name: str) -> object:
    marks = [pytest.mark.long] if name in LONG else []
    if name not in PROVED and name not in COMPARED:
        marks.append(pytest.mark.nightly("its steps and reasons are those of other models"))
    return pytest.param(name, marks=marks)


def check(name: str, sites: list[Site], messages: list[str]) -> None:
    """Hold what was found in a model against what the catalogue says of it."""
    case = CATALOGUE[name]
    reasons = [str(site.decline) for site in sites if not site.matched]
    assert (len(sites) - len(reasons), len(reasons)) == (case.sites, len(case.declined)), reasons
    for words, reason in zip(case.declined, reasons, strict=True):
        assert words in reason
    if case.reason:
        assert any(case.reason in message for message in messages)
    assert case.sites or case.declined or case.reason


@pytest.mark.parametrize("name", [marked(name) for name in PROVED])
def test_model_is_accelerated_and_right_or_says_why_not(name: str) -> None:
    case = CATALOGUE[name]
    args, kwargs = case.inputs()
    found = prove(case.model(), *args, **kwargs)
    assert not found.failures
    assert not found.undecided or name in UNDECIDED, found.undecided
    check(name, found.sites, found.messages)
    replay.check(name, found.compilations)


@pytest.mark.parametrize("name", [marked(name) for name in CATALOGUE if name not in PROVED])
def test_model_is_rewritten_as_when_it_was_proved(name: str) -> None:
    case = CATALOGUE[name]
    args, kwargs = case.inputs()
    found = rewritten(case.model(), *args, **kwargs)
    check(name, found.sites("mlerp"), [outcome.message for outcome in found.outcomes["mlerp"]])
    replay.check(name, found.compilations("mlerp"))


def test_every_step_of_all_graphs_is_among_those_that_are_proved() -> None:
    steps = {step for name in PROVED for step in replay.steps(TEXTS[name])}
    assert all(replay.steps(TEXTS[name]) <= steps for name in CATALOGUE)
    assert len(PROVED) > len(CATALOGUE) / 3
