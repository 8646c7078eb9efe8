"""The compiled operators' cache: damaged libraries, folders that cannot be used, other processes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ops.streams import same_bits, stream
from tests.oracle.operators import reference_fuse
from tofu_fx.ops import build, cpu, fuse_tokens

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="there is no C++ compiler")

SOURCE = 'extern "C" int answer() { return %d; }'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tofu_fx"


def answer(number: int = 42) -> int:
    result: int = build.load(SOURCE % number).answer()
    return result


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that were built."""
    made: list[Path] = []
    whole = build._build

    def counted(*args: object) -> Path:
        made.append(whole(*args))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(build, "_build", counted)
    return made


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "headers only": lambda content: content[:4096],  # it loads, and its code lies past the end of the file
    "garbage": lambda content: b"\0garbage" * 100,
    "one bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
}


def test_a_library_is_built_once_and_again_whenever_it_is_damaged(folder: Path, builds: list[Path]) -> None:
    assert answer() == answer() == 42
    assert len(builds) == 1
    for damage in DAMAGE.values():
        (library,) = folder.iterdir()
        content = library.read_bytes()
        library.unlink()  # this process has it mapped
        library.write_bytes(damage(content))
        before = len(builds)
        assert answer() == 42
        assert len(builds) == before + 1
        (library,) = folder.iterdir()
        ctypes.CDLL(str(library))


def test_what_another_process_is_still_writing_is_not_loaded(folder: Path, builds: list[Path]) -> None:
    answer()
    (library,) = folder.iterdir()
    half = folder / ".building-another"
    half.mkdir()
    (half / "cpu.so").write_bytes(library.read_bytes()[:100])
    library.rename(half / "whole.so")
    assert answer() == 42
    assert len(builds) == 2
    assert half.exists()  # it is that process's own


def test_each_source_and_each_set_of_flags_has_a_library_of_its_own(
    folder: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [answer(1), answer(2), answer(1)] == [1, 2, 1]
    assert len(builds) == 2
    monkeypatch.setattr(build, "EXTRA_FLAGS", ("-DOTHER",))
    assert answer(1) == 1
    assert len(builds) == 3


def test_a_cache_folder_that_is_a_file_is_warned_of_once_and_the_operators_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.write_text("in the way")
    monkeypatch.setattr(cpu, "library", functools.cache(cpu.library.__wrapped__))
    _works_with_one_warning(caplog)
    assert cpu.library() is not None
    assert folder.parent.read_text() == "in the way"


def test_a_cache_folder_that_cannot_be_written_is_warned_of_once_and_the_operators_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, dir: Path | None = None, **options: object) -> object:
        if dir is not None:  # root may write anywhere, so the refusal is played
            raise PermissionError(13, "Permission denied", str(dir))
        return temporary(**options)

    temporary = build.tempfile.TemporaryDirectory
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", refuse)
    monkeypatch.setattr(cpu, "library", functools.cache(cpu.library.__wrapped__))
    _works_with_one_warning(caplog)
    assert cpu.library() is not None


def test_without_home_user_and_any_folder_the_operators_run_on_aten(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    for name in ("HOME", "USER", "LOGNAME", "USERNAME", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", refuse)
    monkeypatch.setattr(cpu, "library", functools.cache(cpu.library.__wrapped__))
    _works_with_one_warning(caplog)
    assert cpu.library() is None


def _works_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    expected = reference_fuse(*stream(), 6, "prune", 1, 0)
    with caplog.at_level("WARNING", logger="tofu_fx"):
        for _ in range(2):
            found = fuse_tokens(*stream(), 6, "prune", 1, 0)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(found[2], expected[2])
    (warning,) = caplog.records
    assert "the cache folder cannot be used" in warning.getMessage()
    assert "TORCHINDUCTOR_CACHE_DIR" in warning.getMessage()
