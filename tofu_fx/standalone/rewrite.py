"""``tofu_fx.rewrite``: a model as a graph on fewer tokens, to be run, read, compiled or passed on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from tofu_fx.backend import rewrite as rewrite_graph
from tofu_fx.compilation import Compilation
from tofu_fx.errors import OptionError
from tofu_fx.fx.nodes import graph_module
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.rewriting.token_count_inputs import carry_over
from tofu_fx.sites.guards import Guard
from tofu_fx.standalone.checks import check_inputs, check_values
from tofu_fx.standalone.trace import Traced, trace
from tofu_fx.summary import note, warn


def rewrite(
    model: Any,
    *args: Any,
    plan: Plan | Mapping[str, Any] | str | None = None,
    options: Options | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> GraphModule:
    """Write a model's graph again, on fewer tokens.

    Args:
        model: a module (what ``torch.fx.symbolic_trace`` returned among them), a function, an ExportedProgram, or the
            graph that Dynamo gives to a backend, whose parameters are inputs.
        args: what the model is called with; nothing for an ExportedProgram. The sizes of tensors are those of every
            later call (dynamic ones of a program or of Dynamo's graph stay dynamic), and so is the mode, train or eval.
        plan: as the option ``plan``.
        options: as for ``torch.compile(model, backend="tofu", options=...)``; what is about compiling decides nothing.
        kwargs: named arguments of the model.

    Returns:
        A GraphModule that is called as the model is. It holds the model's own parameters and buffers under their
        names; its nodes are ATen's operators and ``torch.ops.tofu``'s. Where nothing was reduced it is the model's own
        graph, and a TofuWarning says why, as in a compiled model.

    Raises:
        TofuError: ``torch.export`` cannot trace the model.
        OptionError, PlanError: wrong options, or a plan that does not fit.
        PassError: a pass failed, and ``on_error`` is "raise".
    """
    parsed = options_of(plan, options)
    if isinstance(model, GraphModule) and any("example_value" in n.meta for n in model.graph.nodes):
        return _of_dynamo(model, args, parsed)
    traced = trace(model, args, kwargs)
    program, guards = rewritten(traced, parsed)
    bound = program.module(check_guards=False)
    # A module of its own: torch.export's refuses train() and eval().
    module = GraphModule(bound, bound.graph, type(model).__name__)
    inputs = module.graph.find_nodes(op="placeholder")
    if guards:
        check_values(module, inputs[0], _arguments(module, traced.program), guards)
    check_inputs(module.graph, inputs)
    module.recompile()
    return module


def _of_dynamo(gm: GraphModule, args: Sequence[Any], options: Options) -> GraphModule:
    """Dynamo's graph, which is not changed, on fewer tokens; with the same inputs in the same order."""
    found = _run(gm, options, args or None)
    if found is None:
        return gm
    carry_over(gm, found.gm)
    module = GraphModule(found.gm, found.gm.graph, type(gm).__name__)
    arguments = module.graph.find_nodes(op="placeholder")
    inputs = [
        new
        for old, new in zip(found.gm.graph.find_nodes(op="placeholder"), arguments, strict=True)
        if old not in found.model_state
    ]
    if guards := _guards(found):
        check_values(module, inputs[0], arguments, guards)
    check_inputs(module.graph, inputs)
    module.recompile()
    return module


def _arguments(module: GraphModule, program: ExportedProgram) -> list[Node]:
    """What the graph was called with before parameters were bound, in that order."""
    inputs, last = iter(module.graph.find_nodes(op="placeholder")), module.graph.find_nodes(op="placeholder")[-1]
    found = []
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            found.append(next(inputs))
            continue
        with module.graph.inserting_after(last):
            found.append(module.graph.get_attr(str(spec.target)))
    return found


def options_of(plan: Any, options: Options | Mapping[str, Any] | None) -> Options:
    """Options with a plan that was given by itself.

    Raises:
        OptionError: they have a plan, too.
    """
    if plan is None:
        return Options.parse(options)
    if isinstance(options, Options):
        options = options.model_dump(exclude_unset=True)
    if (options or {}).get("plan") is not None:
        raise OptionError("plan: given by itself and among the options; give it once")
    return Options.parse({**(options or {}), "plan": plan})


def rewritten(traced: Traced, options: Options) -> tuple[ExportedProgram, list[Guard]]:
    """A program on fewer tokens, and what must hold in each call of it; what became of it is said."""
    program = traced.program
    found = _run(program.graph_module, options, traced.example_inputs)
    if found is None:
        return program, []
    signature = copy.deepcopy(program.graph_signature)
    outputs: Any = found.gm.graph.output_node().args[0]
    for spec, node in zip(signature.output_specs, outputs, strict=True):
        if isinstance(node, Node):  # or a constant, None among them
            spec.arg.name = node.name
    constants = _lift_constants(found.gm, signature)
    module = graph_module(found.gm, found.gm.graph)
    # Private, but there is no other way to keep what a program says of its inputs, sizes and names.
    changed = program._update(module, signature, constants={**program.constants, **constants})  # noqa: SLF001
    return changed, _guards(found)


def _lift_constants(gm: GraphModule, signature: ExportGraphSignature) -> dict[str, Tensor]:
    """Make the tensors that a graph holds inputs of it, as programs have them; returns them by their names."""
    kinds = [spec.kind for spec in signature.input_specs]
    place = kinds.index(InputKind.USER_INPUT) if InputKind.USER_INPUT in kinds else len(kinds)
    first, found = [*gm.graph.find_nodes(op="placeholder"), gm.graph.output_node()][place], {}
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = attrgetter(name)(gm)
        if not isinstance(value, Tensor):
            continue
        with gm.graph.inserting_before(first):
            lifted = gm.graph.placeholder(f"c_{name}")
        lifted.meta = dict(node.meta)
        node.replace_all_uses_with(lifted)
        gm.graph.erase_node(node)
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=lifted.name), name)
        signature.input_specs.insert(place, spec)
        place += 1
        found[name] = value.detach()
    return found


def _run(gm: GraphModule, options: Options, example_inputs: Sequence[Any] | None) -> Compilation | None:
    """The pipeline over a graph; None where it is to stay as it is. What became of it is said."""
    if not options.changes:
        return None
    outcome = rewrite_graph(gm, options, example_inputs)
    for message in outcome.warnings:
        warn(message)
    note(outcome)
    return outcome.compilation if outcome.rewritten else None


def _guards(found: Compilation) -> list[Guard]:
    """What must hold in each call."""
    return list(dict.fromkeys(found.guards[site.id] for site in found.reducing if site.id in found.guards))
