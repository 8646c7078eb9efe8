"""tofu::separate: padding merges with padding first, and with nothing else while it can be helped."""

from __future__ import annotations

import pytest
import torch

from tests.ops.streams import stream
from tests.oracle.operators import reference_separate
from tofu_fx.ops import fuse_tokens, max_reduction, separate

pytestmark = pytest.mark.usefixtures("on_both")


def test_equals_the_reference() -> None:
    _, metric, _ = stream(tokens=20)
    valid = torch.rand(2, 20, 1) < 0.6
    torch.testing.assert_close(separate(metric, valid), reference_separate(metric, valid[..., 0]))
    assert separate(metric.bfloat16(), valid).dtype == torch.float32


def test_padding_is_most_like_padding_and_least_like_the_rest_whatever_it_holds() -> None:
    _, metric, _ = stream(batch=1, tokens=20)
    metric[0, 1] = -metric[0, 0]  # as unlike as two tokens can be
    metric[0, 12:14] = torch.tensor([[float("nan")], [float("inf")]])
    valid = torch.arange(20)[None, :, None] < 12
    rows = torch.nn.functional.normalize(separate(metric, valid), dim=-1)[0]
    assert rows.isfinite().all()
    cosines = rows @ rows.t()
    assert cosines[:12, :12].min() > cosines[:12, 12:].max() + 0.3
    assert (cosines[12:, 12:] - 1).abs().max() < 1e-6


def test_valid_tokens_keep_their_order_of_likeness() -> None:
    _, metric, _ = stream(batch=1, tokens=20)
    unit = torch.nn.functional.normalize(metric, dim=-1)[0]
    rows = separate(metric, torch.ones(1, 20, 1, dtype=torch.bool))[0]
    torch.testing.assert_close(rows @ rows.t(), 0.64 * (unit @ unit.t()) + 0.36)


@pytest.mark.parametrize("padded", [4, 7, 10])
def test_no_valid_token_joins_padding_at_any_r(padded: int) -> None:
    x, metric, size = stream(tokens=20)
    valid = torch.arange(20)[None, :, None] < 20 - padded  # one mask for all samples
    for r in range(1, max_reduction(20) + 1):
        _, _, assignment, kept = fuse_tokens(x, separate(metric, valid), size, r, "mean", 0, 0)
        representative = kept.gather(1, assignment)
        assert torch.equal(valid[0, :, 0].expand(2, -1), valid[0, :, 0][representative])
        # A pair of padded tokens is one that matching looks at only if one of them stands at an even place.
        even = len(range(20 - padded, 20, 1)) - (padded + 1) // 2
        gone = (representative != torch.arange(20))[:, 20 - padded :].sum(1)
        assert (gone >= min(r, even)).all()


def test_opcheck() -> None:
    _, metric, _ = stream()
    torch.library.opcheck(torch.ops.tofu.separate.default, (metric, torch.rand(2, 17, 1) < 0.5))
