"""The arrays of an .npz file, each read when it is used: a file may hold far more than what is asked for."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

from tofu_fx.cli.command import CommandError
from tofu_fx.extras import need
from tofu_fx.wording import shortened, shown

#: the names that are looked for
MEANT = ("images", "jpeg", "offset", "input_ids")


class Arrays:
    """An .npz file; its arrays by name.

    Attributes:
        forms: name -> dtype and shape, as the array's header says; of arrays of numbers only.
        names: of these, in the order of the file.

    Raises:
        CommandError: no such file, or not one of numbers.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numpy = need("numpy", user="--inputs")
        if not zipfile.is_zipfile(path):
            raise self._refused("it is no zip file, which an .npz is")
        self.forms: dict[str, tuple[Any, tuple[int, ...]]] = {}
        self._without: dict[str, str] = {}
        try:
            with zipfile.ZipFile(path) as file:
                for member in file.infolist():
                    self._read_header(file, member)
        except Exception as error:  # a damaged archive: zipfile and zlib have exceptions of their own
            raise self._refused(str(error)) from error
        # One that nobody asks for does not matter.
        meant = [why for name, why in self._without.items() if name in MEANT or not self.forms]
        if meant:
            raise self._refused("; ".join(meant))

    @property
    def names(self) -> list[str]:
        """The arrays' names."""
        return list(self.forms)

    def __getitem__(self, name: str) -> Any:
        """Read one array."""
        try:
            with self._numpy.load(self._path, allow_pickle=False) as file:
                return file[name]
        except Exception as error:  # a damaged member, or no memory for it
            raise self._refused(f"array {shown(name)}: {error}") from error

    def _read_header(self, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        formats, name = self._numpy.lib.format, member.filename.removesuffix(".npy")
        if not member.filename.endswith(".npy"):
            return
        with file.open(member) as stream:
            try:
                version = formats.read_magic(stream)
                read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
                shape, _, dtype = read(stream)
            except ValueError as error:
                self._without[name] = f"array {shown(name)}: {error}"
                return
            there = member.file_size - stream.tell()
        if dtype.hasobject:
            self._without[name] = f"array {shown(name)} is of Python objects"
        elif math.prod(shape) * dtype.itemsize != there:
            self._without[name] = f"array {shown(name)} is {dtype} {list(shape)} by its header, but has {there} bytes"
        else:
            self.forms[name] = dtype, shape

    def _refused(self, why: str) -> CommandError:
        why = shortened(" ".join(why.split()), 300)
        return CommandError(f"--inputs {self._path}: not an .npz file of numbers ({why}); expected one, or a folder")
