"""`tofu_fx.rewrite`: a module on fewer tokens that is run, read, copied, pickled, trained and passed on."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import tofu_fx
from tests.harness import compiled
from tests.standalone.small import OPTIONS, Model
from tests.zoo import CATALOGUE
from tofu_fx import OptionError, PlanError, TofuError, TofuWarning

#: one of each kind: a plain ViT, windows or conv stages beside attention, text with padding, branches, two streams
NAMES = [
    "timm: deit3",
    "timm: vit_hybrid",
    "timm: samvit",
    "transformers: bert_padded",
    "transformers: whisper_encoder",
    "diffusers: UNet2DConditionModel, Stable Diffusion",
    "diffusers: SD3Transformer2DModel",
]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1))


def fused(module: GraphModule) -> int:
    """How many reductions a graph has."""
    return sum(node.target == torch.ops.tofu.fuse_tokens.default for node in module.graph.nodes)


def test_it_computes_what_the_compiled_model_does_and_takes_tokens(model: Model, x: Tensor) -> None:
    module = tofu_fx.rewrite(model, x, options=OPTIONS)
    assert fused(module) == 2
    assert torch.equal(module(x), compiled(model, **OPTIONS)(x))
    assert not torch.equal(module(x), model(x))


def test_nothing_reduced_has_the_bits_of_the_model(model: Model, x: Tensor) -> None:
    module = tofu_fx.rewrite(model, x, options={"r": 0, "unread": "keep"})
    assert fused(module) == 0
    assert torch.equal(module(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_real_models_compute_what_they_do_compiled(name: str) -> None:
    case = CATALOGUE[name]
    model, (args, kwargs) = case.model(), case.inputs()
    with torch.no_grad():
        found = tofu_fx.rewrite(model, *args, options=OPTIONS, **kwargs)(*args, **kwargs)
        wanted = compiled(model, **OPTIONS)(*args, **kwargs)
    assert type(found).__name__ == type(wanted).__name__
    torch.testing.assert_close(tree_leaves(found), tree_leaves(wanted))


def test_parameters_are_the_models_own(model: Model, x: Tensor) -> None:
    module = tofu_fx.rewrite(model, x, options=OPTIONS)
    own = dict(model.named_parameters())
    assert {name: id(p) for name, p in module.named_parameters()} == {name: id(p) for name, p in own.items()}
    with torch.no_grad():
        model.blocks[0].mlp[1].bias.add_(1.0)
    assert torch.equal(module(x), compiled(model, **OPTIONS)(x))


def test_it_is_code_that_is_read(model: Model, x: Tensor) -> None:
    module = tofu_fx.rewrite(model, x, options=OPTIONS)
    assert "torch.ops.tofu.fuse_tokens.default" in module.code
    assert "fuse_tokens" in module.print_readable(print_output=False)
    module.graph.lint()


def test_it_is_copied_and_pickled(model: Model, x: Tensor) -> None:
    module = tofu_fx.rewrite(model, x, options=OPTIONS)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert other.get_parameter("blocks.0.mlp.1.bias") is not model.blocks[0].mlp[1].bias
        with pytest.raises(TofuError):
            other(x[:1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_goes_through_other_backends(model: Model, x: Tensor, backend: str) -> None:
    module = tofu_fx.rewrite(model, x, options=OPTIONS)
    torch.testing.assert_close(torch.compile(module, backend=backend, fullgraph=True)(x), module(x))


def test_it_goes_through_inductor(model: Model, x: Tensor) -> None:
    module = tofu_fx.rewrite(model, x, options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))


def test_it_is_traced_again(model: Model, x: Tensor) -> None:
    module = tofu_fx.rewrite(model, x, options=OPTIONS)
    again = torch.fx.symbolic_trace(module)
    assert torch.equal(again(x), module(x))
    with pytest.raises(TofuError):
        again(x[:1])
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


def test_it_trains(x: Tensor) -> None:
    torch.manual_seed(0)
    model = Model().train()
    module = tofu_fx.rewrite(model, x, options=OPTIONS)
    torch.manual_seed(3)
    module(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(3)  # dropout draws the same numbers
    compiled(model, **OPTIONS)(x).square().sum().backward()
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def test_a_symbolic_trace_a_function_and_a_compiled_model_are_models(model: Model, x: Tensor) -> None:
    wanted = tofu_fx.rewrite(model, x, options=OPTIONS)(x)
    plain = Model().eval()
    plain.load_state_dict(model.state_dict())
    functions = (lambda x: plain(x), torch.compile(plain, backend="eager"))
    for function in functions:
        module = tofu_fx.rewrite(function, x, options=OPTIONS)
        assert fused(module) == 2
        torch.testing.assert_close(module(x), wanted)
    traced = torch.fx.symbolic_trace(plain, concrete_args={"mask": None})
    module = tofu_fx.rewrite(traced, x, None, options=OPTIONS)
    assert fused(module) == 2
    torch.testing.assert_close(module(x, None), wanted)


def test_an_exported_program_keeps_its_dynamic_batch(model: Model, x: Tensor) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    before = str(program.graph)
    module = tofu_fx.rewrite(program, options=OPTIONS)
    assert fused(module) == 2
    assert str(program.graph) == before
    for size in (2, 5):
        inputs = torch.randn(size, 24, 32)
        torch.testing.assert_close(module(inputs), compiled(model, **OPTIONS)(inputs))
    with pytest.raises(TofuError, match=r"written for \[any, 24, 32\]"):
        module(torch.randn(2, 25, 32))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_graph_of_dynamos_is_chained_with_a_pass_of_ones_own(model: Model, x: Tensor, inner: str) -> None:
    graphs = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        before = str(gm.graph)
        module = tofu_fx.rewrite(gm, *inputs, options=OPTIONS)
        assert str(gm.graph) == before
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
            node.target = torch.ops.aten.relu.default
        module.recompile()
        graphs.append(module)
        return torch._dynamo.lookup_backend(inner)(module, inputs)

    torch._dynamo.reset()
    found = torch.compile(model, backend=backend)(x)
    assert [fused(module) for module in graphs] == [2]
    for block in model.blocks:
        block.mlp[2] = nn.ReLU()
    torch.testing.assert_close(found, tofu_fx.rewrite(model, x, options=OPTIONS)(x))


def test_a_plan_is_followed(model: Model, x: Tensor, tmp_path: Path) -> None:
    plan = tofu_fx.explain(model, x, options=OPTIONS).plan
    rows = [row.model_copy(update={"r": 3 * i}) for i, row in enumerate(plan.sites)]
    plan = plan.model_copy(update={"sites": rows})
    plan.save(tmp_path / "plan.json")
    module = tofu_fx.rewrite(model, x, plan=tmp_path / "plan.json", options={"profitable_only": False})
    assert fused(module) == 1
    assert torch.equal(module(x), tofu_fx.rewrite(model, x, options={"plan": plan, "profitable_only": False})(x))


def test_other_inputs_are_refused_by_name(model: Model, x: Tensor) -> None:
    module = tofu_fx.rewrite(model, x, options=OPTIONS)
    with pytest.raises(
        TofuError, match=r"x: this graph was written for \[2, 24, 32\] in torch.float32, got \[1, 24, 32\]"
    ):
        module(x[:1])
    with pytest.raises(TofuError, match=r"got \[2, 24, 32\] in torch.float64"):
        module(x.double())


def test_what_a_mask_hid_is_checked_in_each_call(model: Model, x: Tensor) -> None:
    seen = torch.zeros(24, 24)
    seen[:, 20:] = -torch.inf
    module = tofu_fx.rewrite(model, x, seen, options=OPTIONS)
    assert fused(module) == 2
    assert torch.equal(module(x, seen), compiled(model, **OPTIONS)(x, seen))
    causal = torch.full((24, 24), -torch.inf).triu(1)
    for other in (module, copy.deepcopy(module)):
        with pytest.raises(TofuError, match="the mask mask hides the same keys from all queries, and in this one"):
            other(x, causal)
    with pytest.raises(TofuError, match="cannot be pickled: rewrite the model where it is to run"):
        pickle.dumps(module)


def test_nothing_to_reduce_is_said(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.warns(TofuWarning, match="nothing was accelerated: the graph has no attention"):
        module = tofu_fx.rewrite(model, x)
    assert torch.equal(module(x), model(x))


def test_a_reduced_model_says_nothing(model: Model, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TofuWarning)
        tofu_fx.rewrite(model, x, options=OPTIONS)


def test_what_is_no_graph_is_refused(x: Tensor) -> None:
    def branching(x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(TofuError, match=r"torch.export cannot trace function as one graph: .*backend='tofu'"):
        tofu_fx.rewrite(branching, x)
    with pytest.raises(TofuError, match="expected a module, a function or an ExportedProgram, got int"):
        tofu_fx.rewrite(3, x)


def test_wrong_options_and_plans(model: Model, x: Tensor) -> None:
    with pytest.raises(OptionError, match="ratioo"):
        tofu_fx.rewrite(model, x, options={"ratioo": 0.5})
    with pytest.raises(OptionError, match="plan: given by itself and among the options"):
        tofu_fx.rewrite(model, x, plan="a.json", options={"plan": "b.json"})
    with pytest.raises(PlanError, match=r"nowhere\.json"):
        tofu_fx.rewrite(model, x, plan="nowhere.json")
