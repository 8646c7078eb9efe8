"""The passes one by one, and the runner around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import tofu_fx  # noqa: F401
from tests.harness import EAGER, same_bits, study
from tests.zoo import ZOO
from tofu_fx import PassError, TofuError, pipeline
from tofu_fx.compilation import Compilation, Scheduled
from tofu_fx.fx.nodes import is_op
from tofu_fx.pipeline import PASSES, lower, run_passes, run_pipeline, without
from tofu_fx.plan.options import Options
from tofu_fx.testing import capture, same_graph

NAMES = [p.__name__ for p in PASSES]


def run(model: Any, *inputs: Any, skip: tuple[str, ...] = (), **options: Any) -> tuple[Compilation, Any, Any]:
    """The pipeline on a model's graph: the compilation, what the rewritten graph gives, what the traced one gives."""
    found: list[Any] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        before = gm.code
        compilation = run_passes(without(*skip), gm, Options.parse({**EAGER, **options}))
        assert gm.code == before

        def call(*args: Any) -> Any:
            found.extend((compilation, compilation.gm(*args), gm(*args)))
            return found[2]

        return call

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    return found[0], found[1], found[2]


def test_runner_times_every_pass_in_its_order_and_leaves_the_traced_graph_alone() -> None:
    entry = ZOO["vit"]
    compilation, _, _ = run(entry.model(), entry.batch(), r=4)
    assert list(compilation.seconds) == NAMES
    assert all(seconds >= 0 for seconds in compilation.seconds.values())


@pytest.mark.parametrize("name", ["vit", "beit", "relpos"])
def test_graph_that_is_lowered_once_for_several_options_is_rewritten_as_if_for_each(name: str) -> None:
    entry = ZOO[name]
    with torch.no_grad():
        gm, inputs = capture(entry.model(), entry.batch())
        lowered = lower(gm, inputs)
        before = [node.name for node in lowered.gm.graph.nodes]
        for strategy in ("prune", "mlerp"):
            options = Options.parse({**EAGER, "r": 4, "strategy": strategy})
            alone, shared = run_pipeline(gm, options, inputs), run_pipeline(gm, options, inputs, lowered=lowered)
            assert same_graph(alone.gm.graph, shared.gm.graph)
            assert [node.name for node in alone.gm.graph.nodes] == [node.name for node in shared.gm.graph.nodes]
            sources = [
                [getattr(node, "_dynamo_source", None) for node in made.gm.graph.find_nodes(op="placeholder")]
                for made in (alone, shared)
            ]
            assert sources[0] == sources[1]
            assert len(alone.model_state) == len(shared.model_state)
            assert list(shared.seconds) == NAMES
            assert same_bits(alone.gm(*inputs), shared.gm(*inputs))
        assert [node.name for node in lowered.gm.graph.nodes] == before


def test_variants_that_come_to_the_same_options_are_made_once() -> None:
    entry = ZOO["vit"]
    variants = {
        name: {"r": 4, "strategy": strategy} for name, strategy in (("a", "mean"), ("b", "mean"), ("c", "prune"))
    }
    with torch.no_grad():
        found = study(entry.model(), entry.batch(), variants=variants, interpret=("a", "b", "c"), proofs=False)
    a, b, c = (found.compilations(name)[0] for name in "abc")
    assert a is b is not c
    assert found.outputs["a"] is found.outputs["b"] is not found.outputs["c"]
    assert found.interpreted["a"] is found.interpreted["b"] is not found.interpreted["c"]


@pytest.mark.parametrize("name", ["hf_vit", "beit", "vit"])
def test_shared_kernels_have_one_fake_mode(name: str) -> None:
    # Constants made from nothing once kept the traced graph's: torch 2.11 refuses to mix the two.
    entry, modes = ZOO[name], set()

    def backend(gm: GraphModule, inputs: Any) -> Any:
        graph = run_pipeline(gm, Options.parse({**EAGER, "r": 2}), inputs, shared_kernels=True).gm.graph
        for node in graph.nodes:
            values = torch.utils._pytree.tree_leaves(node.meta.get("val"))
            modes.update(id(value.fake_mode) for value in values if isinstance(value, torch._subclasses.FakeTensor))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(entry.model(), backend=backend)(entry.batch())
    assert len(modes) == 1


def test_unknown_pass_cannot_be_skipped() -> None:
    with pytest.raises(TofuError, match="unknown pass to skip: find_streems"):
        without("find_streems")


def test_lowering_gives_aten_ops_with_values_paths_and_lines() -> None:
    entry = ZOO["torchvision_vit"]
    later = tuple(NAMES[1:])
    compilation, outputs, plain = run(entry.model(), entry.batch(), skip=later)
    calls = [node for node in compilation.gm.graph.nodes if node.op == "call_function"]
    assert all(isinstance(node.target, torch._ops.OpOverload) or "getitem" in str(node.target) for node in calls)
    assert all("val" in node.meta for node in calls)
    lined = [node for node in calls if node.meta.get("stack_trace")]
    assert len(lined) > 0.9 * len(calls)
    assert same_bits(outputs, plain)
    assert compilation.model_state


