"""A model as one graph, by ``torch.export``: what stands on its own has no second graph to go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from tofu_fx.errors import TofuError
from tofu_fx.fx.nodes import MODEL_STATE


class _Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class Traced:
    """A program, and what its graph was traced with, in the order of its placeholders, where that is known."""

    program: ExportedProgram
    example_inputs: list[Any] | None


def trace(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any = None) -> Traced:
    """The program of a model; an ExportedProgram is that already, and is not changed.

    Its placeholders are marked as parameters or inputs. Sizes are those of ``args`` and ``kwargs``, or dynamic.

    Raises:
        TofuError: ``torch.export`` refuses the model; says why and what to try.
    """
    program = model if isinstance(model, ExportedProgram) else _exported(model, args, kwargs, dynamic_shapes)
    specs = program.graph_signature.input_specs
    given = iter(tree_leaves(program.example_inputs))
    held = {**program.state_dict, **program.constants}
    values = []
    for node, spec in zip(program.graph.find_nodes(op="placeholder"), specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            node.meta[MODEL_STATE] = spec.kind.name
        values.append(next(given, None) if spec.kind == InputKind.USER_INPUT else held.get(str(spec.target)))
    return Traced(program, None if program.example_inputs is None else values)


def _exported(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    model = getattr(model, "_orig_mod", model)  # what torch.compile returned stands for the model inside
    if not callable(model):
        raise TofuError(f"expected a module, a function or an ExportedProgram, got {type(model).__name__}")
    module = model if isinstance(model, nn.Module) else _Called(model)
    try:
        return torch.export.export(module, tuple(args), dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TofuError(
            f"torch.export cannot trace {type(model).__name__} as one graph: {reason} (torch.compile with "
            "backend='tofu' goes on after what is no graph; here, leave it out of the forward, or rewrite the part of "
            "the model that holds the attentions)"
        ) from error
