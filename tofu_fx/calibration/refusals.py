"""Inputs that the model itself refuses: distinguished from failures of ours, and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tofu_fx.calibration.batches import Batch
from tofu_fx.errors import CalibrationError, TofuError
from tofu_fx.wording import printable, shortened, shown


class RefusedInput(CalibrationError):
    """The plain model fails on an input; names the batch, its form, and the model's own message."""


@contextmanager
def model_refusals(model: Callable[..., Any], batch: Batch) -> Iterator[None]:
    """Within it, a failure that the plain model has too, on the same batch, is a `RefusedInput`.

    The model is called once more, as plain Python, but only after a failure: what it then raises is its own. A failure
    that it does not have comes out as it was raised.
    """
    try:
        yield
    except TofuError:
        raise
    except Exception as error:  # whatever a model raises
        own = _failure(model, batch)
        if own is None:
            raise
        said = printable(shortened(" ".join(str(own).split()), 500))
        raise RefusedInput(
            f"inputs: the model refuses batch {batch.number} ({describe(batch)}). This is its own error, without "
            f"tofu_fx, {type(own).__name__}{f': {said}' if said else ', without a message'}; call the model with this "
            "input, and correct the input"
        ) from error


def describe(batch: Batch) -> str:
    """The arguments of a call by their shapes and types: "float32 [2, 3, 96, 96], mask=bool [2, 36]"."""
    named = [("", value) for value in batch.args] + [(f"{name}=", value) for name, value in batch.kwargs.items()]
    return ", ".join(printable(name) + _form(value) for name, value in named)


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return shown(value, 40)


def _failure(model: Callable[..., Any], batch: Batch) -> Exception | None:
    try:
        model(*batch.args, **batch.kwargs)
    except Exception as error:  # noqa: BLE001 - whatever a model raises
        return error
    return None
