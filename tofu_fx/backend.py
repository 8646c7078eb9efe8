"""The torch.compile backend: Dynamo's graph in, a compiled callable out. It and ``dynamo.py`` know Dynamo.

``torch.compile(model, backend="tofu", options={...})`` finds :func:`tofu` by its name in the entry point group
``torch_dynamo_backends``, so installing the package is all there is to do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule

from tofu_fx.compilation import Compilation, Lowered
from tofu_fx.dynamo import CONTROL_FLOW, compilations_of_last, is_ddp_bucket
from tofu_fx.errors import OptionError, PassError, PlanError, TofuError, Unsupported
from tofu_fx.fx.nodes import may_multiply
from tofu_fx.pipeline import run_pipeline
from tofu_fx.plan.flops import node_flops
from tofu_fx.plan.options import Options
from tofu_fx.rewriting.reducer import Reducer
from tofu_fx.rewriting.token_count_inputs import carry_over, fake_mode_of
from tofu_fx.sites.guards import guarded
from tofu_fx.sites.site import ever_planned
from tofu_fx.summary import NOTHING, Outcome, note, warn


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
        options: see :class:`tofu_fx.plan.options.Options`.
        mode: one of inductor's modes.

    Returns:
        A callable with the signature of the graph, and outputs of the traced shapes, dtypes and layout.

    Raises:
        OptionError, PlanError: wrong options, or a plan that does not fit. Dynamo wraps them in BackendCompilerFailed.
        PassError: a pass failed, or the inner backend on what the passes made, and ``on_error`` is "raise".
        TofuError: inductor is asked for on a CPU without a C++ compiler.
    """
    parsed = Options.parse(options, mode)
    _check_compiler(parsed, example_inputs)
    if not parsed.changes:
        return _inner(gm, example_inputs, parsed)
    # A bucket of DistributedDataParallel's is compiled in Dynamo's own context, from which the next one is made.
    shared = parsed.inner_backend == "inductor" and not is_ddp_bucket(gm)
    outcome = rewrite(gm, parsed, example_inputs, shared_kernels=shared)
    run = None
    if outcome.rewritten:
        try:
            run = _compile_rewritten(gm, outcome, example_inputs, parsed)
        except _NOT_A_FAILURE:
            raise
        except Exception as error:  # noqa: BLE001 - whatever fails there falls back
            outcome = _failed(f"{parsed.inner_backend} failed on the rewritten graph: {_told(error)}", parsed, error)
    for message in outcome.warnings:
        warn(message)
    model = note(outcome)
    if run is None:
        return _inner(gm, example_inputs, parsed)
    if is_ddp_bucket(gm):
        model.say_once(_BUCKETS)
    count = compilations_of_last()
    if count is not None:
        model.say_once(_LIMIT.format(count=count))
    return run


_NOT_A_FAILURE: tuple[type[Exception], ...] = (OptionError, *CONTROL_FLOW)
_BUCKETS = (
    "DistributedDataParallel's buckets cut the model into several graphs, and every token is whole again at each cut; "
    "with torch._dynamo.config.optimize_ddp = False the model is one graph: gradients are then reduced between the "
    "processes after the whole backward pass instead of during it"
)
_LIMIT = (
    "a function was compiled for {count} kinds of input, which is torch._dynamo.config.recompile_limit: for any other "
    "(length, image size, batch) it will run as it is, neither compiled nor reduced. Pad the inputs to few lengths, or "
    "raise torch._dynamo.config.recompile_limit before the first call"
)


def _compile_rewritten(
    gm: GraphModule, outcome: Outcome, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    compilation = outcome.compilation
    assert compilation is not None
    carry_over(gm, compilation.gm)
    guards = [compilation.guards[site.id] for site in compilation.reducing if site.id in compilation.guards]
    run = _reduced(compilation, example_inputs, options)
    return guarded(run, gm, list(dict.fromkeys(guards))) if guards else run


def _reduced(compilation: Compilation, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """The rewritten graph compiled, with the signature of the traced one."""
    if not compilation.shared_kernels:
        return _inner(compilation.gm, example_inputs, options)
    fakes = [node.meta["val"] for node in compilation.gm.graph.find_nodes(op="placeholder")]
    with torch._guards.tracing(torch._guards.TracingContext(fake_mode_of(compilation.gm))):
        run = _inner(compilation.gm, fakes, options)
    counts = compilation.token_counts
    return lambda *args: run(*args, *counts)


def rewrite(
    gm: GraphModule,
    options: Options,
    example_inputs: Sequence[Any] | None = None,
    shared_kernels: bool = False,
    reducer: Reducer | None = None,
    lowered: Lowered | None = None,
) -> Outcome:
    """Run the pipeline over a Dynamo graph, which stays as it is; arguments as for ``run_pipeline``.

    Raises:
        OptionError, PlanError: always. PassError: if ``on_error`` is "raise".
    """
    if not any(map(may_multiply, gm.graph.nodes)):
        # An optimizer's step, or a fragment between two graph breaks.
        return Outcome(None, f"{NOTHING}the graph has no product of matrices", state="empty")
    try:
        return _outcome(run_pipeline(gm, options, example_inputs, shared_kernels, reducer, lowered))
    except (OptionError, PlanError):
        raise
    except Unsupported as reason:
        return Outcome(None, f"{NOTHING}{reason}")
    except Exception as error:  # noqa: BLE001 - whatever fails there falls back
        return _failed(f"a pass failed: {_told(error)}", options, error)


def _failed(why: str, options: Options, error: Exception) -> Outcome:
    """The outcome of a graph that is compiled untouched because of an error, which is raised if that is asked for."""
    if options.on_error == "raise":
        raise error if isinstance(error, PassError) else PassError(why) from error
    message = f"the graph was compiled untouched, because {why}"
    return Outcome(None, message, (message,), "failed")


def _told(error: Exception) -> str:
    """An error in words: ours say by themselves what they are."""
    return str(error) if isinstance(error, PassError) else f"{type(error).__name__}: {error}"


def _outcome(compilation: Compilation) -> Outcome:
    notes = tuple(f"{site.id}: {site_note}" for site in compilation.sites for site_note in site.notes)
    if _is_one_block(compilation):
        notes = (*notes, _ONE_BLOCK[compilation.reducing[0].placement])
    unread = "; ".join(map(str, compilation.unread))
    if compilation.reducing:
        reduced = f"{len(compilation.reducing)} of {len(compilation.sites)} attention sites reduced"
        return Outcome(compilation, f"{reduced}; {unread}" if unread else reduced, notes, "reduced")
    if unread and not compilation.options.reduces:
        return Outcome(compilation, unread, notes, "reduced")
    if not compilation.sites:
        why = "the graph has no attention between pairs of tokens (linear attention has none)"
    elif not any(site.matched for site in compilation.sites):
        reasons = list(dict.fromkeys(f"{site.id}: {site.decline}" for site in compilation.sites))
        why = "every attention was declined: " + "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
    else:
        why = "the options or the plan take no token from any attention site"
    multiplies = any(node_flops(node) for node in compilation.gm.graph.nodes)
    message = f"no token was reduced: {why}; but {unread}" if unread else f"{NOTHING}{why}"
    return Outcome(compilation, message, notes, "idle" if compilation.sites or multiplies else "empty")


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
    if len(compilation.reducing) != 1 or any(not site.r for site in ever_planned(compilation.sites)):
        return False
    (site,), tracer = compilation.reducing, compilation.axes
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
