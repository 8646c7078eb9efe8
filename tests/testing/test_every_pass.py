"""Every pass of the compiler, on drawn transformers and on raw graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import event, given
from tofu_fx.passes.functionalize_inplace import functionalize_inplace
from torch import Tensor, nn
from torch.fx import GraphModule

from tests.testing.examples import SHARES, TOTAL, share
from tofu_fx.compilation import Captured, Compilation, Lowered
from tofu_fx.fx.nodes import copy_graph
from tofu_fx.fx.spec import check_spec
from tofu_fx.pipeline import PASSES, run_passes, run_pipeline, without
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.testing import (
    EAGER,
    Spec,
    capture,
    difference,
    honest_meta,
    idempotent,
    keeps_outputs,
    leaves_alone,
    lowered,
    order_independent,
    permutation_safe,
    plan_rows,
    prove,
    same_bits,
    well_formed,
)
from tofu_fx.testing.raw_graphs import GraphBuilder, RawGraph, aten
from tofu_fx.testing.strategies import DrawnTransformer, fx_graphs, made, transformers

#: what a pass may do to a graph: rewrite it to the same bits, or change what it computes; all others only look
EXACT = ("lower_to_aten", "functionalize_inplace", "make_polymorphic", "find_streams")
REDUCING = ("insert_reductions",)


def functionalized(gm: GraphModule) -> GraphModule:
    lowered = Lowered(gm, Options(), model_state=frozenset(), traced_outputs=())
    return functionalize_inplace(lowered).gm


def test_the_passes_named_here_are_passes_and_the_shares_are_all_examples() -> None:
    assert {*EXACT, *REDUCING} < {p.__name__ for p in PASSES}
    assert sum(SHARES.values()) == TOTAL["ci"]


def facts(stage: Any) -> dict[str, Any]:
    """What a stage says, as it is now: tuples, sites and guards, but for the graph and the runner's own notes."""
    own = {key: value for key, value in vars(stage).items() if key not in ("gm", "at", "seconds", "reducer")}
    return {key: dict(value) if isinstance(value, dict) else value for key, value in own.items()}


def step_by_step(drawn: DrawnTransformer, r: int = 2) -> Compilation:
    """Run the passes one by one over a transformer's graph, and check the graph after each."""
    with torch.no_grad():
        gm, inputs = capture(drawn.model, *drawn.inputs)
        traced, expected = copy_graph(gm.graph), gm(*inputs)
        stage: Any = Captured(gm, Options.parse({**EAGER, "r": r}), inputs)
        well_formed(stage.gm)
        for run in PASSES:
            given, before, known = stage.gm, copy_graph(stage.gm.graph), facts(stage)
            made = run(stage)
            assert facts(stage) == known, f"{run.__name__} changes facts that it did not make"
            stage, graph = made, made.gm.graph
            # Lowering leaves dead code in the code of its graph, which the pass after it writes anew.
            well_formed(stage.gm, recompiled=run.__name__ != "lower_to_aten")
            check_spec(stage.gm, len(inputs))
            if run.__name__ not in (*EXACT, *REDUCING):
                assert not difference(before, graph), f"{run.__name__}: {difference(before, graph)}"
                continue
            honest_meta(stage.gm)
            if run.__name__ in EXACT:
                assert same_bits(stage.gm(*inputs), expected), run.__name__
            else:
                reached = [site.reduce_at for site in stage.reducing]
                leaves_alone(given.graph, graph, reached)
                assert not difference(before, given.graph)
        assert not difference(traced, gm.graph)
    compilation: Compilation = stage
    return compilation


@share("every pass on a transformer")
@given(drawn=transformers())
def test_passes_keep_graphs_well_formed_and_change_only_what_they_may(drawn: DrawnTransformer) -> None:
    compilation = step_by_step(drawn)
    event(f"{len(compilation.reducing)} of {drawn.spec.depth} sites reduced")


@share("proofs of a transformer")
@given(drawn=transformers())
def test_identity_permutation_and_meaning_hold_for_any_transformer(drawn: DrawnTransformer) -> None:
    proofs = prove(drawn.model, *drawn.inputs)
    # A class token that is read after the last attention does not see the tokens that went there.
    assert not [said for said in proofs.failures if not said.startswith("nothing")], proofs.failures
    event(f"{len(proofs.matched)} of {len(proofs.sites)} sites matched")


class Towers(nn.Module):
    """Two transformers of their own inputs in one graph."""

    def __init__(self, first: DrawnTransformer, second: DrawnTransformer) -> None:
        super().__init__()
        self.first, self.second = first.model, second.model

    def forward(self, first: Tensor, second: Tensor) -> tuple[Any, Any]:
        return self.first(first), self.second(second)


