"""`explain` and `token_groups` tell the truth about what the backend does."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tofu_fx
from tests.oracle.stream import Reducer, reference_vit
from tests.zoo import ZOO

ENTRY = ZOO["siglip"]


@pytest.fixture(scope="module")
def explained() -> tofu_fx.Explanation:
    with torch.no_grad():
        return tofu_fx.explain(ENTRY.model(), ENTRY.batch(), options={"r": 4})


def test_every_attention_has_a_row_with_its_tokens_or_its_reason(explained: tofu_fx.Explanation) -> None:
    assert [(row.tokens_in, row.tokens_out, row.strategy) for row in explained.sites] == [
        (36, 32, "prune"), (32, 28, "prune"), (28, 24, "mlerp"), (36, 36, ""),
    ]  # fmt: skip
    assert (explained.matched, explained.declined) == (3, 1)
    assert (explained.tokens_before, explained.tokens_after) == (36, 24)
    assert "attention pooling" in explained.sites[3].reason
    assert "attention_pool.py:" in explained.sites[3].reason


def test_printed_table_shows_sites_reasons_and_totals(explained: tofu_fx.Explanation) -> None:
    text = str(explained)
    for words in (
        "blocks.0.attn",
        "36 → 32",
        "mlerp",
        "3 matched, 1 declined",
        "GFLOPs" if "GFLOPs" in text else "G (0.",
    ):
        assert words in text


def test_flops_are_those_of_the_graphs(explained: tofu_fx.Explanation) -> None:
    model, x = ENTRY.model(), ENTRY.batch()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # As products: torch 2.11 does not count the fused attention of CPU.
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(x)
    assert explained.flops_before == counter.get_total_flops()
    assert 0.6 * explained.flops_before < explained.flops_after < 0.95 * explained.flops_before


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(4, 6, 3, stride=2, groups=2),
        torch.nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
        torch.nn.ConvTranspose1d(4, 6, 3, groups=2),
        torch.nn.Conv3d(4, 2, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_flops_of_convolutions_are_those_of_the_flop_counter(layer: torch.nn.Module) -> None:
    x = torch.randn(2, 4, *[7] * (layer.weight.dim() - 2))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            layer(x)
        explained = tofu_fx.explain(layer, x)
    assert explained.flops_before == counter.get_total_flops() > 0


def test_code_before_and_after_is_readable(explained: tofu_fx.Explanation) -> None:
    assert "tofu.fuse_tokens" not in explained.before
    assert explained.after.count("tofu.fuse_tokens") == 3


def test_model_is_untouched_and_nothing_is_compiled_for_it() -> None:
    model, x = ENTRY.model(), ENTRY.batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        tofu_fx.explain(model, x)
        assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_token_groups_are_the_composed_assignment_of_the_reference() -> None:
    entry = ZOO["deit_distilled"]
    model, x = entry.model(), entry.batch()
    with torch.no_grad():
        (groups,) = tofu_fx.token_groups(model, x, options={"r": 4, "strategy": "mlerp", "unread": "keep"})
        reducer = Reducer([("mlerp", 4)] * 3, 2)
        reference_vit(model, x, reducer)
    expected = reducer.steps[0]["assignment"]
    for step in reducer.steps[1:]:
        expected = step["assignment"].gather(1, expected)
    assert torch.equal(groups, expected)
    assert groups[:, :2].tolist() == [[0, 1]] * 2
