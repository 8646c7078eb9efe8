"""What tofu_fx raises and warns with."""

from __future__ import annotations


class TofuError(Exception):
    """Base class of every error that tofu_fx raises on purpose."""


class OptionError(TofuError, ValueError):
    """A wrong option: the message names the key, what was expected and what to do."""


class PlanError(TofuError, ValueError):
    """A plan that cannot be read or does not fit the graph; names the file or the first site that differs."""


class PassError(TofuError):
    """A pass failed: the message names the pass, the node and the user's source line."""


class Unsupported(TofuError):
    """The graph holds something that cannot be rewritten at all; it compiles untouched, and this says why."""


class TofuWarning(UserWarning):
    """Something was not accelerated, or a graph was compiled untouched. Never silent, never an error."""


class CalibrationError(TofuError, ValueError):
    """Calibration cannot be done as asked: inputs, a target or a model that it cannot use. Says what to do instead."""
