"""THE ordered list of passes, and the runner that owns their timing, checks, logs and errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from tofu_fx.compilation import Captured, Compilation, Lowered
from tofu_fx.errors import PassError, TofuError
from tofu_fx.fx.nodes import graph_module, module_path, source_line
from tofu_fx.fx.spec import check_spec
from tofu_fx.fx.stages import advanced
from tofu_fx.passes.decline_unprofitable import decline_unprofitable
from tofu_fx.passes.drop_unread_tokens import drop_unread_tokens
from tofu_fx.passes.find_attention import find_attention
from tofu_fx.passes.find_streams import find_streams
from tofu_fx.passes.functionalize_inplace import functionalize_inplace
from tofu_fx.passes.insert_reductions import insert_reductions
from tofu_fx.passes.keep_before import keep_before
from tofu_fx.passes.lower_to_aten import lower_to_aten
from tofu_fx.passes.make_polymorphic import make_polymorphic
from tofu_fx.passes.plan_reductions import plan_reductions
from tofu_fx.passes.verify import verify
from tofu_fx.plan.options import Options
from tofu_fx.rewriting.reducer import Reducer

logger = logging.getLogger("tofu_fx")

Pass = Callable[[Any], Any]


#: In order. Each line says why it stands where it stands.
PASSES: tuple[Pass, ...] = (
    lower_to_aten,  # first: all that follows knows one vocabulary
    functionalize_inplace,  # before any analysis: a residual stream changed in place is not a value
    keep_before,  # the graph that reports, calibration and proofs compare with
    drop_unread_tokens,  # before the sites are found: of an attention whose tokens nobody reads little is left
    find_attention,  # needs plain axes only
    find_streams,  # needs the sites: a stream starts at a site's residual add
    plan_reductions,  # needs the sites that are left when the streams are known
    decline_unprofitable,  # needs the numbers of tokens that the plan would remove
    make_polymorphic,  # needs the streams' axes; before anything changes the number of tokens
    insert_reductions,  # needs the plan, and literals that follow the tokens
    verify,  # last: proves what the others made
)
#: The first of them, which read no option: a graph that is compiled under several may share what they make.
LOWERING = ("lower_to_aten", "functionalize_inplace", "keep_before")


def run_pipeline(
    gm: GraphModule,
    options: Options,
    example_inputs: Sequence[Any] | None = None,
    shared_kernels: bool = False,
    reducer: Reducer | None = None,
    lowered: Lowered | None = None,
) -> Compilation:
    """Run the passes over a Dynamo graph (which stays as it is) and return what they found and made.

    Args:
        gm: a graph from Dynamo, with fake example values on its placeholders.
        options: parsed options.
        example_inputs: what the graph is called with first, from Dynamo; masked attention is declined without.
        shared_kernels: make token counts inputs of the rewritten graph (see ``tofu_fx.rewriting.token_count_inputs``).
        reducer: how reductions are written, where that is not the usual way.
        lowered: what :func:`lower` made of this graph; it stays as it is.

    Raises:
        TofuError: from a pass on purpose (an option or plan that does not fit, an unsupported graph).
        PassError: a pass failed; names the pass, the node and the user's source line.
    """
    graph = run_passes(PASSES, gm, options, example_inputs, shared_kernels, reducer, lowered)
    assert isinstance(graph, Compilation)
    return graph


def run_passes(
    passes: Iterable[Pass],
    gm: GraphModule,
    options: Options,
    example_inputs: Sequence[Any] | None = None,
    shared_kernels: bool = False,
    reducer: Reducer | None = None,
    lowered: Lowered | None = None,
) -> Any:
    """As ``run_pipeline``, but some of the passes only: returns the stage that the last of them made."""
    reducer = reducer or Reducer()
    graph = Captured(gm, options, example_inputs, shared_kernels or reducer.any_plan, reducer)
    placeholders = len(gm.graph.find_nodes(op="placeholder"))
    if lowered is not None:
        graph = _own(lowered, graph)
        passes = [run for run in passes if run.__name__ not in LOWERING]
    for run in passes:
        graph = _run(run, graph, placeholders)
    return graph


def lower(gm: GraphModule, example_inputs: Sequence[Any] | None = None) -> Lowered:
    """Run the passes that read no option, for :func:`run_pipeline` to go on from under several options.

    Raises:
        TofuError, PassError: as there.
    """
    passes = [run for run in PASSES if run.__name__ in LOWERING]
    lowered: Lowered = run_passes(passes, gm, Options(), example_inputs)
    return lowered


def _own(lowered: Lowered, graph: Captured) -> Lowered:
    """What another compilation lowered, with a copy of its graph that may be changed."""
    copy, twins = Graph(), dict[Node, Node]()
    copy.output(copy.graph_copy(lowered.gm.graph, twins))
    copy.output_node().meta = dict(lowered.gm.graph.output_node().meta)
    for old, new in twins.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    known = {"gm": graph_module(lowered.gm, copy), "seconds": dict(lowered.seconds)}
    state = frozenset(twins[node] for node in lowered.model_state)
    kept = {"traced_outputs": lowered.traced_outputs, "before": lowered.before}
    return advanced(Lowered, graph, **known, **kept, model_state=state)


def without(*names: str) -> tuple[Pass, ...]:
    """The passes but those of some names, for experiments.

    Raises:
        TofuError: there is no pass of a name.
    """
    unknown = set(names) - {run.__name__ for run in PASSES}
    if unknown:
        raise TofuError(f"unknown pass to skip: {', '.join(sorted(unknown))}")
    return tuple(run for run in PASSES if run.__name__ not in names)


def _run(run: Pass, graph: Captured, placeholders: int) -> Captured:
    name, graph.at.node = run.__name__, None
    start = time.perf_counter()
    try:
        made: Captured = run(graph)
        check_spec(made.gm, placeholders + len(getattr(made, "token_counts", ())))
    except TofuError as error:
        if type(error) is TofuError:
            raise PassError(_where(name, graph, error)) from error
        raise
    except Exception as error:
        raise PassError(_where(name, graph, error)) from error
    finally:
        graph.seconds[name] = time.perf_counter() - start
    logger.info("%s: %.3f s, %d nodes", name, graph.seconds[name], len(made.gm.graph.nodes))
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("graph after %s:\n%s", name, made.gm.print_readable(print_output=False))
    return made


def _where(name: str, graph: Captured, error: Exception) -> str:
    node = graph.at.node
    place = ""
    if node is not None:
        module = module_path(node)
        place = f" at node {node.name}{f' in {module}' if module else ''}{source_line(node)}"
    return f"pass {name} failed{place}: {type(error).__name__}: {error}"
