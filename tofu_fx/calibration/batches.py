"""What users calibrate with: a tensor, a tuple, an iterable of batches or a DataLoader, as batches of one form."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tofu_fx.errors import CalibrationError, TofuWarning

_FORMS = (
    "a tensor, a tuple of positional arguments, a dict of keyword arguments, or an iterable of these (a DataLoader)"
)
_LABELS = ("label", "labels", "target", "targets")


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of one call of the model; ``number`` is that of the user's batch (or item) that it is of."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    number: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    @property
    def samples(self) -> int:
        """Size of dim 0 of the first tensor that has one."""
        return next(tensor.shape[0] for tensor in self.tensors if tensor.dim())

    def shapes(self) -> list[tuple[int, ...]]:
        """The tensors' shapes without dim 0."""
        return [tuple(tensor.shape[1:]) for tensor in self.tensors]

    def split(self, size: int) -> list[Batch]:
        """Parts of at most ``size`` samples: of every tensor that has as many as the batch, dim 0 is split."""
        count = self.samples
        if count <= size:
            return [self]

        def part(value: Any, start: int) -> Any:
            along = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
            return value[start : start + size] if along else value

        return [
            Batch(tuple(part(v, at) for v in self.args), {k: part(v, at) for k, v in self.kwargs.items()}, self.number)
            for at in range(0, count, size)
        ]


def read_batches(inputs: Any, batch_size: int, model: Any = None) -> list[Batch]:
    """The inputs as batches of at most ``batch_size`` samples, on the model's device.

    A tensor, tuple or dict is one call's arguments; anything else is gone through once, and each item is a batch. An
    item that is a list or tuple loses its labels: what the model's ``forward`` has no parameter for, and one whole
    number for each sample that it does not ask for (that it has a default for); the latter is reported as a warning.

    Raises:
        CalibrationError: no batches, a batch that is no tensor, tuple or dict, or batches of different shapes.
    """
    if isinstance(inputs, (Tensor, tuple, Mapping)):
        items: Iterable[Any] = [inputs]
        unlabelled = isinstance(inputs, (tuple, Mapping))
    elif isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes)):
        items, unlabelled = inputs, False
    else:
        raise CalibrationError(f"inputs: expected {_FORMS}, got {type(inputs).__name__}")
    device = device_of(model) if isinstance(model, torch.nn.Module) else None
    parameters = _parameters(model)
    batches: list[Batch] = []
    for number, item in enumerate(items):
        batch = _read(item, number, unlabelled, parameters)
        if batches and batch.shapes() != batches[0].shapes():
            raise CalibrationError(
                f"inputs: batch {number} has shapes {batch.shapes()} (without the batch's own dim), batch 0 has "
                f"{batches[0].shapes()}; calibrate with inputs of one size"
            )
        _check_finite(batch, number)
        batches.extend(_moved(part, device) for part in batch.split(batch_size))
    if not batches:
        raise CalibrationError("inputs: no batch in them; at least one is needed, and 32 to 64 samples are typical")
    return batches


def as_batch(inputs: Tensor | Mapping[str, Any]) -> Batch:
    """One call's arguments: a tensor, or keyword arguments."""
    return Batch((), dict(inputs)) if isinstance(inputs, Mapping) else Batch((inputs,))


def device_of(model: Any, batches: Sequence[Batch] = ()) -> torch.device:
    """Where a model computes: the device of its first parameter, else of its first input."""
    tensors = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    inputs = (tensor for batch in batches for tensor in batch.tensors)
    return next((tensor.device for tensor in (*tensors, *inputs)), torch.device("cpu"))


def _read(item: Any, number: int, unlabelled: bool, parameters: Sequence[inspect.Parameter] | None) -> Batch:
    if isinstance(item, Tensor):
        batch = Batch((item,), number=number)
    elif isinstance(item, Mapping):
        batch = Batch((), {key: value for key, value in item.items() if unlabelled or key not in _LABELS}, number)
    elif isinstance(item, (list, tuple)):
        args = tuple(item)
        while not unlabelled and len(args) > 1 and _is_label(args, parameters, number):
            args = args[:-1]
        batch = Batch(args, number=number)
    else:
        raise CalibrationError(f"inputs: batch {number} is a {type(item).__name__}; expected {_FORMS}")
    nested = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, (list, tuple))]
    if nested:
        raise CalibrationError(
            f"inputs: batch {number} holds a {type(nested[0]).__name__} where a tensor is expected: each item must be "
            "one batch, not a list of batches"
        )
    if not any(tensor.dim() and tensor.shape[0] for tensor in batch.tensors):
        raise CalibrationError(f"inputs: batch {number} holds no tensor with samples in its dim 0; expected {_FORMS}")
    return batch


def _parameters(model: Any) -> list[inspect.Parameter] | None:
    """What the model takes by position; None where that cannot be known, or is any number."""
    try:
        found = list(inspect.signature(getattr(model, "forward", model)).parameters.values())
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in found):
        return None
    return [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _is_label(args: Sequence[Any], parameters: Sequence[inspect.Parameter] | None, number: int) -> bool:
    first, last = args[0], args[-1]
    if parameters is not None and len(args) > len(parameters):
        return True
    if not isinstance(last, Tensor):
        return isinstance(last, (int, str))
    whole = not last.is_floating_point() and last.dim() == 1 and isinstance(first, Tensor) and first.dim() > 1
    asked_for = parameters is not None and parameters[len(args) - 1].default is inspect.Parameter.empty
    if not whole or last.shape[0] != first.shape[0] or asked_for:
        return False
    if number == 0:
        warnings.warn(
            f"tofu_fx: item {len(args) - 1} of each batch (one whole number for each sample) is taken for labels and "
            "left out; pass dicts of keyword arguments if the model needs it",
            TofuWarning,
            stacklevel=4,
        )
    return True


def _check_finite(batch: Batch, number: int) -> None:
    for tensor in batch.tensors:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise CalibrationError(f"inputs: batch {number} holds NaN values; check how it is loaded and normalised")


def _moved(batch: Batch, device: torch.device | None) -> Batch:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and device is not None else value

    return Batch(tuple(map(move, batch.args)), {key: move(value) for key, value in batch.kwargs.items()}, batch.number)
