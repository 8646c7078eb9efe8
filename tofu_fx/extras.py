"""Importing what only the demo, pictures and commands need, with an answer for those who do not have it."""

from __future__ import annotations

import importlib
from types import ModuleType

from tofu_fx.errors import TofuError

INSTALL_HINT = "pip install 'tofu-fx[demo]'"


class MissingExtraError(TofuError):
    """A package of the `demo` extra is not installed; the message names it and the command that installs it."""


def need(module: str, package: str | None = None, user: str = "the demo") -> ModuleType:
    """Import `module`, or raise MissingExtraError.

    Args:
        module: the dotted import name, such as "sklearn.datasets".
        package: the name it is installed by, where that differs from the first part of `module`.
        user: what needs it, as the message begins.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        # A module missing inside an installed package is that package's fault, and its own message says more.
        if (error.name or top).partition(".")[0] != top:
            raise
        raise MissingExtraError(f"{user} needs {package or top}, which is not installed: {INSTALL_HINT}") from error
