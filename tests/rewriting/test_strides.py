"""Outputs lie in memory as the inner backend would lay them out for the untouched graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from tests.harness import compiled, relative_error, tensors
from tests.zoo import ZOO
from tofu_fx.axes.atoms import Barrier
from tofu_fx.rewriting.layout import Emitter
from tofu_fx.rewriting.strides import as_traced
from tofu_fx.testing import randomise


def both(model: Any, x: Tensor, inner: str) -> list[tuple[Tensor, Tensor]]:
    """The outputs of the reduced and of the untouched model, side by side."""
    with torch.no_grad():
        found = tensors(compiled(model, r=4, inner_backend=inner)(x))
        torch._dynamo.reset()
        plain = tensors(torch.compile(model, backend=inner)(x))
    assert len(found) == len(plain)
    assert max(relative_error(a, b) for a, b in zip(found, plain, strict=True)) > 1e-4, "nothing was reduced"
    return list(zip(found, plain, strict=True))


def meaningful(x: Tensor) -> list[int]:
    """Strides, but those of dims with one position, which nothing can tell."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def dinov3() -> tuple[nn.Module, Tensor]:
    config = transformers.DINOv3ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=96, patch_size=16
    )
    return randomise(transformers.DINOv3ViTModel(config)), torch.randn(2, 3, 96, 96)


class Read(nn.Module):
    """What a caller reads of the tokens of a ViT, ``[2, 37, 48]``."""

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.vit, self.read = ZOO["vit"].model(), read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.vit.forward_features(x))


READS: dict[str, Callable[[Tensor], Any]] = {
    "class token": lambda x: x[:, 0],
    "class token, kept": lambda x: x[:, :1],
    "patches": lambda x: x[:, 1:],
    "one feature": lambda x: x[..., 3],
    "every second feature": lambda x: x[..., ::2],
    "every third token, turned": lambda x: x[:, ::3].transpose(1, 2),
    "a part of each token": lambda x: x[:, 0, 8:16],
    "tokens first": lambda x: x.transpose(0, 1),
    "an image": lambda x: x[:, 1:].transpose(1, 2).reshape(2, 48, 6, 6),
    "an image, channels last": lambda x: x[:, 1:].reshape(2, 6, 6, 48).permute(0, 3, 1, 2),
    "the same for all tokens": lambda x: x.mean(1, keepdim=True).expand(-1, x.shape[1], -1),
    "heads": lambda x: x.unflatten(2, (3, 16)).permute(2, 0, 1, 3).unbind(),
    "flags": lambda x: (x[:, 0] > 0, x[:, 0]),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_outputs_of_dinov3_keep_their_strides(inner: str) -> None:
    for found, plain in both(*dinov3(), inner):
        assert found.shape == plain.shape
        assert meaningful(found) == meaningful(plain)


class ReadInEveryWay(Read):
    """One model for all ways of reading, which is compiled once."""

    def __init__(self) -> None:
        super().__init__(lambda x: [read(x) for read in READS.values()])


def test_what_is_read_of_the_tokens_keeps_its_strides() -> None:
    for found, plain in both(ReadInEveryWay(), ZOO["vit"].batch(), "aot_eager"):
        assert found.shape == plain.shape
        assert found.dtype == plain.dtype
        assert meaningful(found) == meaningful(plain)


def laid_out(was: Tensor, values: Tensor) -> Tensor:
    """``values`` with the strides of ``was``, by the nodes that ``as_traced`` appends."""
    graph = Graph()
    node = graph.placeholder("values")
    with FakeTensorMode() as mode:
        node.meta["val"] = mode.from_tensor(values)
        graph.output(as_traced(Emitter(graph), mode.from_tensor(was), node))
    return GraphModule(nn.Module(), graph)(values)


@pytest.mark.parametrize("read", [read for read in READS if read not in ("heads", "flags")])
@pytest.mark.parametrize(
    "base", [torch.arange(2 * 37 * 48.0), torch.arange(2 * 37 * 48) % 3 > 0], ids=["float", "bool"]
)
def test_laid_out_anew_are_the_same_values(read: str, base: Tensor) -> None:
    x = base.view(2, 37, 48)
    was = READS[read](x.float() if "same" in read else x)
    # Told apart from what lies in the gaps: dense, and in another order of dims.
    values = was.transpose(0, -1).contiguous().transpose(0, -1)
    found = laid_out(was, values)
    assert meaningful(found) == meaningful(was)
    assert torch.equal(found, was)


def test_layout_that_is_right_already_costs_nothing() -> None:
    x = torch.randn(2, 37, 48)
    assert laid_out(x, x) is x
    assert laid_out(x[:0], x[:0]).shape == (0, 37, 48)


def test_gradients_pass_a_layout_with_gaps() -> None:
    values, weights = torch.randn(2, 48, requires_grad=True), torch.randn(2, 48)
    (laid_out(torch.empty(2, 37, 48)[:, 0], values) * weights).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weights)


def test_windows_that_overlap_are_a_barrier() -> None:
    windows = torch.arange(10.0).unfold(0, 4, 2)
    with pytest.raises(Barrier, match="overlaps itself in memory"):
        laid_out(windows, windows.contiguous())


def test_class_token_of_a_symbolic_batch_keeps_its_strides() -> None:
    call, x = compiled(Read(lambda x: x[:, 0]), r=4), ZOO["vit"].batch(3)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        assert call(x).stride() == (37 * 48, 1)
        assert call(ZOO["vit"].batch(2)).stride() == (37 * 48, 1)
