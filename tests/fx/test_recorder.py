"""The recorder makes the graph that make_fx makes, and leaves to it what it does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tofu_fx.passes.lower_to_aten import _trace
from torch import Tensor
from torch.fx import Node

from tests.fx.test_fakes import form
from tests.zoo import CATALOGUE
from tofu_fx.fx.recorder import record
from tofu_fx.testing import capture

MODELS = [
    "timm: vit", "timm: beit", "timm: dinov3", "timm: swin", "timm: xcit", "timm: edgenext", "timm: volo",
    "transformers: yolos", "transformers: bert_padded", "transformers: t5_encoder", "transformers: layoutlmv3",
    "other: encoder_padded_fast_path", "other: multihead_weights",
]  # fmt: skip
UNET = "diffusers: UNet2DConditionModel, Stable Diffusion"


def inputs_of(gm: Any) -> tuple[list[Any], Any]:
    fakes = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    return fakes, next(fake.fake_mode for fake in fakes if isinstance(fake, Tensor))


def described(node: Node, numbers: dict[Node, int]) -> Any:
    known = {key: str(node.meta.get(key)) for key in ("nn_module_stack", "stack_trace", "custom")}
    called = node.op == "call_function"
    return (
        node.op,
        (node.target, node.name) if called else None,
        torch.fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__),
        None if node.op == "output" else form(node.meta["val"]),
        known if called else None,
    )


def assert_recorded_as_traced(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    gm, _ = capture(call, *args, **kwargs)
    fakes, mode = inputs_of(gm)
    with torch._guards.tracing(None):
        recorded, traced = record(gm, fakes, mode), _trace(gm, fakes, mode)
    assert recorded is not None
    for made in (recorded, traced):
        for old, new in zip(
            gm.graph.find_nodes(op="placeholder"), made.graph.find_nodes(op="placeholder"), strict=True
        ):
            new.name = old.name  # as lower_to_aten does, lest other names clash
    nodes = [list(made.graph.nodes) for made in (recorded, traced)]
    numbers = [{node: i for i, node in enumerate(part)} for part in nodes]
    for a, b in zip(*nodes, strict=True):
        assert described(a, numbers[0]) == described(b, numbers[1])


@pytest.mark.parametrize("name", [*MODELS, pytest.param(UNET, marks=pytest.mark.nightly("6 s, for a thousand nodes"))])
def test_a_model_is_recorded_as_make_fx_traces_it(name: str) -> None:
    case = CATALOGUE[name]
    args, kwargs = case.inputs()
    with torch.no_grad():
        assert_recorded_as_traced(case.model(), *args, **kwargs)


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(x)
    y[:, 0] = x[:, 1]
    x.mul_(2)
    return y + x


def gradient_in_place(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    return y.add_(x * 2).relu()


def factories(x: Tensor) -> Tensor:
    place = torch.arange(4, device=x.device) + torch.zeros_like(x) + torch.ones(4).to(torch.float64)
    return place + x.new_full((4,), 2.0) + torch.full((4,), 1.5)


def switches(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x @ x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = x @ x
        with torch.autocast("cpu", enabled=False):
            z = z.float() @ x
    return y + z


def several(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    a, _, b = x.unbind(0)[:3]
    values, places = x.max(dim=1)
    return a, {"b": b, "values": values[places], "again": a}


@pytest.mark.parametrize("call", [in_place, gradient_in_place, factories, switches, several])
@pytest.mark.parametrize("grad", [False, True])
def test_what_models_do_beside_arithmetic_is_recorded(call: Callable[..., Any], grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        assert_recorded_as_traced(call, torch.randn(4, 4, requires_grad=call is gradient_in_place))


def test_parameters_with_gradients_are_recorded_as_traced() -> None:
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert_recorded_as_traced(model, torch.randn(2, 5, 8))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x + torch.tensor([1.0, 2.0]),  # a constant
        lambda x: (x * 2).unsqueeze_(0).relu(),  # another shape for the same tensor
        lambda x: torch.vmap(torch.sum)(x),
    ],
)
def test_what_is_unusual_is_left_to_make_fx(call: Callable[..., Any]) -> None:
    gm, _ = capture(call, torch.randn(2, 2))
    with torch._guards.tracing(None):
        assert record(gm, *inputs_of(gm)) is None


def test_what_was_begun_is_undone() -> None:
    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return x @ x + torch.tensor([1.0, 2.0])

    gm, _ = capture(call, torch.randn(2, 2))
    with torch._guards.tracing(None):
        assert record(gm, *inputs_of(gm)) is None
    assert torch.is_grad_enabled()


def test_symbolic_sizes_are_left_to_make_fx() -> None:
    x = torch.randn(3, 4)
    torch._dynamo.mark_dynamic(x, 0)
    gm, _ = capture(lambda x: x * x.shape[0], x)
    with torch._guards.tracing(None):
        assert record(gm, *inputs_of(gm)) is None
