"""The stored graphs of the catalogue: what a change shows, and how it is accepted. test_catalogue.py compares them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import replay
from tests.zoo import CATALOGUE
from tofu_fx.testing import Spec, Transformer, prove, randomise

MODELS = {
    "timm: one": "graph 0: 1 of 1 sites reduced\n%0 = input\n",
    "other: two": "graph 0: 0 of 1 sites reduced\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of its own with two models in it."""
    monkeypatch.setattr(replay, "STORE", tmp_path / "graphs.txt.xz")
    monkeypatch.setattr(replay, "NEW", tmp_path / "new")
    replay.store(MODELS, replay.installed())
    yield tmp_path
    replay.stored.cache_clear()


def test_stored_graphs_are_those_of_the_catalogue_and_small() -> None:
    versions, models = replay.stored()
    if not replay.STORE.is_file():
        pytest.fail(f"no graphs are stored: run pytest tests/models/test_catalogue.py, then {replay.ACCEPT}")
    assert list(models) == list(CATALOGUE)
    assert replay.STORE.stat().st_size < 1_000_000
    assert set(versions) == set(replay.installed())


@pytest.mark.parametrize("library", ["timm", "transformers", "diffusers", "other"])
def test_graphs_are_compared_here(library: str) -> None:
    reason = replay.not_compared(f"{library}: any")
    if reason:
        pytest.skip(reason)


def compilations(spec: Spec) -> list[object]:
    torch.manual_seed(0)
    model = randomise(Transformer(spec))
    return prove(model, *model.example_inputs(), options={"placement": "stream"}).compilations


def test_text_says_what_is_done_and_names_nothing() -> None:
    text = replay.text_of(compilations(Spec(pooling="mean", depth=1)))
    assert "graph 0: 1 of 1 sites reduced\nsite: stream, mlerp, keys, 13 -> 11 tokens, 1 + 0 protected\n" in text
    assert re.search(r"%\d+ = tofu.fuse_tokens.default\(%\d+, %\d+, %\d+, 2, 'mlerp', 1, 0\)", text)
    assert "[2, 11, 16] float32" in text
    assert not re.search(r"blocks|weight|self|\.py|0x", text)


def test_the_same_model_gives_the_same_text_and_another_r_does_not() -> None:
    first, again = (replay.text_of(compilations(Spec(pooling="mean", depth=1))) for _ in range(2))
    assert first == again
    assert replay.text_of(compilations(Spec(pooling="max", depth=1))) != first


class Compiled:
    """A compilation in which nothing was reduced."""

    reducing: tuple[object, ...] = ()

    def __init__(self, sites: int) -> None:
        self.sites = [None] * sites


def test_a_change_is_shown_as_a_difference_and_accepted_by_one_command(folder: Path) -> None:
    replay.check("other: two", [Compiled(1)])
    with pytest.raises(
        AssertionError, match=r"tests.replay --accept\n--- stored\n\+\+\+ now(.|\n)*-graph 0: 0 of 1 .*\n\+"
    ):
        replay.check("other: two", [Compiled(2)])
    assert replay.pending() == {"other: two": "graph 0: 0 of 2 sites reduced\n"}
    assert replay.accept(MODELS) == ["other: two"]
    replay.check("other: two", [Compiled(2)])
    assert replay.stored()[1]["timm: one"] == MODELS["timm: one"]
    assert not replay.pending()


def test_a_change_that_was_undone_is_no_longer_pending(folder: Path) -> None:
    with pytest.raises(AssertionError):
        replay.check("other: two", [Compiled(2)])
    replay.check("other: two", [Compiled(1)])
    assert not replay.pending()


def test_a_new_model_must_be_accepted_and_one_that_is_gone_is_dropped(folder: Path) -> None:
    with pytest.raises(AssertionError, match="graph 0: 0 of 3"):
        replay.check("timm: new", [Compiled(3)])
    replay.accept(["timm: new", "other: two"])
    assert list(replay.stored()[1]) == ["timm: new", "other: two"]


def test_graphs_of_other_versions_are_not_compared_and_it_is_said(folder: Path) -> None:
    replay.store(MODELS, {**replay.installed(), "timm": "0.1"})
    replay.check("timm: one", [Compiled(7)])
    assert "stored with timm 0.1" in replay.not_compared("timm: one")
    assert not replay.not_compared("diffusers: one")
    with pytest.raises(AssertionError):
        replay.check("diffusers: one", [Compiled(7)])
    with pytest.raises(SystemExit, match="2 models have no graph yet"):
        replay.accept([*MODELS, "diffusers: one"])
