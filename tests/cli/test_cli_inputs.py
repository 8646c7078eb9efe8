"""What `--inputs` makes of pictures, arrays and ids: shapes, values, and which ones are taken."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tofu_fx.cli.command import CommandError
from tofu_fx.cli.forms import Loaded
from tofu_fx.cli.inputs import read_inputs


class Vision(nn.Module):
    """Says of its pictures what a timm model does."""

    def __init__(self, **said: Any) -> None:
        super().__init__()
        self.pretrained_cfg = {
            "input_size": (3, 8, 8), "mean": (0.5, 0.25, 0.0), "std": (0.5, 0.5, 2.0), "crop_pct": 1.0,
            "interpolation": "nearest", **said,
        }  # fmt: skip


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = argparse.Namespace(vocab_size=20, max_position_embeddings=12)


def read(path: Path | None, model: nn.Module | None = None, keyword: str | None = None, **more: Any) -> Any:
    arguments = {"inputs": path, "samples": 4, "seed": 0, "image_size": None, "length": None, **more}
    model = model or Vision()
    loaded = Loaded(model, "mine", keyword, True, torch.device("cpu"), torch.float32)
    return read_inputs(argparse.Namespace(**arguments), loaded)


def colours(count: int) -> np.ndarray:
    """Pictures of one colour, each another: uint8 ``[count, 10, 12, 3]``."""
    pictures = np.zeros((count, 10, 12, 3), np.uint8)
    pictures[..., 0] = (np.arange(count) * 20)[:, None, None]
    pictures[..., 1], pictures[..., 2] = 51, 255
    return pictures


def red(found: Tensor) -> list[int]:
    """The red of each picture, 0 to 255, if it is of one colour that was normalised by Vision's own numbers."""
    assert found[:, 0].flatten(1).std(1).max() < 1e-6
    torch.testing.assert_close(found[:, 1], torch.full_like(found[:, 1], (51 / 255 - 0.25) / 0.5))
    torch.testing.assert_close(found[:, 2], torch.full_like(found[:, 2], 0.5))
    return [round(float(value) * 255) for value in found[:, 0, 0, 0] * 0.5 + 0.5]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures" / "inside").mkdir(parents=True)
    for number, picture in enumerate(colours(6)):
        Image.fromarray(picture).save(tmp_path / "pictures" / ("inside" if number % 2 else "") / f"{number}.PNG")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def test_pictures_of_a_folder_are_normalised_as_the_model_wants_them(folder: Path) -> None:
    found = read(folder, samples=6)
    assert found.shape == (6, 3, 8, 8)
    assert sorted(red(found)) == [0, 20, 40, 60, 80, 100]


def test_some_of_the_pictures_are_taken_by_the_seed(folder: Path) -> None:
    chosen = red(read(folder))
    assert len(set(chosen)) == 4
    assert red(read(folder)) == chosen
    assert any(red(read(folder, seed=seed)) != chosen for seed in (1, 2, 3))


def test_fewer_pictures_than_asked_for_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(read(folder, samples=9)) == 6
    assert "6 samples are all there are" in capsys.readouterr().err


def test_only_the_middle_of_a_picture_is_seen(tmp_path: Path) -> None:
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[4:12, 12:20] = 255
    np.savez(tmp_path / "a.npz", images=picture[None])
    whole = read(tmp_path / "a.npz", Vision(mean=(0.0,) * 3, std=(1.0,) * 3))[0, 0]
    middle = read(tmp_path / "a.npz", Vision(mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=0.5))[0, 0]
    expected = torch.zeros(8, 8)
    expected[2:6, 2:6] = 1
    assert torch.equal(whole, expected)
    assert torch.equal(middle, torch.ones(8, 8))


