"""Compile C++ once, with inductor's compiler and flags, and keep the library in inductor's cache.

A library's name holds the digest of its bytes and it appears under that name in one step: a file that was cut short,
emptied or overwritten is never loaded but built again, and no process sees one that another is still writing.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("tofu_fx")

#: Compiler flags besides inductor's; `.ci/sanitize` adds its own.
EXTRA_FLAGS: tuple[str, ...] = ()


def load(source: str) -> ctypes.CDLL:
    """Return the library that a C++ source with a plain C interface compiles to.

    Where the cache folder cannot be used, the library is built for this process alone and one warning says so.

    Raises:
        Exception: whatever the compiler, inductor or the loader raises.
    """
    flags, cpu = EXTRA_FLAGS, torch.backends.cpu.get_cpu_capability()  # a folder may be shared by several machines
    command: str = _builder("key", "key.cpp", ".", flags).get_command_line()
    stem = f"cpu-{_digest(chr(0).join([source, torch.__version__, cpu, command]).encode())}"
    try:
        return _from_folder(source, stem, flags)
    except OSError as error:
        logger.warning(
            "the cache folder cannot be used, so each process compiles the token operators anew (%s); set "
            "TORCHINDUCTOR_CACHE_DIR to a folder that can be written to",
            error,
        )
    with tempfile.TemporaryDirectory(prefix="tofu-fx-", ignore_cleanup_errors=True) as alone:
        return ctypes.CDLL(str(_build(source, Path(alone), flags)))


def _from_folder(source: str, stem: str, flags: Sequence[str]) -> ctypes.CDLL:
    """Load the library from the cache folder, after building it where it is missing or damaged."""
    folder = _folder()
    library = _intact(folder, stem)
    if library is None:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder, ignore_cleanup_errors=True) as work:
            built = _build(source, Path(work), flags)
            library = folder / _name(stem, built)
            os.replace(built, library)
    return ctypes.CDLL(str(library))


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()) / "tofu_fx"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _intact(folder: Path, stem: str) -> Path | None:
    """Find the library in the folder, if its bytes are those that its name says; remove one that is damaged."""
    for path in sorted(folder.glob(f"{stem}-*")):
        if path.name == _name(stem, path):
            return path
        logger.info("the compiled token operators in %s are damaged: compiling them again", path)
        path.unlink(missing_ok=True)
    return None


def _name(stem: str, library: Path) -> str:
    return f"{stem}-{_digest(library.read_bytes())}{library.suffix}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _build(source: str, folder: Path, flags: Sequence[str]) -> Path:
    path = folder / "cpu.cpp"
    path.write_text(source, encoding="utf-8")
    builder = _builder("cpu", str(path), str(folder), flags)
    builder.build()
    return Path(builder.get_target_file_path())


def _builder(name: str, source: str, folder: str, flags: Sequence[str]) -> Any:
    # Private to inductor; where it has changed, the caller falls back to ATen and names the reason. The flags include
    # -march=native, so there is no need of inductor's own choice of an instruction set, which compiles a trial program.
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions

    options = CppTorchDeviceOptions(device_type="cpu", extra_flags=list(flags))
    return CppBuilder(name=name, sources=source, BuildOption=options, output_dir=folder)
