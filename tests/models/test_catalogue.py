"""Every model of the catalogue: what is found in it, and the proofs. docs/models.md shows the same."""

from __future__ import annotations

import pytest

from tests import replay
from tests.zoo import CATALOGUE
from tofu_fx.testing import prove

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


def long_first(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.long) if name in LONG else name


@pytest.mark.parametrize("name", [long_first(name) for name in CATALOGUE])
def test_model_is_accelerated_and_right_or_says_why_not(name: str) -> None:
    case = CATALOGUE[name]
    args, kwargs = case.inputs()
    proofs = prove(case.model(), *args, **kwargs)
    assert not proofs.failures
    assert not proofs.undecided or name in UNDECIDED, proofs.undecided
    reasons = [str(site.decline) for site in proofs.sites if not site.matched]
    assert (len(proofs.matched), len(reasons)) == (case.sites, len(case.declined)), reasons
    for words, reason in zip(case.declined, reasons, strict=True):
        assert words in reason
    if case.reason:
        assert any(case.reason in message for message in proofs.messages)
    assert case.sites or case.declined or case.reason
    replay.check(name, proofs.compilations)
