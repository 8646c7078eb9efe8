"""How far the outputs of a reduced model are from those of the plain one, whatever the outputs are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from tofu_fx.errors import CalibrationError
from tofu_fx.fx.nodes import argument, is_op, walk_back


@dataclass(frozen=True)
class OutputError:
    """An error of outputs against plain outputs.

    ``measure`` gives one number for each sample. The errors of several sites add up as ``error ** power``: a
    divergence is quadratic in what the logits are off by, so its roots add up, and distances add up themselves.
    """

    name: str
    measure: Callable[[Any, Any], Tensor]
    power: float = 1.0

    def __call__(self, outputs: Any, plain: Any) -> Tensor:
        """One error for each sample, float64 on CPU."""
        return self.measure(outputs, plain).detach().double().cpu().reshape(-1)

    def loss(self, errors: Sequence[float]) -> float:
        """The mean of some samples' errors, in the power that adds up; infinite where it is not a number."""
        mean = sum(errors) / len(errors)
        if mean < -1e-9:
            raise CalibrationError(f"metric: {self.name} returned {mean:.3g}; an error must not be negative")
        return float(max(mean, 0.0) ** self.power) if math.isfinite(mean) else math.inf

    def error(self, loss: float) -> float:
        """A loss as an error."""
        return float(loss ** (1 / self.power))


def relative_l2(outputs: Any, plain: Any) -> Tensor:
    """``|outputs - plain| / |plain|`` of each sample (dim 0), averaged over the floating-point tensors: ``[B]``."""
    pairs = [(a, b) for a, b in zip(_tensors(outputs), _tensors(plain), strict=True) if b.numel()]
    if not pairs:
        raise CalibrationError("the model's outputs hold no floating-point tensor to compare; pass metric=")
    samples = max(b.shape[0] if b.dim() else 1 for _, b in pairs)
    errors = []
    for a, b in pairs:
        rows = b.shape[0] if b.dim() and b.shape[0] == samples else 1
        a, b = a.reshape(rows, -1).double(), b.reshape(rows, -1).double()
        size = torch.linalg.vector_norm(b, dim=1)
        off = torch.linalg.vector_norm(a - b, dim=1)
        errors.append((off / torch.where(size == 0, 1.0, size)).expand(samples))
    return torch.stack(errors).mean(0)


def kl_divergence(outputs: Any, plain: Any) -> Tensor:
    """KL(plain || outputs) in nats of class scores ``[B, classes]`` (before the softmax): ``[B]``."""
    if len(_tensors(plain)) != 1:
        raise CalibrationError(f"metric: 'kl' needs one floating-point output, the model has {len(_tensors(plain))}")
    (a,), (b,) = _tensors(outputs), _tensors(plain)
    a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return (b.exp() * (b - a)).sum(-1).clamp_min(0)


METRICS = {
    "relative_l2": OutputError("relative_l2", relative_l2),
    "kl": OutputError("kl", kl_divergence, power=0.5),
}


def choose_metric(metric: Any, plain: Any, graph: Graph | None) -> OutputError:
    """The error to use: the user's, or KL where the outputs look like class scores, else relative L2.

    They do if they are one floating-point tensor ``[B, classes]`` with at least two classes, and the last op that is
    not a view or a cast is a linear layer with a bias. (Embeddings are mostly made by a norm, or by a layer without.)

    Raises:
        CalibrationError: an unknown name, or no function.
    """
    if callable(metric):
        return OutputError(getattr(metric, "__name__", "user's function"), _checked(metric))
    if metric is not None:
        if not isinstance(metric, str) or metric not in METRICS:
            raise CalibrationError(
                f"metric: expected a function of (outputs, plain outputs) or one of {', '.join(METRICS)}, "
                f"got {metric!r}"
            )
        return METRICS[metric]
    tensors = _tensors(plain)
    scores = len(tensors) == 1 and tensors[0].dim() == 2 and tensors[0].shape[1] > 1
    return METRICS["kl" if scores and graph is not None and _ends_in_classifier(graph) else "relative_l2"]


def _checked(metric: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Tensor]:
    def measure(outputs: Any, plain: Any) -> Tensor:
        value = metric(outputs, plain)
        if isinstance(value, (int, float)):
            return torch.tensor([float(value)])
        if not isinstance(value, Tensor) or not value.numel():
            raise CalibrationError(f"metric: the function must return a number or a tensor, it returned {value!r}")
        return value

    return measure


def _tensors(outputs: Any) -> list[Tensor]:
    return [value for value in tree_leaves(outputs) if isinstance(value, Tensor) and value.is_floating_point()]


def _ends_in_classifier(graph: Graph) -> bool:
    outputs = [value for value in tree_leaves(graph.output_node().args[0]) if isinstance(value, Node)]
    if len(outputs) != 1:
        return False
    *_, last = walk_back(outputs[0], ("to", "_to_copy", "view", "reshape", "squeeze", "select", "contiguous", "clone"))
    return (is_op(last, "linear") and argument(last, "bias") is not None) or is_op(last, "addmm")
