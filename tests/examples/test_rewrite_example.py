"""The example that chains `tofu_fx.rewrite` with a pass of one's own."""

from __future__ import annotations

import pytest

from tests.examples.loading import example

pytest.importorskip("timm")


def test_it_reduces_passes_over_and_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    found = example("rewrite").run(r=4, backend="aot_eager", depth=3, img_size=64)
    assert found["gelus"] == 3
    assert found["reductions"] >= 1
    assert 0 < found["rewritten"] < 0.5
    assert found["and passed over"] != found["rewritten"]
    assert found["and compiled"] == pytest.approx(found["and passed over"], rel=1e-3)
    assert "GELUs" in capsys.readouterr().out