def reduces(tower: str, inputs: tuple[Any, ...]) -> Callable[[GraphModule], GraphModule]:
    """A pass that reduces the tokens of one tower."""

    def pass_(gm: GraphModule) -> GraphModule:
        options = Options.parse({**EAGER, "r": 1, "placement": "stream"})
        found = run_passes(without("insert_reductions"), gm, options, inputs)
        rows = plan_rows(found)
        rows = [row.model_copy(update={"r": 2 if row.module_path.startswith(tower) else 0}) for row in rows]
        assert any(row.r for row in rows)
        return run_pipeline(gm, Options.parse({**EAGER, "plan": Plan(sites=rows)}), inputs).gm

    return pass_


#: what keeps the one site of a tower from being left alone
REDUCED: dict[str, Any] = {"depth": 1, "parallel": "none", "softmax": "softmax", "mixing": "none", "addmm": False}


@share("two towers")
@given(
    first=transformers(mask="none", grid=(3, 4), norm="pre", **REDUCED),
    second=transformers(mask="relative", grid=(4, 4), norm="sandwich", **REDUCED),
)
def test_independent_sites_are_reduced_in_any_order(first: DrawnTransformer, second: DrawnTransformer) -> None:
    with torch.no_grad():
        gm, inputs = capture(Towers(first, second).eval(), *first.inputs, *second.inputs)
        order_independent(reduces("first", inputs), reduces("second", inputs), gm, inputs)


@share("lowering a raw graph")
@given(drawn=fx_graphs())
def test_lowering_a_graph_of_aten_ops_keeps_its_bits_and_has_nothing_left_to_do(drawn: RawGraph) -> None:
    well_formed(lowered(drawn.gm))
    honest_meta(lowered(drawn.gm))
    keeps_outputs(lowered, drawn.gm, drawn.inputs)
    idempotent(lowered, lowered(drawn.gm))


@share("functionalising a raw graph")
@given(drawn=fx_graphs())
def test_functionalising_keeps_bits_and_what_is_written_into_inputs(drawn: RawGraph) -> None:
    gm = lowered(drawn.gm)
    keeps_outputs(functionalized, gm, drawn.inputs)
    idempotent(functionalized, gm)
    well_formed(functionalized(gm))
    honest_meta(gm)


@share("all passes on a raw graph")
@given(drawn=fx_graphs())
def test_a_graph_without_attention_goes_through_all_passes_untouched(drawn: RawGraph) -> None:
    def all_passes(gm: GraphModule) -> GraphModule:
        compilation = run_pipeline(gm, Options.parse({**EAGER, "r": 2}), drawn.inputs)
        assert not compilation.sites
        return compilation.gm

    keeps_outputs(all_passes, drawn.gm, drawn.inputs)


@share("shuffled tokens of a raw graph")
@given(drawn=fx_graphs(by_place=False))
def test_tokens_that_were_treated_alike_still_are(drawn: RawGraph) -> None:
    permutation_safe(lambda gm: functionalized(lowered(gm)), drawn.gm, drawn.inputs, drawn.tokens, drawn.outputs)


# What the generators found, once each.


def test_a_second_change_of_an_input_reaches_the_caller() -> None:
    graph = GraphBuilder()
    once = graph.call(aten.add_.Tensor, graph.values[0], 1.0)
    drawn = graph.finish([graph.call(aten.mul_.Tensor, once, 2.0)])
    keeps_outputs(functionalized, drawn.gm, drawn.inputs)


def test_a_second_change_through_a_view_is_seen_by_its_base() -> None:
    graph = GraphBuilder()
    base = graph.call(aten.relu.default, graph.values[0])
    view = graph.call(aten.slice.Tensor, base, 1, 1, 3)
    graph.call(aten.mul_.Tensor, graph.call(aten.add_.Tensor, view, 1.0), 2.0)
    drawn = graph.finish([graph.call(aten.neg.default, base)])
    keeps_outputs(functionalized, drawn.gm, drawn.inputs)


def test_a_long_skip_sees_a_stream_that_is_changed_in_place_through_a_view() -> None:
    drawn = made(Spec(skip="concatenate", reshape="flatten", in_place=True, depth=3))
    assert prove(drawn.model, *drawn.inputs).identity


def test_tokens_first_streams_are_pooled_in_their_own_layout() -> None:
    for pooling in ("mean", "mean_patches", "attention", "max"):
        drawn = made(Spec(layout="NBC", pooling=pooling, depth=1, prefix=2))
        prove(drawn.model, *drawn.inputs).check()
