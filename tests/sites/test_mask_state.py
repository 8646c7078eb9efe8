"""Masks that a model holds itself: what was judged by their values when a graph was compiled must hold in each call."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.harness import compiled
from tofu_fx import TofuWarning
from tofu_fx.testing import randomise

TOKENS = 16
CAUSAL = torch.triu(torch.full((TOKENS, TOKENS), float("-inf")), 1)


class Masked(nn.Module):
    """Two blocks, whose attention has a mask that the model holds."""

    def __init__(self, learnt: bool = False) -> None:
        super().__init__()
        mask = torch.zeros(TOKENS, TOKENS)
        if learnt:
            self.mask = nn.Parameter(mask)
        else:
            self.register_buffer("mask", mask)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
            x = x + y.transpose(1, 2).flatten(2)
            x = x + mlp(x).tanh()
        return x


def _load(model: Masked) -> None:
    model.load_state_dict({**model.state_dict(), "mask": CAUSAL})


def _copy(model: Masked) -> None:
    with torch.no_grad():
        model.mask.copy_(CAUSAL)


def _replace(model: Masked) -> None:
    model.mask = nn.Parameter(CAUSAL.clone()) if isinstance(model.mask, nn.Parameter) else CAUSAL.clone()


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("change", [_load, _copy, _replace])
def test_a_mask_that_becomes_causal_lets_no_token_see_the_future(
    change: Callable[[Masked], None], learnt: bool
) -> None:
    torch.manual_seed(0)
    model, x = randomise(Masked(learnt)), torch.randn(2, TOKENS, 16)
    with torch.no_grad():
        model.mask.zero_()
        later = x.clone()
        later[:, 8:] += 1
        run = compiled(model, r=4, placement="stream")
        reduced = run(x)
        assert not torch.equal(reduced, model(x))  # tokens were merged, so there is something to leak
        change(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            now, then, again = run(x), run(later), run(x)
    assert torch.equal(now[:, :8], then[:, :8])
    assert torch.equal(now, again)
    torch.testing.assert_close(now, model(x))
    if change is not _replace:  # for another tensor Dynamo may compile anew, and the site is declined
        said = [str(w.message) for w in caught if issubclass(w.category, TofuWarning)]
        assert sum("hides no more than it did" in message for message in said) == 1


def test_a_mask_that_changes_without_hiding_more_stays_reduced() -> None:
    torch.manual_seed(0)
    model, x = randomise(Masked(learnt=True)), torch.randn(2, TOKENS, 16)
    run = compiled(model, r=4, placement="stream")
    with torch.no_grad():
        run(x)
        model.mask.add_(torch.randn(TOKENS, TOKENS))
        fresh = compiled(model, r=4, placement="stream")
        assert torch.equal(run(x), fresh(x))
        assert not torch.allclose(run(x), model(x))


def test_a_bias_that_is_trained_stays_reduced() -> None:
    torch.manual_seed(0)
    model, x = randomise(Masked(learnt=True)).train(), torch.randn(2, TOKENS, 16)
    run, optimizer = compiled(model, r=4, placement="stream"), torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TofuWarning)
        for _ in range(3):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()


def test_masks_of_inference_tensors_are_compared_by_value() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        model, x = randomise(Masked()), torch.randn(2, TOKENS, 16)
        model.mask = torch.zeros(TOKENS, TOKENS)
        run = compiled(model, r=4, placement="stream")
        run(x)
        model.mask.copy_(CAUSAL)
        with pytest.warns(TofuWarning, match="hides no more"):
            torch.testing.assert_close(run(x), model(x))
