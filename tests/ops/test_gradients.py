"""Gradients of the operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.streams import DTYPES, along, stream
from tofu_fx.ops import STRATEGIES, fuse_tokens, permute_tokens, rebase, restore_tokens


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("r", [0, 1, 6])
def test_gradient_of_fuse(strategy: str, r: int) -> None:
    x, metric, size = stream(dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: fuse_tokens(t, metric, size, r, strategy, 1, 0)[0], (x,))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_of_rebase_restore_and_permute(strategy: str) -> None:
    x, metric, size = stream(dtype=torch.float64)
    x.requires_grad_()
    _, _, assignment, kept = fuse_tokens(x, metric, size, 6, strategy, 1, 0)
    assert torch.autograd.gradcheck(lambda t: rebase(t, size, assignment, kept, strategy), (x,))
    assert torch.autograd.gradcheck(lambda t: permute_tokens(t, size, 3, 1, 0)[0], (x,))

    def there_and_back(t: Tensor) -> Tensor:
        merged = fuse_tokens(t, metric, size, 6, strategy, 1, 0)[0]
        return restore_tokens(merged * merged, assignment, t, merged)

    assert torch.autograd.gradcheck(there_and_back, (x,))


def test_gradient_where_members_cancel_goes_to_the_chosen_one() -> None:
    x = torch.tensor([[[2.0, 1.0], [-2.0, -1.0], [0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    new_x = fuse_tokens(x, along(0, 1, 90, 91), torch.ones(1, 4), 2, "mlerp", 0, 0)[0]
    new_x.backward(torch.tensor([[[3.0, 4.0], [5.0, 6.0]]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[[3.0, 4.0], [0.0, 0.0], [5.0, 6.0], [0.0, 0.0]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_has_the_dtype_of_x_and_the_accuracy_of_float32(strategy: str, dtype: torch.dtype) -> None:
    x, metric, size = stream(dtype=dtype)
    weight = torch.randn(2, 11, 5).to(dtype)
    grads = []
    for t in (x.clone().requires_grad_(), x.double().requires_grad_()):
        out = fuse_tokens(t, metric, size, 6, strategy, 1, 0)
        (out[0] * weight).sum().backward()
        assert t.grad is not None
        assert t.grad.dtype == t.dtype
        grads.append(t.grad.double())
    # one rounding to the dtype; float32's own error is a few 2^-24 times a stretch n/|m| that stays below 10 here
    torch.testing.assert_close(grads[0], grads[1], rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_only_features_carry_gradient() -> None:
    x, metric, size = stream()
    inputs = [t.requires_grad_() for t in (x, metric, size)]
    outputs = fuse_tokens(*inputs, 6, "mlerp", 1, 0)
    assert [o.requires_grad for o in outputs] == [True, False, False, False]
    outputs[0].sum().backward()
    assert x.grad is not None
    assert metric.grad is None
    assert size.grad is None
    assert [o.requires_grad for o in permute_tokens(x, size, 0, 1, 0)] == [True, False, False, False]
