"""The torch.compile backend: Dynamo's graph in, a compiled callable out. The only file that knows Dynamo.

``torch.compile(model, backend="tofu", options={...})`` finds :func:`tofu` by its name in the entry point group
``torch_dynamo_backends``, so installing the package is all there is to do.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import GraphModule

from tofu_fx.compilation import Compilation
from tofu_fx.errors import OptionError, PassError, PlanError, TofuError, TofuWarning, Unsupported
from tofu_fx.inputs import carry_over, fake_mode_of
from tofu_fx.options import Options
from tofu_fx.pipeline import run_pipeline
from tofu_fx.planning.flops import node_flops

logger = logging.getLogger("tofu_fx")


def tofu(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Options | Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with fewer tokens.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, fake or real.
        options: see :class:`tofu_fx.options.Options`.
        mode: one of inductor's modes.

    Returns:
        A callable with the signature of the graph, and outputs of the traced shapes, dtypes and layout.

    Raises:
        OptionError, PlanError: wrong options, or a plan that does not fit. Dynamo wraps them in BackendCompilerFailed.
        PassError: a pass failed and ``on_error`` is "raise".
        TofuError: inductor is asked for on a CPU without a C++ compiler.
    """
    parsed = Options.parse(options, mode)
    _check_compiler(parsed, example_inputs)
    if not parsed.reduces:
        return _inner(gm, example_inputs, parsed)
    outcome = rewrite(gm, parsed, example_inputs, shared_kernels=parsed.inner_backend == "inductor")
    for message in outcome.warnings:
        warnings.warn(f"tofu_fx: {message}", TofuWarning, stacklevel=2)
    compilation = outcome.compilation
    if compilation is None or not compilation.reducing:
        return _inner(gm, example_inputs, parsed)
    carry_over(gm, compilation.gm)
    if not compilation.shared_kernels:
        return _inner(compilation.gm, example_inputs, parsed)
    fakes = [node.meta["val"] for node in compilation.gm.graph.find_nodes(op="placeholder")]
    with torch._guards.tracing(torch._guards.TracingContext(fake_mode_of(compilation.gm))):
        run = _inner(compilation.gm, fakes, parsed)
    counts = compilation.token_counts
    return lambda *args: run(*args, *counts)


@dataclass(frozen=True)
class Outcome:
    """What became of one graph: the compilation (None where the passes could not run) and what must be said aloud."""

    compilation: Compilation | None
    message: str
    warnings: tuple[str, ...] = ()


def rewrite(
    gm: GraphModule,
    options: Options,
    example_inputs: Sequence[Any] | None = None,
    shared_kernels: bool = False,
    shuffle: bool = False,
) -> Outcome:
    """Run the pipeline over a Dynamo graph, which stays as it is; arguments as for ``run_pipeline``.

    Raises:
        OptionError, PlanError: always. PassError: if ``on_error`` is "raise".
    """
    try:
        compilation = run_pipeline(gm, options, example_inputs, shared_kernels=shared_kernels, shuffle=shuffle)
    except (OptionError, PlanError):
        raise
    except Unsupported as reason:
        message = f"nothing was accelerated: {reason}"
        return Outcome(None, message, (message,))
    except PassError as error:
        if options.on_error == "raise":
            raise
        message = f"the graph was compiled untouched, because a pass failed: {error}"
        return Outcome(None, message, (message,))
    notes = tuple(f"{site.id}: {note}" for site in compilation.sites for note in site.notes)
    if _is_one_block(compilation):
        notes = (*notes, _ONE_BLOCK[compilation.reducing[0].placement])
    if compilation.reducing:
        message = f"{len(compilation.reducing)} of {len(compilation.sites)} attention sites reduced"
        logger.info(message)
        return Outcome(compilation, message, notes)
    if not compilation.sites:
        why = "the graph has no attention between pairs of tokens (linear attention has none)"
    elif not any(site.matched for site in compilation.sites):
        reasons = list(dict.fromkeys(f"{site.id}: {site.decline}" for site in compilation.sites))
        why = "every attention was declined: " + "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
    else:
        why = "the options or the plan take no token from any attention site"
    message = f"nothing was accelerated: {why}"
    if not compilation.sites and not any(node_flops(node) for node in compilation.gm.graph.nodes):
        logger.info(message)  # a fragment between two graph breaks: there was nothing to accelerate
        return Outcome(compilation, message, notes)
    return Outcome(compilation, message, (*notes, message))


