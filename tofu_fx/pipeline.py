"""THE ordered list of passes, and the runner that owns their timing, checks, logs and errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from tofu_fx.compilation import Compilation
from tofu_fx.errors import PassError, TofuError
from tofu_fx.fx.nodes import graph_module, module_path, source_line
from tofu_fx.fx.spec import check_spec
from tofu_fx.passes.decline_unprofitable import decline_unprofitable
from tofu_fx.passes.find_attention import find_attention
from tofu_fx.passes.find_streams import find_streams
from tofu_fx.passes.functionalize_inplace import functionalize_inplace
from tofu_fx.passes.insert_reductions import insert_reductions
from tofu_fx.passes.lower_to_aten import lower_to_aten
from tofu_fx.passes.make_polymorphic import make_polymorphic
from tofu_fx.passes.plan_reductions import plan_reductions
from tofu_fx.passes.verify import verify
from tofu_fx.plan.options import Options

logger = logging.getLogger("tofu_fx")

Pass = Callable[[Compilation], None]

#: In order. Each line says why it stands where it stands.
PASSES: tuple[Pass, ...] = (
    lower_to_aten,  # first: all that follows knows one vocabulary
    functionalize_inplace,  # before any analysis: a residual stream changed in place is not a value
    find_attention,  # needs plain axes only
    find_streams,  # needs the sites: a stream starts at a site's residual add
    plan_reductions,  # needs the sites that are left when the streams are known
    decline_unprofitable,  # needs the numbers of tokens that the plan would remove
    make_polymorphic,  # needs the streams' axes; before anything changes the number of tokens
    insert_reductions,  # needs the plan, and literals that follow the tokens
    verify,  # last: proves what the others made
)
#: The first of them, which read no option: a graph that is compiled under several may share what they make.
LOWERING = ("lower_to_aten", "functionalize_inplace")


def run_pipeline(
    gm: GraphModule,
    options: Options,
    example_inputs: Sequence[Any] | None = None,
    skip: Collection[str] = (),
    shared_kernels: bool = False,
    rehearse: bool = False,
    shuffle: bool = False,
    lowered: Compilation | None = None,
) -> Compilation:
    """Run the passes over a Dynamo graph (which stays as it is) and return what they found and made.

    Args:
        gm: a graph from Dynamo, with fake example values on its placeholders.
        options: parsed options.
        example_inputs: what the graph is called with first, from Dynamo; attention behind a mask is declined without.
        skip: names of passes to leave out, for experiments.
        shared_kernels: make token counts inputs of the rewritten graph (see ``tofu_fx.rewrite.token_count_inputs``).
        rehearse: do so on any device, and write what ``tofu_fx.calibration.rehearsal`` needs.
        shuffle: shuffle the tokens at every matched site; with r = 0 at each, the outputs must stay the same.
        lowered: what :func:`lower` made of this graph; it stays as it is.

    Raises:
        TofuError: from a pass on purpose (an option or plan that does not fit, an unsupported graph).
        PassError: a pass failed; names the pass, the node and the user's source line.
    """
    unknown = set(skip) - {p.__name__ for p in PASSES}
    if unknown:
        raise TofuError(f"unknown pass to skip: {', '.join(sorted(unknown))}")
    compilation = Compilation(gm, options, example_inputs, shared_kernels=shared_kernels or rehearse)
    compilation.rehearsed, compilation.shuffle = [] if rehearse else None, shuffle
    passes = PASSES
    if lowered is not None:
        _take_over(lowered, compilation)
        passes = tuple(run for run in PASSES if run.__name__ not in LOWERING)
    placeholders = len(gm.graph.find_nodes(op="placeholder"))
    for run in passes:
        if run.__name__ not in skip:
            _run(run, compilation, placeholders)
    return compilation


def lower(gm: GraphModule, example_inputs: Sequence[Any] | None = None) -> Compilation:
    """Run the passes that read no option, for :func:`run_pipeline` to go on from under several options.

    Raises:
        TofuError, PassError: as there.
    """
    compilation = Compilation(gm, Options(), example_inputs)
    placeholders = len(gm.graph.find_nodes(op="placeholder"))
    for run in PASSES:
        if run.__name__ in LOWERING:
            _run(run, compilation, placeholders)
    return compilation


def _take_over(lowered: Compilation, compilation: Compilation) -> None:
    """Give a compilation a graph of its own of what another lowered, and what is known of it."""
    graph, twins = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(lowered.gm.graph, twins))
    graph.output_node().meta = dict(lowered.gm.graph.output_node().meta)
    for old, new in twins.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    compilation.gm = graph_module(lowered.gm, graph)
    compilation.model_state = frozenset(twins[node] for node in lowered.model_state)
    compilation.before, compilation.traced_outputs = lowered.before, list(lowered.traced_outputs)
    compilation.seconds = dict(lowered.seconds)


def _run(run: Pass, compilation: Compilation, placeholders: int) -> None:
    name, compilation.at = run.__name__, None
    start = time.perf_counter()
    try:
        run(compilation)
        check_spec(compilation.gm, placeholders + len(compilation.token_counts))
    except TofuError as error:
        if type(error) is TofuError:
            raise PassError(_where(name, compilation, error)) from error
        raise
    except Exception as error:
        raise PassError(_where(name, compilation, error)) from error
    finally:
        compilation.seconds[name] = time.perf_counter() - start
    logger.info("%s: %.3f s, %d nodes", name, compilation.seconds[name], len(compilation.gm.graph.nodes))
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("graph after %s:\n%s", name, compilation.gm.print_readable(print_output=False))


def _where(name: str, compilation: Compilation, error: Exception) -> str:
    node = compilation.at
    place = ""
    if node is not None:
        module = module_path(node)
        place = f" at node {node.name}{f' in {module}' if module else ''}{source_line(node)}"
    return f"pass {name} failed{place}: {type(error).__name__}: {error}"
