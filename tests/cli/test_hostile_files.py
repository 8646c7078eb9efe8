"""Files, models and arguments on the command line that are damaged or made to mislead: one clear error each."""

from __future__ import annotations

import os
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.test_cli_inputs import Text, Vision, colours, read, red
from tofu_fx.cli import main
from tofu_fx.cli.command import CommandError


def refused(path: Path, words: str, model: Any = None, **more: Any) -> str:
    with pytest.raises(CommandError, match=words) as caught:
        read(path, model or Vision(), **more)
    assert len(str(caught.value)) < 900
    return str(caught.value)


def claim(path: Path, name: str, shape: str, there: bytes = b"") -> None:
    """Add to an .npz an array whose header says that it is far larger than it is."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + there)


# ---- arrays ----------------------------------------------------------------------------------------------------------


def test_an_array_that_is_not_used_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=colours(4), unused=np.zeros(1000))
    claim(path, "huge", "(65536, 65536)")  # 4 GiB, by its header
    used = []
    real = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: used.append(key) or real(self, key))
    assert sorted(red(read(path))) == [0, 20, 40, 60]
    assert used == ["images"]


def test_an_array_that_claims_more_than_there_is_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    claim(path, "images", "(65536, 65536, 64, 3)", b"\0" * 100)
    refused(path, r"'images' is uint8 \[65536, 65536, 64, 3\] by its header, but has 100 bytes")


@pytest.mark.parametrize(
    ("jpeg", "offset"),
    [
        (np.zeros(9, np.uint8), np.array(9)),
        (np.zeros(9, np.uint8), np.array([])),
        (np.zeros(9, np.uint8), np.array([0.0, 9.0])),
        (np.zeros(9, np.uint8), np.array([0, 10])),
        (np.zeros(9, np.uint8), np.array([-3, 9])),
        (np.zeros(9, np.uint8), np.array([0, 5, 3])),
        (np.zeros((3, 3), np.uint8), np.array([0, 9])),
        (np.array(3, np.uint8), np.array([0, 1])),
        (np.zeros(9, np.int64), np.array([0, 9])),
    ],
    ids=["scalar", "empty", "float", "beyond", "negative", "falling", "two dims", "scalar bytes", "int64"],
)
def test_offsets_that_say_nothing_of_where_pictures_begin(jpeg: Any, offset: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", jpeg=jpeg, offset=offset)
    refused(tmp_path / "a.npz", "expected uint8 .bytes., and rising integers")


@pytest.mark.parametrize("shape", [(2, 0, 8, 3), (2, 8, 0, 3), (2, 0, 0, 3), (2, 0, 8), (2, 8, 0)])
def test_pictures_without_a_pixel(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8))
    refused(tmp_path / "a.npz", "have no pixel")


def test_grey_pictures_one_pixel_wide_are_pictures(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.full((2, 9, 1), 255, np.uint8))
    assert read(tmp_path / "a.npz", samples=2).shape == (2, 3, 8, 8)


def test_an_elongated_picture_does_not_fill_the_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 1, 50_000, 3), np.uint8))
    refused(tmp_path / "a.npz", "50000 x 1 pixels, far too elongated")


@pytest.mark.parametrize("name", ["images", "input_ids"])
def test_objects_under_a_name_that_is_looked_for_are_not_passed_over(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{name: np.array([object()]), "other": colours(2)})  # type: ignore[arg-type]
    refused(tmp_path / "a.npz", f"array '{name}' is of Python objects")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"\x80\x04N.", os.urandom(100)], ids=range(5)
)
def test_a_file_that_is_no_npz(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    refused(tmp_path / "a.npz", "not an .npz file of numbers")


def test_an_npz_that_was_cut_off_or_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 255, (4, 9, 9, 3)).astype(np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "not an .npz file of numbers")
    path.write_bytes(whole[:200] + bytes(50) + whole[250:])
    refused(path, "not an .npz file of numbers")


def test_escape_sequences_in_an_arrays_name_are_written_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"\x1b[31m" * 1000: np.zeros(3)})  # type: ignore[arg-type]
    assert refused(tmp_path / "a.npz", "its array").isprintable()


def test_texts_without_an_id(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.zeros((2, 0), np.int64))
    refused(tmp_path / "a.npz", r"'input_ids' is int64 \[2, 0\]", Text())


# ---- pipes, folders, damaged pictures --------------------------------------------------------------------------------


def test_a_named_pipe_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    refused(tmp_path / "pipe.npz", "pipe or a device")
    folder = tmp_path / "pictures"
    folder.mkdir()
    os.mkfifo(folder / "a.png")
    refused(folder, r"a\.png cannot be read as a picture: it is a pipe or a device")


def test_a_folder_that_is_named_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "inside.png").mkdir()
    Image.fromarray(colours(2)[1]).save(tmp_path / "inside.png" / "a.png")
    assert red(read(tmp_path, samples=1)) == [20]


def _png(width: int, height: int) -> bytes:
    """A PNG of these sizes by its header, without what it says."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [b"", _png(0, 5), _png(5, 0), _png(60_000, 60_000), _png(5, 5), b"\x89PNG\r\n\x1a\n" + bytes(40)],
    ids=range(6),
)
def test_pictures_that_cannot_be_decoded_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path, r"a\.png cannot be read as a picture: \S")


