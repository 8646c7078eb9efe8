"""`tofu_fx.export`: a program that runs where tofu_fx is not installed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

import tofu_fx
from tests.harness import compiled
from tests.standalone.small import OPTIONS, Model
from tests.zoo import CATALOGUE
from tofu_fx import OptionError, PassError, TofuError, TofuWarning
from tofu_fx.ops.portable import DECOMPOSITIONS

#: a plain ViT, an encoder with padding, one whose image is a stream of its own, branches of a UNet, two streams
NAMES = [
    "timm: deit3",
    "transformers: bert_padded",
    "transformers: dinov2",
    "diffusers: UNet2DConditionModel, Stable Diffusion",
    "diffusers: SD3Transformer2DModel",
]
#: run before anything else in a process of its own: tofu_fx cannot be imported there
WITHOUT_TOFU = """
import sys
sys.modules["tofu_fx"] = None
import torch
x = torch.load({x!r})
"""


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 24, 32, generator=torch.Generator().manual_seed(1))


def elsewhere(code: str, x: Tensor, folder: Path) -> Tensor:
    """What a process without tofu_fx computes: ``code`` has ``x`` and makes ``y``."""
    torch.save(x, folder / "x.pt")
    lines = WITHOUT_TOFU.format(x=str(folder / "x.pt")) + textwrap.dedent(code)
    lines += f"\ntorch.save(y, {str(folder / 'y.pt')!r})\nassert sys.modules['tofu_fx'] is None\n"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Tensor = torch.load(folder / "y.pt")
    return found


def foreign(program: ExportedProgram) -> set[str]:
    """The operators of a program that are not ATen's."""
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {name for name in targets if not name.startswith("aten.") and "getitem" not in name and "sym_" not in name}