def test_arrays_and_jpegs_are_read_like_files(tmp_path: Path, folder: Path) -> None:
    np.savez(tmp_path / "a.npz", other=np.zeros(3), images=colours(6))
    assert sorted(red(read(tmp_path / "a.npz", samples=6))) == [0, 20, 40, 60, 80, 100]
    files = []
    for picture in colours(3):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(file.getvalue())
    offset = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "b.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offset=offset)
    assert sorted(red(read(tmp_path / "b.npz", samples=3))) == [0, 20, 40]


def test_grey_pictures_fit_a_model_of_one_channel(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.full((2, 9, 9), 255, np.uint8))
    found = read(tmp_path / "a.npz", Vision(input_size=(1, 8, 8), mean=(0.5,), std=(0.5,)))
    assert torch.equal(found, torch.ones(2, 1, 8, 8))


def test_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 64, dtype=np.float64).reshape(2, 3, 8, 8)
    np.savez(tmp_path / "a.npz", values)
    found = read(tmp_path / "a.npz", samples=2)
    assert found.dtype == torch.float32
    assert sorted(found[:, 0, 0, 0].tolist()) == [0.0, 192.0]


def test_size_given_by_the_user_or_the_patches_counts(folder: Path) -> None:
    assert read(folder, image_size=20).shape == (4, 3, 20, 20)
    model = Vision()
    model.patch_embed = nn.Identity()
    model.patch_embed.img_size = (4, 6)  # type: ignore[assignment]
    assert read(folder, model).shape == (4, 3, 4, 6)
    assert read(None, model).shape == (4, 3, 4, 6)


def test_model_that_says_nothing_of_its_pictures_gets_imagenets_numbers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read(folder, nn.Identity(), image_size=8)
    assert "ImageNet's mean and deviation are taken" in capsys.readouterr().err
    torch.testing.assert_close(found[:, 2], torch.full((4, 8, 8), (1 - 0.406) / 0.225))


def test_ids_are_random_or_from_a_file(tmp_path: Path) -> None:
    random = read(None, Text(), keyword="input_ids")["input_ids"]
    assert random.shape == (4, 12)
    assert 0 <= random.min() < random.max() < 20
    np.savez(tmp_path / "a.npz", input_ids=np.full((4, 7), 19, np.int32))
    assert torch.equal(read(tmp_path / "a.npz", Text()), torch.full((4, 7), 19))


@pytest.mark.parametrize(
    ("arrays", "model", "expected"),
    [
        ({}, Vision, "no array in it; expected uint8"),
        ({"images": np.zeros((2, 8, 8, 3), np.float32)}, Vision, r"'images' is float32 \[2, 8, 8, 3\].*\[N, 3, 8, 8\]"),
        ({"x": np.zeros((0, 8, 8, 3), np.uint8)}, Vision, "not one sample"),
        ({"x": np.zeros((2, 8), np.int64)}, Vision, r"'x' is int64 \[2, 8\]"),
        ({"x": np.zeros((), np.float32)}, Vision, r"'x' is float32 \[\]"),
        ({"jpeg": np.zeros(9, np.uint8), "offset": np.array([0, 9])}, Vision, "picture 0 cannot be read"),
        ({"x": np.zeros((2, 8), np.float32)}, Text, "expected integers `input_ids`"),
        ({"input_ids": np.full((2, 8), 20)}, Text, "ids outside 0 to 19"),
        ({"x": np.array([object()])}, Vision, "not an .npz file of numbers"),
    ],
)
def test_wrong_arrays_name_what_was_expected(
    arrays: dict[str, Any], model: type[nn.Module], expected: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CommandError, match=expected):
        read(tmp_path / "a.npz", model())


def test_unreadable_picture_and_texts_too_long_are_named(folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(CommandError, match=r"broken\.jpg cannot be read"):
        read(folder, samples=7)
    with pytest.raises(CommandError, match="takes texts of 12 ids at most"):
        read(None, Text(), length=13)
    with pytest.raises(CommandError, match="takes token ids, not pictures"):
        read(folder, Text())
