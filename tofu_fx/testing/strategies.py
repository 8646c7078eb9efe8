"""Hypothesis strategies: transformers in the ways people write them, and raw FX graphs of ATen ops over tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tofu_fx.extras import MissingExtraError
from tofu_fx.testing.compare import randomise
from tofu_fx.testing.duplicates import repeated, without_positions
from tofu_fx.testing.raw_graphs import ALIKE, BY_PLACE, IN_PLACE, GraphBuilder, RawGraph
from tofu_fx.testing.spec import ODD, WAYS, Spec
from tofu_fx.testing.transformers import Transformer

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise MissingExtraError(
        "tofu_fx.testing.strategies needs hypothesis, which is not installed: pip install hypothesis"
    ) from error


@dataclass(frozen=True)
class DrawnTransformer:
    """A transformer in eval mode and what it is called with; `made` makes it again from what is shown of it."""

    spec: Spec
    batch: int
    seed: int
    model: Transformer = field(repr=False, compare=False)
    inputs: tuple[Tensor, ...] = field(repr=False, compare=False)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ARG002 - as hypothesis calls it
        printer.text(f"made({self.spec}, {self.batch}, {self.seed})")


def made(spec: Spec, batch: int = 2, seed: int = 0) -> DrawnTransformer:
    """The transformer of a spec with random parameters."""
    torch.manual_seed(seed)
    model = Transformer(spec)
    randomise(model, seed)
    return DrawnTransformer(spec, batch, seed, model, model.example_inputs(batch, seed))


@st.composite
def specs(draw: st.DrawFn, **fixed: Any) -> Spec:
    """Any way to write a transformer; what is passed by name is not drawn."""

    def way(name: str) -> Any:
        if name in fixed:
            return fixed[name]
        # An odd way makes many a model one that is left alone: draw it for one model of four.
        odd = name in ODD and draw(st.integers(0, 3))
        return WAYS[name][0] if odd else draw(st.sampled_from(WAYS[name]))

    return replace(Spec(**{name: way(name) for name in WAYS}).tidy(), **fixed)


@st.composite
def transformers(draw: st.DrawFn, **fixed: Any) -> DrawnTransformer:
    """A small transformer with random parameters and inputs; fields of its `Spec` passed by name are not drawn."""
    spec = draw(specs(**fixed))
    batch = 2 if spec.mixing == "groups" else draw(st.integers(1, 3))
    return made(spec, batch, draw(st.integers(0, 3)))


@st.composite
def duplicated(draw: st.DrawFn, **fixed: Any) -> DrawnTransformer:
    """A small transformer without positions, whose input is full of exact copies: other ones in each sample.

    Merging up to two tokens at a site changes its outputs by no more than rounding.
    """
    fixed = {"mask": "none", "rotary": False, "grid": (4, 4), **fixed}
    drawn = draw(transformers(**fixed))
    x, *rest = drawn.inputs
    model = without_positions(drawn.model)
    return replace(drawn, model=model, inputs=(repeated(x, 2, drawn.seed), *rest))


@st.composite
def fx_graphs(draw: st.DrawFn, by_place: bool = True, in_place: bool = True, most: int = 8) -> RawGraph:
    """A raw graph of ATen ops over two streams ``[B, N, C]``, with aliases, views and dead code.

    Args:
        draw: hypothesis's own.
        by_place: with steps that distinguish tokens (cat, slice and split of tokens, position tables).
        in_place: with ops that change their input, or what a view of it shows.
        most: steps at most; each is one to four nodes.
    """
    graph = GraphBuilder(draw(st.integers(0, 3)))
    steps = [*ALIKE, *(IN_PLACE if in_place else ()), *(BY_PLACE if by_place else ())]
    for step in draw(st.lists(st.sampled_from(steps), min_size=1, max_size=most)):
        result = step(graph, draw(st.sampled_from(graph.values)), draw(st.sampled_from(graph.values)))
        if draw(st.integers(0, 5)):  # else dead code, unless it changed something in place
            graph.values.append(result)
    results = draw(st.lists(st.sampled_from(graph.values), min_size=1, max_size=3))
    return graph.finish(results, draw(st.sampled_from((None, "mean", "max"))))