def test_it_has_operators_of_aten_only_and_computes_what_the_compiled_model_does(model: Model, x: Tensor) -> None:
    program = tofu_fx.export(model, (x,), options=OPTIONS)
    assert not foreign(program)
    wanted = compiled(model, **OPTIONS)(x)
    torch.testing.assert_close(program.module()(x), wanted)
    assert (wanted - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_real_models_compute_what_they_do_compiled(name: str) -> None:
    case = CATALOGUE[name]
    model, (args, kwargs) = case.model(), case.inputs()
    with torch.no_grad():
        program = tofu_fx.export(model, args, kwargs, options=OPTIONS)
        found = program.module()(*args, **kwargs)
        wanted = compiled(model, **OPTIONS)(*args, **kwargs)
    assert not foreign(program)
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_names_of_parameters_inputs_and_outputs_are_the_models(model: Model, x: Tensor) -> None:
    program, plain = tofu_fx.export(model, (x,), options=OPTIONS), torch.export.export(model, (x,))
    assert set(program.state_dict) == set(plain.state_dict)
    assert program.graph_signature.parameters == plain.graph_signature.parameters
    assert program.graph_signature.user_inputs == plain.graph_signature.user_inputs
    assert program.call_spec == plain.call_spec
    paths = {module for n in program.graph.nodes for module, _ in (n.meta.get("nn_module_stack") or {}).values()}
    assert {"blocks.0.attn", "blocks.1.mlp"} <= paths


def test_one_program_serves_every_batch(model: Model, x: Tensor) -> None:
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = tofu_fx.export(model, (x,), options=OPTIONS, dynamic_shapes=shapes)
    wanted = compiled(model, **OPTIONS)(x)
    for batch in (1, 3, 8):
        torch.testing.assert_close(program.module()(x[:batch]), wanted[:batch])


def test_a_saved_program_runs_without_tofu(model: Model, x: Tensor, tmp_path: Path) -> None:
    program = tofu_fx.export(model, (x,), options=OPTIONS)
    torch.export.save(program, tmp_path / "model.pt2")
    found = elsewhere("y = torch.export.load('model.pt2').module()(x)", x, tmp_path)
    torch.testing.assert_close(found, compiled(model, **OPTIONS)(x))


def test_what_aotinductor_made_of_it_runs_without_tofu(model: Model, x: Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
        program = tofu_fx.export(model, (x,), options=OPTIONS, dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
        found = elsewhere("y = torch._inductor.aoti_load_package('compiled.pt2')(x[:3])", x, tmp_path)
        torch.testing.assert_close(found, compiled(model, **OPTIONS)(x)[:3], rtol=1e-4, atol=1e-5)


def onnx(program: ExportedProgram, folder: Path) -> str:
    """Code that runs a program, converted to ONNX, in ONNX Runtime."""
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'tofu-fx[export]'")
    found = torch.onnx.export(program, dynamo=True, verbose=False)
    assert found is not None
    found.save(str(folder / "model.onnx"))
    return """
        import onnxruntime
        session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
        y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    """


@pytest.mark.parametrize("strategy", ["prune", "mean", "mlerp"])
def test_onnx_runtime_computes_the_same(model: Model, x: Tensor, strategy: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "strategy": strategy}
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = tofu_fx.export(model, (x,), options=options, dynamic_shapes=shapes)
    wanted = compiled(model, **options)(x)[:5]
    torch.testing.assert_close(elsewhere(onnx(program, tmp_path), x[:5], tmp_path), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(model: Model, x: Tensor, dtype: torch.dtype) -> None:
    model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad():
        program = tofu_fx.export(model, (x,), options=OPTIONS)
        torch.testing.assert_close(program.module()(x), compiled(model, **OPTIONS)(x), rtol=1e-2, atol=1e-2)


def test_a_plan_with_matrices_is_exported(model: Model, x: Tensor, tmp_path: Path) -> None:
    plan = tofu_fx.explain(model, x, options=OPTIONS).plan
    rows = [row.model_copy(update={"match": "fisher"}) for row in plan.sites]
    generator = torch.Generator().manual_seed(2)
    matrices = {(row.graph, row.id): torch.randn(32, 8, generator=generator) for row in rows}
    plan.model_copy(update={"sites": rows}).with_matrices(matrices).save(tmp_path / "plan.json")
    options = {"profitable_only": False, "inner_backend": "eager"}
    program = tofu_fx.export(model, (x,), plan=str(tmp_path / "plan.json"), options=options)
    assert not foreign(program)
    wanted = compiled(model, plan=str(tmp_path / "plan.json"), **options)(x)
    torch.testing.assert_close(program.module()(x), wanted)
    torch.export.save(program, tmp_path / "model.pt2")
    found = elsewhere("y = torch.export.load('model.pt2').module()(x)", x, tmp_path)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(elsewhere(onnx(program, tmp_path), x, tmp_path), wanted, rtol=1e-4, atol=1e-5)


def test_nothing_reduced_is_the_models_own_program(model: Model, x: Tensor) -> None:
    program = tofu_fx.export(model, (x,), options={"r": 0, "unread": "keep"})
    assert torch.equal(program.module()(x), model(x))
    with pytest.warns(TofuWarning, match="nothing was accelerated"):
        tofu_fx.export(torch.nn.Linear(32, 32), (x,))


def test_a_compiled_model_stands_for_the_model_inside(model: Model, x: Tensor) -> None:
    program = tofu_fx.export(torch.compile(model, backend="tofu", options=OPTIONS), (x,), options=OPTIONS)
    torch.testing.assert_close(program.module()(x), compiled(model, **OPTIONS)(x))


def test_what_no_program_checks_is_refused(model: Model, x: Tensor) -> None:
    seen = torch.zeros(24, 24)
    seen[:, 20:] = -torch.inf
    with pytest.raises(TofuError, match="only while the mask mask hides the same keys from all queries"):
        tofu_fx.export(model, (x, seen), options=OPTIONS)


def test_an_operator_that_is_left_is_an_error(model: Model, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DECOMPOSITIONS, torch.ops.tofu.fuse_tokens.default)
    with pytest.raises(PassError, match=r"would need tofu_fx where it runs, for tofu\.fuse_tokens\.default"):
        tofu_fx.export(model, (x,), options=OPTIONS)


def test_bad_input(model: Model, x: Tensor) -> None:
    with pytest.raises(
        TofuError, match=r"args: expected a tuple of what the model is called with, got Tensor: pass \(x,\)"
    ):
        tofu_fx.export(model, x, options=OPTIONS)
    with pytest.raises(OptionError, match="ratioo"):
        tofu_fx.export(model, (x,), options={"ratioo": 0.5})

    def branching(x: Tensor) -> Any:
        return x if x.sum() > 0 else -x

    with pytest.raises(TofuError, match=r"torch\.export cannot trace function as one graph"):
        tofu_fx.export(branching, (x,))