# ---- models and arguments --------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def failed(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 1) -> str:
    assert main(argv) == code
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "Traceback" not in said
    if code == 1:
        assert len(said.splitlines()) == 1
        assert len(said) < 3000
    return said


@pytest.mark.parametrize(
    "model", [".fac:f", "..fac:f", "fac.py:f", "./fac.py:f", "a b:f", "fac.:f", "1a:f", "\x1b[31m:f"]
)
def test_what_is_no_name_of_a_module_is_said_to_be_none(
    model: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "fac.py").write_text("f = 1")
    assert "is not the name of a module; expected timm:NAME" in failed(capsys, "explain", model)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise RuntimeError('\\x1b[31m' + 'no' * 10**6)", "importing broken_module fails: RuntimeError"),
        ("import sys; sys.exit(0)", "importing broken_module fails: SystemExit: 0"),
        ("def build(:", "importing broken_module fails: SyntaxError"),
        ("build = 3", "has no function 'build'"),
        ("def build(): raise KeyError('weights')", "calling build() without arguments fails: KeyError: 'weights'"),
        ("def build(size): pass", "calling build() without arguments fails: TypeError"),
        ("def build(): exit()", "calling build() without arguments fails: SystemExit"),
        ("import nothing_of_this_name", "importing broken_module fails: ModuleNotFoundError"),
        (b"build = '\xff\xfe'", "importing broken_module fails: SyntaxError"),
    ],
    ids=range(9),
)
def test_a_module_of_the_users_that_fails_is_named(
    source: str | bytes, words: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "broken_module", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (here / "broken_module.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    assert words in failed(capsys, "explain", "broken_module:build")


def test_a_module_without_a_file_is_no_crash(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no function 'nothing'" in failed(capsys, "explain", "sys:nothing")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("explain", "timm:x", "--strategy", "\x1b[31m" * 1000), "invalid choice"),
        (("explain", "timm:x", "--ratio", "nan"), "expected a number between 0 and 1"),
        (("explain", "timm:x", "--ratio", "9" * 10**5), "expected a number between 0 and 1"),
        (("explain", "timm:x", "--r", "9" * 10**4), "expected a whole number"),
        (("explain", "timm:x", "--r", "٣"), "expected a whole number"),
        (("explain", "timm:x", "--samples", "9" * 10**4), "expected a positive whole number"),
        (("explain", "timm:x", "\x1b[31m"), "unrecognized arguments"),
    ],
    ids=range(7),
)
def test_wrong_arguments_are_shown_and_not_obeyed(
    argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failed(capsys, *argv, code=2)
    assert words in said
    assert len(said) < 6000


def test_weights_that_are_a_pipe_or_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "tiny_model.py").write_text("import torch\ndef build(): return torch.nn.Linear(2, 2)")
    os.mkfifo(here / "pipe")
    assert "pipe or a device" in failed(capsys, "explain", "tiny_model:build", "--weights", "pipe")
    assert "it is a folder" in failed(capsys, "explain", "tiny_model:build", "--weights", ".")


def test_a_plan_that_is_a_pipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(here / "pipe.json")
    assert "pipe or a device" in failed(capsys, "plan", "show", "pipe.json")
    assert "pipe or a device" in failed(capsys, "plan", "diff", "pipe.json", "pipe.json")
    assert "pipe or a device" in failed(capsys, "explain", "timm:vit_tiny_patch16_224", "--plan", "pipe.json")


# ---- inputs that the model refuses -----------------------------------------------------------------------------------

PICKY = """
import torch

class Picky(torch.nn.Module):
    image_size = 8

    def forward(self, x):
        assert x.shape[-1] == 4, "only pictures of 4 pixels, \\x1b[31mplease"
        return x.mean((1, 2, 3))

build = Picky
"""


@pytest.mark.parametrize(
    "argv",
    [("explain",), ("calibrate", "-o", "plan.json", "--quiet"), ("bench", "--quiet", "--inner-backend", "eager"),
     ("bench", "--sweep", "--quiet", "--inner-backend", "eager")],
    ids=["explain", "calibrate", "bench", "sweep"],
)  # fmt: skip
def test_each_command_says_that_the_model_refuses_its_inputs(
    argv: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "picky_model.py").write_text(PICKY)
    np.savez(here / "a.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    torch.manual_seed(0)
    command, *rest = argv
    assert main([command, "picky_model:build", "--inputs", "a.npz", "--device", "cpu", *rest]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    batch = "[2, 3, 8, 8]" if command == "explain" else "[3, 3, 8, 8]"
    for words in ("--inputs a.npz", f"refuses batch 0 (float32 {batch})", "its own error", r"4 pixels, \x1b[31mplease"):
        assert words in said, said