class InPlace(nn.Module):
    """In-place ops that may and may not become functional."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        if self.kind == "private":
            y += x
            y.mul_(0.5)
            return y.relu_()
        if self.kind == "strides of its own":
            # What a convolution gives for one pixel: ReLU made anew has other strides, by which the upsampling takes
            # another layout and the next convolution another kernel (MaskFormer).
            pixel = y.flatten(1).as_strided((2, 12, 1, 1), (12, 1, 12, 12)).clone(memory_format=torch.preserve_format)
            pixel = pixel.as_strided((2, 12, 1, 1), (12, 1, 12, 12)) * 1
            return pixel.relu_()
        if self.kind == "view read later":
            view = y.view(-1, 4)
            y.add_(1)
            return y, view * 2
        if self.kind == "through a view":
            y[:, 1:].add_(1)
            return y * 2
        if self.kind == "input":
            x.add_(1)
            return x * 2
        y.add_(torch.ones(4, dtype=torch.float64))
        return y


@pytest.mark.parametrize(
    "kind", ["private", "view read later", "through a view", "input", "other dtype", "strides of its own"]
)
def test_functionalising_keeps_the_values_and_only_touches_what_nobody_else_sees(kind: str) -> None:
    x = torch.randn(2, 3, 4)
    model, expected_x = InPlace(kind).eval(), x.clone()
    with torch.no_grad():
        expected = model(expected_x)
    later = tuple(name for name in NAMES if name not in ("lower_to_aten", "functionalize_inplace"))
    compilation: list[Compilation] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        compilation.append(run_passes(without(*later), gm, Options.parse(EAGER)))
        return compilation[0].gm

    torch._dynamo.reset()
    with torch.no_grad():
        outputs = torch.compile(model, backend=backend)(x)
    assert same_bits(outputs, expected)
    assert torch.equal(x, expected_x)
    left = [n for n in compilation[0].gm.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", 0)]
    assert (not left) == (kind == "private")


@pytest.mark.parametrize("name", ["vit", "eva02", "torchvision_vit", "hf_vit_eager"])
def test_polymorphic_graph_has_no_token_count_left_as_a_number(name: str) -> None:
    entry = ZOO[name]
    compilation, _, _ = run(entry.model(), entry.batch(), skip=("insert_reductions",), r=1)
    tracer = compilation.axes
    barriers = {barrier.node for barrier in compilation.barriers}
    for node in compilation.gm.graph.nodes:
        if node in barriers or not is_op(node, "view", "reshape", "expand") or not tracer.tokens(node):
            continue
        sizes = node.args[1]
        for dim, size in zip(tracer.of(node), sizes, strict=True):
            if any(atom.is_token for atom in dim):
                assert not isinstance(size, int) or size == -1, node.format_node()


def test_verification_refuses_an_output_of_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def shorten(compilation: Scheduled) -> Scheduled:
        graph = compilation.gm.graph
        output = graph.output_node()
        (value,) = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
        with graph.inserting_before(output):
            cut = graph.call_function(torch.ops.aten.slice.Tensor, (value, 1, 0, 3))
        cut.meta["val"] = value.meta["val"][:, :3]
        output.args = ((cut,),)
        return compilation

    shorten.__name__ = "insert_reductions"
    passes = tuple(shorten if p.__name__ == "insert_reductions" else p for p in PASSES)
    monkeypatch.setattr(pipeline, "PASSES", passes)
    entry = ZOO["vit"]
    failed = torch._dynamo.exc.BackendCompilerFailed
    with pytest.raises(failed, match=r"output 0 is .*\(2, 3\).*traced as .*\(2, 10\)") as error:
        run(entry.model(), entry.batch(), r=4)
    assert isinstance(error.value.inner_exception, PassError)


@pytest.mark.parametrize("fault", ["call_method", "no value", "placeholder"])
def test_runner_refuses_a_graph_that_breaks_an_invariant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(compilation: Any) -> Any:
        graph = compilation.gm.graph
        source = next(iter(graph.nodes))
        with graph.inserting_after(source):
            if fault == "call_method":
                graph.call_method("relu", (source,))
            elif fault == "no value":
                graph.call_function(torch.ops.aten.relu.default, (source,))
            else:
                graph.placeholder("another")
        return compilation

    spoil.__name__ = "find_attention"
    monkeypatch.setattr(pipeline, "PASSES", tuple(spoil if p.__name__ == "find_attention" else p for p in PASSES))
    words = {"call_method": "is a call_method", "no value": "no fake value", "placeholder": "placeholders"}[fault]
    entry = ZOO["vit"]
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=f"pass find_attention failed.*{words}"):
        run(entry.model(), entry.batch())


def test_proportional_attention_can_be_switched_off() -> None:
    entry = ZOO["vit_gap"]
    with torch.no_grad():
        variants = {
            "on": {"r": 4, "strategy": "mean"},
            "off": {"r": 4, "strategy": "mean", "proportional_attention": False},
        }
        found = study(entry.model(), entry.batch(), variants=variants, proofs=False)
    assert len(found.nodes("on", torch.ops.aten.log.default)) == 2
    assert not found.nodes("off", torch.ops.aten.log.default)
    assert not same_bits(found.outputs["on"], found.outputs["off"])
