"""The demo's parts: the packaged model, the split, the measuring and the drawing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tofu_fx import extras as extra
from tofu_fx.demo import draw, measure, run
from tofu_fx.demo.data import load_scans, load_test_numbers
from tofu_fx.demo.model import WEIGHTS, load_model, patch_grid, read_digits, read_facts

CARRIED = ("*.safetensors", "*.py")


def test_what_the_package_carries_stays_small() -> None:
    folder = WEIGHTS.parent
    assert sum(path.stat().st_size for pattern in CARRIED for path in folder.glob(pattern)) <= 3_000_000


def test_metadata_says_how_the_weights_were_made() -> None:
    facts = read_facts()
    assert facts["class"] == "timm.models.VisionTransformer"
    assert (Path(__file__).parents[2] / facts["script"]).is_file()
    assert {"architecture", "data", "seed", "epochs", "torch", "test_accuracy"} <= facts.keys()


def test_model_is_as_accurate_as_its_metadata_says() -> None:
    model, test = load_model(), load_test_numbers()
    with torch.no_grad():
        found = torch.cat([read_digits(model(images)) for images in test.images.split(100)])
    accuracy = float((found == test.labels).double().mean())
    one_digit = 1 / test.labels.numel()  # another machine's rounding may turn a digit that is read by a hair
    assert accuracy >= read_facts()["test_accuracy"] - one_digit
    assert accuracy > 0.96


def test_split_is_whole_disjoint_and_the_same_every_time() -> None:
    (train, test), (again, _) = load_scans(), load_scans()
    assert sorted([*train.ids.tolist(), *test.ids.tolist()]) == list(range(1797))
    assert len(test.ids) == 600
    assert torch.equal(train.ids, again.ids)
    share = torch.bincount(train.labels) / len(train.labels) - torch.bincount(test.labels) / len(test.labels)
    assert share.abs().max() < 0.01


def test_every_test_scan_stands_in_four_numbers() -> None:
    (_, test), numbers = load_scans(), load_test_numbers()
    assert numbers.images.shape == (600, 1, 16, 64)
    cells = numbers.images.reshape(600, 16, 4, 16).transpose(1, 2).flatten(0, 1)
    found = (cells.flatten(1)[:, None] == test.images.flatten(1)[None, :50]).all(-1)
    assert found.sum(0).tolist() == [4] * 50
    assert torch.equal(numbers.labels.flatten()[found[:, 0]], test.labels[:1].expand(4))
    assert 0 <= numbers.images.min() < numbers.images.max() <= 1


@pytest.mark.parametrize("module", ["timm", "sklearn", "safetensors", "matplotlib"])
def test_missing_package_is_named_with_the_command_that_installs_it(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(extra.MissingExtraError, match=r"pip install 'tofu-fx\[demo\]'") as caught:
        run.run_demo(run.Settings(quick=True), Console(quiet=True), Console(quiet=True))
    assert ("scikit-learn" if module == "sklearn" else module) in str(caught.value)


def test_a_fault_inside_an_installed_package_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        extra.need("half_installed")


def test_last_batch_is_filled_up_to_the_same_size() -> None:
    numbers = load_test_numbers()
    parts = measure.batches(numbers, 64)
    assert {len(part) for part in parts} == {64}
    assert torch.equal(torch.cat(parts)[:600], numbers.images)


def test_variants_take_turns_and_predictions_keep_the_order() -> None:
    order: list[str] = []

    def answering(name: str, digit: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(images: torch.Tensor) -> torch.Tensor:
            order.append(name)
            return torch.nn.functional.one_hot(torch.full((len(images), 4), digit), 10).flatten(1)

        return call

    variants = [measure.Variant(name, 0.5, "eager", answering(name, digit)) for digit, name in enumerate("ab")]
    batch = torch.zeros(4, 1, 8, 8)
    measure.run_batch(variants, batch, turn=0, count=4)
    measure.run_batch(variants, batch, turn=1, count=2)
    assert order == ["a", "b", "b", "a"]
    assert [variant.found.flatten().unique().tolist() for variant in variants] == [[0], [1]]
    assert variants[0].found.shape == (6, 4)
    assert variants[0].accuracy(torch.tensor([[0, 0, 1, 1]] * 6)) == 0.5


def _measured(strategy: str, seconds: float, right: int, flops: float) -> measure.Variant:
    found = (torch.arange(100) >= right).long().reshape(25, 4)
    return measure.Variant(strategy, 0.5, "inductor", lambda x: x, 99, flops, 9.0, 40, [seconds, seconds, 50.0], found)


def test_findings_come_from_the_numbers() -> None:
    labels = torch.zeros(25, 4, dtype=torch.long)
    plain = _measured("plain", 1.0, 98, 2e9)
    text = run.interpret([plain, _measured("prune", 0.5, 90, 1e9), _measured("mlerp", 0.8, 97, 1e9)], labels)
    assert "prune 0.5, runs at 2.00 times the speed of plain inductor and changes accuracy by -8.00 points" in text
    assert "allow 2.00 times" in text
    assert "The fastest within 1 points of plain is mlerp 0.5: 1.25 times" in text


def test_table_has_a_row_a_variant_and_every_measure() -> None:
    labels = torch.zeros(25, 4, dtype=torch.long)
    table = run.make_table([_measured("plain", 1.0, 98, 2e9), _measured("prune", 0.5, 90, 1e9)], labels)
    assert [str(column.header) for column in table.columns][2:7] == [
        "tokens", "GFLOPs\nan image", "accuracy", "images/s", "speed-up"
    ]  # fmt: skip
    assert [list(column.cells)[1] for column in table.columns][:7] == [
        "prune", "0.5", "99", "1.00 (50%)", "90.00%", "80", "2.00x"
    ]  # fmt: skip


def test_table_fits_a_terminal_of_80_columns() -> None:
    labels = torch.zeros(25, 4, dtype=torch.long)
    table = run.make_table([_measured("plain", 1.0, 98, 2e9), _measured("mlerp", 0.5, 90, 1e9)], labels)
    with open(os.devnull, "w") as nowhere:
        assert Console(width=200, file=nowhere).measure(table).maximum <= 80


def test_groups_are_filled_with_their_mean_and_lone_patches_stay() -> None:
    image = torch.tensor([[0.0, 1.0, 0.2, 0.2, 0.7, 0.7], [0.0, 1.0, 0.2, 0.4, 0.7, 0.7]])
    filled = draw.fill_groups(image, torch.tensor([[7, 3, 7]]))
    torch.testing.assert_close(filled[:, [0, 1, 4, 5]], torch.full((2, 4), 0.6))
    assert torch.equal(filled[:, 2:4], image[:, 2:4])


def test_borders_run_between_patches_of_different_groups() -> None:
    borders = draw.group_borders(torch.tensor([[0, 1], [0, 0]]))
    assert sorted(borders) == [((1, 0), (1, 1)), ((1, 1), (2, 1))]


def test_picture_is_written_without_a_display(tmp_path: Path) -> None:
    numbers = load_test_numbers()
    groups = torch.arange(256).expand(2, -1) // 3
    token_map = draw.TokenMap("mlerp 0.5", ["a note"], groups, torch.tensor([[1, 2, 3, 4]] * 2))
    path = tmp_path / "map.png"
    draw.draw_token_maps(path, numbers.images[:2], numbers.labels[:2], patch_grid(), [token_map], "heading", "caption")
    assert path.read_bytes().startswith(b"\x89PNG")
