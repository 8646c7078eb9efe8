"""The way of any tensor of tokens to ``[B, N, F]`` and back, against einops; and what the emitter does beside."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from torch.fx import Graph, Node

from tests.rewriting.writing import emitted, same, targets, written
from tofu_fx.axes.atoms import Atom, Axes, Barrier, Base
from tofu_fx.rewriting.layout import Emitter, Layout, align, shape_of

aten = torch.ops.aten
SIZES = {"a": 2, "b": 3, "h": 4, "c": 5, "n": 9, "m": 9}
KINDS: dict[str, Any] = {"n": "token", "m": "token", "h": "feature", "c": "feature"}
ATOMS = {name: Atom(Base(name, size, KINDS.get(name, "plain"), 0), 0, size) for name, size in SIZES.items()}
FEWER = 6

#: how a tensor lies in memory -> the same as [batch, tokens, rest]
LAYOUTS = {
    "b n c": "b n c",
    "n b c": "b n c",
    "b c n": "b n c",
    "(b n) c": "b n c",
    "(n b) c": "b n c",
    "b h n c": "b n (h c)",
    "b h c n": "b n (h c)",  # there and back are different orders here
    "b n h c": "b n (h c)",
    "n (b h) c": "b n (h c)",
    "a b n c": "(a b) n c",
    "a n b c": "(a b) n c",
    "(a b n) h c": "(a b) n (h c)",
    "(b n) c 1": "b n c",  # three dims, and the axes in order: ConvBERT's kernels with one head
    "1 b (n c)": "b n c",
    "n c": "1 n c",
    "b n": "b n 1",
}


def axes_of(pattern: str) -> Axes:
    """``"(b n) c"`` as the atoms of each dim."""
    words = pattern.replace("(", "( ").replace(")", " )").split()
    dims: list[tuple[Atom, ...]] = []
    group: list[Atom] | None = None
    for word in words:
        if word == "(":
            group = []
        elif word == ")":
            dims, group = [*dims, tuple(group or ())], None
        elif group is not None:
            group.append(ATOMS[word])
        else:
            dims.append((ATOMS[word],) if word != "1" else ())
    return tuple(dims)


def layout_of(pattern: str) -> Layout:
    axes = axes_of(pattern)
    tokens = next(i for i, dim in enumerate(axes) if ATOMS["n"] in dim)
    return Layout(axes, tokens, tuple(ATOMS[name] for name in "ab" if name in pattern))


def filled(pattern: str, tokens: int = SIZES["n"], **sizes: int) -> torch.Tensor:
    """A tensor of that form with another number in each place."""
    known = {**SIZES, "n": tokens, "m": tokens, **sizes}
    flat = " ".join(word for word in pattern.replace("(", "").replace(")", "").split() if word != "1")
    shape = [known[name] for name in flat.split()]
    return rearrange(torch.arange(float(torch.Size(shape).numel())).view(shape), f"{flat} -> {pattern}")


@pytest.mark.parametrize("pattern", LAYOUTS)
def test_every_layout_goes_to_the_one_of_the_operators_and_back_on_fewer_tokens(pattern: str) -> None:
    layout, x, fewer = layout_of(pattern), filled(pattern), filled(LAYOUTS[pattern], FEWER)
    assert layout.atom == ATOMS["n"]
    sizes = {name: SIZES[name] for name in "abhc" if name in pattern}
    there = emitted(lambda emit, node: layout.to_canonical(emit, node, SIZES["n"]), x)
    assert same(there, rearrange(x, f"{pattern} -> {LAYOUTS[pattern]}", **sizes))
    back = emitted(lambda emit, node: layout.from_canonical(emit, node, FEWER), fewer)
    assert same(back, rearrange(fewer, f"{LAYOUTS[pattern]} -> {pattern}", **sizes))


def test_tensor_that_lies_as_the_operators_want_it_is_left_alone() -> None:
    both = ("to_canonical", "from_canonical")
    gm = written(lambda emit, x: [getattr(layout_of("b n c"), way)(emit, x, 9) for way in both], filled("b n c"))
    assert targets(gm) == []


@pytest.mark.parametrize("pattern", ["n b c", "(b n) c", "b h n c"])
def test_graph_for_a_symbolic_batch_serves_any_batch(pattern: str) -> None:
    batch = Atom(Base("b", SIZES["b"], symbolic=True), 0, SIZES["b"])
    axes = tuple(tuple(batch if atom == ATOMS["b"] else atom for atom in dim) for dim in axes_of(pattern))
    layout = Layout(axes, layout_of(pattern).tokens, (batch,))

    def there_and_back(emit: Emitter, x: Node) -> list[Node]:
        there = layout.to_canonical(emit, x, SIZES["n"])
        return [there, layout.from_canonical(emit, there, SIZES["n"])]

    gm, other = written(there_and_back, filled(pattern)), filled(pattern, b=7)
    there, back = gm(other)
    assert same(there, rearrange(other, f"{pattern} -> {LAYOUTS[pattern]}", **({"b": 7} if "(" in pattern else {})))
    assert same(back, other)


def test_what_cannot_be_lined_up_is_a_barrier() -> None:
    lost = Layout(axes_of("n c"), 0, (ATOMS["b"],))
    with pytest.raises(Barrier, match="batch of this tensor cannot be lined up"):
        written(lambda emit, x: lost.to_canonical(emit, x, 9), filled("n c"))
    with pytest.raises(Barrier, match="batch of this tensor cannot be lined up"):
        written(lambda emit, v: align(emit, v, axes_of("b a n"), 2, (ATOMS["a"], ATOMS["b"])), torch.ones(6, 9))
    unknown = [(Atom(Base(name, 3, symbolic=True), 0, 3),) for name in "pq"]
    with pytest.raises(Barrier, match="several symbolic axes"):
        shape_of(Emitter(Graph()), unknown, 9)


def test_shape_has_the_tokens_that_there_are_now() -> None:
    assert shape_of(Emitter(Graph()), axes_of("(b n) h (h c)"), FEWER) == [3 * FEWER, 4, 20]

    def reshaped(emit: Emitter, x: Node) -> Node:
        count = emit.graph.call_function(aten.sym_size.int, (x, 1))  # a number that the graph itself knows
        count.meta["val"] = FEWER
        return emit.call(aten.reshape.default, x, shape_of(emit, axes_of("(b n) c"), count))

    x = filled("b n c", FEWER)
    assert same(written(reshaped, x)(x), x.flatten(0, 1))


#: a tensor's form, the dim whose tokens the values are of, the form of [batch, tokens] beside it
ALIGNED = [
    ("b n c", 1, "b n -> b n 1"),
    ("n b c", 0, "b n -> n b 1"),
    ("b h n m", 3, "b n -> b 1 1 n"),
    ("b h n m", 2, "b n -> b 1 n 1"),
    ("(b h) n m", 2, "b n -> (b h) 1 n"),
    ("(h b) n m", 1, "b n -> (h b) n 1"),
    ("a b n c", 2, "(a b) n -> a b n 1"),
    ("a n b c", 1, "(a b) n -> a n b 1"),
    ("n c", 0, "1 n -> n 1"),
]


@pytest.mark.parametrize(("pattern", "place", "way"), ALIGNED)
def test_values_of_tokens_are_laid_beside_any_tensor_of_them(pattern: str, place: int, way: str) -> None:
    batch = tuple(ATOMS[name] for name in "ab" if name in pattern)
    values = filled(way.split(" -> ")[0], FEWER)
    aligned = emitted(lambda emit, v: align(emit, v, axes_of(pattern), place, batch), values)
    assert same(aligned, repeat(values, way, **{name: SIZES[name] for name in "abh" if name in way and "(" in way}))


def test_emitter_makes_nodes_with_true_values_and_numbers_of_what_is_known() -> None:
    def write(emit: Emitter, x: Node) -> list[Any]:
        emit.origin = x
        x.meta["stack_trace"] = "there"
        assert emit.call(aten.sym_size.int, x, 1) == 9
        assert emit.arithmetic(operator.sub, 9, 2) == 7
        first = emit.once(aten.add.Scalar, x, 1)
        assert first is emit.once(aten.add.Scalar, x, 1) is not emit.call(aten.add.Scalar, x, 1)
        assert first.meta["stack_trace"] == "there"
        return [first, emit.once(aten.add.Scalar, x, 2)]

    x = filled("b n c")
    one, two = emitted(write, x)
    assert same(one, x + 1)
    assert same(two, x + 2)


def test_copy_of_a_node_is_computed_anew_from_what_it_is_given() -> None:
    old = Graph()
    source = old.placeholder("x")
    doubled = old.call_function(aten.mul.Tensor, (source, 2))

    def copied(emit: Emitter, x: Node, fewer: Node) -> list[Node]:
        source.meta["val"], doubled.meta["val"] = x.meta["val"], x.meta["val"]
        alike, other = emit.copy(doubled, lambda _: x), emit.copy(doubled, lambda _: fewer)
        assert alike.meta["val"] is doubled.meta["val"]  # the same input has the same result: not computed again
        return [alike, other]

    x, fewer = filled("b n c"), filled("b n c", FEWER)
    assert all(same(got, 2 * given) for got, given in zip(emitted(copied, x, fewer), (x, fewer), strict=True))