_ONE_BLOCK = {
    "stream": (
        "the graph is one block of a model: each call of it removes the same share of the tokens and restores them at "
        "its end, so only what follows the attention inside the block gets faster; compile the whole model instead"
    ),
    "branch": (
        "the graph is one block of a model: each call of it runs its attention on the same share of the tokens, "
        "whichever layer it is; compile the whole model to have layers treated each in its own way"
    ),
}


def _is_one_block(compilation: Compilation) -> bool:
    """Whether a stream comes in as an input, has one site, and goes out whole: a block compiled on its own."""
    if len(compilation.reducing) != 1 or any(site.planned and not site.r for site in compilation.sites):
        return False
    (site,), tracer = compilation.reducing, compilation.traced
    assert site.reduce_at is not None
    inputs = [n for n in tracer.graph.find_nodes(op="placeholder") if n not in compilation.model_state]
    streams = [*(node.meta.get("val") for node in inputs), *compilation.traced_outputs[:1]]
    goes_out = site.placement == "branch" or any(barrier.node.op == "output" for barrier in compilation.barriers)
    return goes_out and sum(_shape(value) == _shape(site.reduce_at.meta["val"]) for value in streams) > 1


def _shape(value: Any) -> list[str] | None:
    """A shape to be compared without a guard on its symbols."""
    return [str(size) for size in value.shape] if isinstance(value, torch.Tensor) else None


def refuse_pipeline(model: Any) -> None:
    """Raise TofuError for an object that holds several modules and calls them in turn: one is to be compiled."""
    parts = getattr(model, "components", None)
    if isinstance(model, torch.nn.Module) or not isinstance(parts, Mapping):
        return
    sizes = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in parts.items()
        if isinstance(part, torch.nn.Module)
    }
    if sizes:
        names = sorted(sizes, key=sizes.__getitem__, reverse=True)
        raise TofuError(
            f"{type(model).__name__} is a pipeline, not a module: compile the one of its modules that is called at "
            f"each step, for example pipe.{names[0]} = torch.compile(pipe.{names[0]}, backend='tofu') "
            f"(its modules: {', '.join(names)})"
        )


def run_once(model: Any, backend: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Trace a model with a backend of one's own and run it once; errors come out as they were raised."""
    torch._dynamo.reset()
    try:
        return torch.compile(model, backend=backend)(*args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise (error.inner_exception or error) from None
    finally:
        torch._dynamo.reset()


def _inner(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """What compiles the graph, rewritten or not: the same call either way, so that r = 0 gives the same bits."""
    if options.inner_backend != "inductor":
        return torch._dynamo.lookup_backend(options.inner_backend)(gm, list(example_inputs))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(options.mode)) if options.mode not in (None, "default") else {}
    patches.update(options.inductor or {})
    known = torch._inductor.config.get_config_copy() if patches else {}
    for key in patches:
        if key.replace("-", "_") not in known:
            raise OptionError(f"option 'inductor': {key!r} is not one of inductor's options")
    patches = {key.replace("-", "_"): value for key, value in patches.items()}
    return cast("Callable[..., Any]", compile_fx(gm, list(example_inputs), config_patches=patches))


def _check_compiler(options: Options, example_inputs: Sequence[Any]) -> None:
    """Say that there is no C++ compiler before inductor does in 300 lines."""
    on_cpu = all(x.device.type == "cpu" for x in example_inputs if isinstance(x, torch.Tensor))
    if options.inner_backend != "inductor" or not on_cpu:
        return
    from torch._inductor import config

    wanted = config.cpp.cxx
    names = [name for name in (wanted if isinstance(wanted, (tuple, list)) else [wanted]) if name]
    if not any(shutil.which(name) for name in [*names, "g++", "clang++", "cl"]):
        raise TofuError(
            "inductor needs a C++ compiler on CPU and found none: install g++ (Debian: apt-get install g++), or set "
            "the CXX environment variable, or pass options={'inner_backend': 'aot_eager'} to run without inductor"
        )
