"""How values, texts and files of others are put into our messages: short, on one line, harmless to a terminal."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

#: characters of a value that a message shows
MOST = 100


def printable(text: str) -> str:
    """A text whose control characters (escape sequences, half characters) are written out, but for line breaks.

    A terminal obeys them: a file could recolour or overwrite what stands there.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def shortened(text: str, most: int = MOST) -> str:
    """The text, its middle left out where it is longer than ``most`` characters."""
    if len(text) <= most:
        return text
    ends = most // 2 - 3
    return f"{text[:ends]} ... {text[-ends:]}"


def shown(value: Any, most: int = MOST) -> str:
    """A value as a message shows it: its repr on one line, of at most ``most`` characters."""
    if isinstance(value, str) and len(value) > 4 * most:  # cut first: a repr of megabytes is not wanted
        value = value[: 2 * most] + value[-2 * most :]
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a value of the user's: nested too deeply, a number too long to print, or a repr that fails
        text = f"a value of type {type(value).__name__}"
    return printable(shortened(" ".join(text.split()), most))


def expectation(error: Mapping[str, Any], known: Mapping[str, str]) -> str:
    """What was expected at a key that pydantic refused, in our words.

    Args:
        error: one of ``ValidationError.errors()``.
        known: what is expected at the keys that have a text of their own.
    """
    names = [part for part in error["loc"] if isinstance(part, str)]
    if names and names[-1] in known:
        return known[names[-1]]
    kinds = {
        "int": "a whole number",
        "float": "a number",
        "string": "a text",
        "bool": "True or False",
        "list": "a list",
        "dict": "a dict",
        "finite_number": "a finite number",
        "model": "a dict of keys and values",
    }
    kind = str(error["type"])
    return next((text for name, text in kinds.items() if kind.startswith(name)), "another value")


def place(loc: Sequence[Any]) -> str:
    """A key's place in a nested value, as ``sites.0.r``."""
    return ".".join(shortened(printable(str(part))) for part in loc)


def refusal_of(path: str | os.PathLike[str]) -> str:
    """Why a path is no file that can be read, in words; empty where it is one.

    Asked before it is opened: opening a named pipe waits until somebody writes into it.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return error.strerror or "it cannot be looked at"
    except ValueError:  # a character that no path can have
        return "it is not the name of a file"
    if stat.S_ISDIR(mode):
        return "it is a folder; expected a file"
    return "" if stat.S_ISREG(mode) else "it is a pipe or a device; expected a file"
