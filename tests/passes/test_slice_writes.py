"""``x[..., ::2] = y``: made a new tensor where nothing else sees it, left alone and served as a barrier elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tofu_fx.passes.functionalize_inplace import functionalize_inplace
from torch import Tensor, nn
from torch.fx import GraphModule

import tofu_fx
from tests.harness import compiled, prove, randomise
from tofu_fx.compilation import Lowered
from tofu_fx.fx.nodes import is_op
from tofu_fx.plan.options import Options
from tofu_fx.testing import capture_aten, honest_meta, idempotent, keeps_outputs, well_formed

X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))


def functionalized(gm: GraphModule) -> GraphModule:
    lowered = Lowered(gm, Options(), model_state=frozenset(), traced_outputs=())
    return functionalize_inplace(lowered).gm


def rotated(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] - x[..., 1::2]
    out[..., 1::2] = x[..., 0::2] + x[..., 1::2]
    return out


def behind_a_prefix(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:] = y[:, 1:] + 1
    return y


def nested(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:, ::2] = x[:, 1:, ::2]
    return y


def permuted(x: Tensor) -> Tensor:
    y = (x * 2).transpose(1, 2)  # a view of what nobody else reads
    y[:, :3] = x.transpose(1, 2)[:, :3]
    return y.transpose(1, 2)


def of_the_input(x: Tensor) -> Tensor:
    y = x.view(x.shape)
    y[..., :2] = x[..., 2:4] * 2
    return y


def seen_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    view = y.flatten(1)
    y[..., :2] = x[..., 2:4]
    return y + view.view(x.shape)


def part_read_again(x: Tensor) -> Tensor:
    y = x * 2
    part = y[..., :2]
    part.copy_(x[..., 2:4])
    return y + part.sum()


def other_dtype(x: Tensor) -> Tensor:
    y = x * 2
    y[..., :2] = x[..., 2:4].double()
    return y


def broadcast(x: Tensor) -> Tensor:
    y = x * 2
    y[..., :2] = x[:1, :1, 2:4]
    return y


WRITTEN: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "every second feature": (rotated, 0),
    "after a prefix": (behind_a_prefix, 0),
    "a part of a part": (nested, 0),
    "through a view of its own": (permuted, 0),
    "the caller's tensor": (of_the_input, 1),
    "seen through a view": (seen_through_a_view, 1),
    "the part is read again": (part_read_again, 1),
    "another dtype": (other_dtype, 1),
    "broadcast": (broadcast, 0),  # indexing expands the value ahead of the copy
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_write_is_a_new_tensor_only_where_nothing_else_sees_it(name: str) -> None:
    function, left = WRITTEN[name]
    gm, _ = capture_aten(lambda x: function(x), X.clone())
    after = functionalized(gm)
    assert sum(is_op(node, "copy_") for node in after.graph.nodes) == left
    assert any(is_op(node, "slice_scatter") for node in after.graph.nodes) == (left == 0)
    well_formed(after)
    honest_meta(after)


@pytest.mark.parametrize("name", WRITTEN)
def test_bits_stay_and_nothing_is_left_to_do(name: str) -> None:
    gm, inputs = capture_aten(lambda x: WRITTEN[name][0](x), X.clone())
    keeps_outputs(functionalized, gm, inputs)
    idempotent(functionalized, gm)


class Written(nn.Module):
    """Blocks of attention with something written into the stream, or into queries and keys, between them."""

    def __init__(self, stream: Callable[[Tensor], Tensor] | None = None, heads: bool = False) -> None:
        super().__init__()
        self.stream, self.heads = stream, heads
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for qkv in self.qkv:
            q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in qkv(x).chunk(3, -1))
            if self.heads:
                q, k = rotated(q), rotated(k)
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + attended.transpose(1, 2).flatten(2)
            if self.stream is not None:
                x = self.stream(x)
            x = x + self.mlp(x)
        return x.mean(1)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("name", ["every second feature", "another dtype", "seen through a view"])
def test_models_that_write_into_their_stream_are_reduced_and_proved_or_say_why_not(name: str, heads: bool) -> None:
    function, left = WRITTEN[name]
    proofs = prove(randomise(Written(function, heads)), X, r=2).check()
    assert len(proofs.matched) == (0 if left else 3)
    assert all("in place" in str(site.decline) for site in proofs.sites if not site.matched)


@torch.no_grad()
def test_rotary_positions_written_into_queries_and_keys_cost_no_site_and_no_restore() -> None:
    model = randomise(Written(heads=True))
    explained = tofu_fx.explain(model, X, options={"r": 2, "profitable_only": False})
    assert explained.matched == 3
    assert not explained.barriers
    assert compiled(model, r=2)(X).shape == (2, 8)
