"""Keys of reduced tokens weigh what they stand for, whoever asks and whatever hides them.

The oracle is the plain model: of tokens that come as exact copies in pairs, one of each pair can go without any loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from tests.harness import EAGER, randomise, relative_error
from tests.zoo.handwritten import DIM, HEADS, mlp
from tests.zoo.masked import ATTEND, Attend, Masked, are_there, sample
from tofu_fx import Options
from tofu_fx.backend import Outcome, rewrite
from tofu_fx.errors import PassError
from tofu_fx.fx.nodes import is_op, module_path
from tofu_fx.rewriting.rewriter import Rewriter

N, R = 16, 4  # pairs of copies: half of them go at the first of two sites, the others at the second
TOLERANCE = 1e-5  # sums of 16 float32 terms, 6e-8 each, through four blocks with norms


def _pairs(seed: int) -> Tensor:
    return sample(tokens=N // 2, seed=seed).repeat_interleave(2, 1)


def _numbers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    lowest = torch.finfo(q.dtype).min
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(mask, 0.0, lowest))


class Block(nn.Module):
    """Tokens that read themselves, and perhaps a memory."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads
        self.maps = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(8 if reads else 4))
        self.norms, self.mlp = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3)), mlp()

    def forward(self, x: Tensor, memory: Tensor, attends: list[Callable[[Tensor, Tensor, Tensor], Tensor]]) -> Tensor:
        for i, attend in enumerate(attends):
            y = self.norms[i](x)
            source = memory if i else y
            q, k, v = (
                linear(z).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for linear, z in zip(self.maps[4 * i : 4 * i + 3], (y, source, source), strict=True)
            )
            x = x + self.maps[4 * i + 3](attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[2](x))


class Reader(nn.Module):
    """A text that reads an image, as in BLIP: two streams, each reduced twice, and attention from one to the other."""

    def __init__(self, attend: Attend, causal: bool = False) -> None:
        super().__init__()
        self.image = nn.ModuleList(Block(False) for _ in range(2))
        self.text = nn.ModuleList(Block(True) for _ in range(2))
        self.attend, self.causal = attend, causal

    def forward(self, text: Tensor, image: Tensor, there: Tensor) -> Tensor:
        mask = there[:, None, None]

        def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)

        for block in self.image:
            image = block(image, image, [lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)])
        for block in self.text:
            text = block(text, image, [own, lambda q, k, v: self.attend(q, k, v, mask)])
        return text


def _reduced(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, int]:
    """What the model gives with merged tokens, and at how many sites they were merged."""
    sites: list[int] = []

    def backend(gm: Any, examples: Any) -> Any:
        compilation = rewrite(gm, Options.parse({**EAGER, "strategy": "mean", **options}), examples).compilation
        assert compilation is not None
        sites.append(len(compilation.reducing))
        return compilation.gm

    torch._dynamo.reset()
    return torch.compile(model, backend=backend)(*inputs), sum(sites)


@torch.no_grad()
@pytest.mark.parametrize(
    ("spelling", "causal"),
    [(name, False) for name in ("fused", "where", "keys ahead")]
    + [(name, True) for name in ("fused", "after the softmax")],
)
def test_text_that_is_reduced_itself_reads_a_reduced_image(spelling: str, causal: bool) -> None:
    model = randomise(Reader(ATTEND.get(spelling, _numbers), causal))
    inputs = _pairs(1), _pairs(2), are_there([N - 2, N], N)  # one pair of padding: of more any two would meet
    found, sites = _reduced(model, inputs, r=R, placement="stream")
    assert sites == (2 if causal else 4)
    assert relative_error(found, model(*inputs)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("placement", ["stream", "branch"])
@pytest.mark.parametrize("spelling", ["added", "keys ahead", "fused, numbers"])
def test_queries_that_see_no_key_see_all_alike_before_and_after(spelling: str, placement: str) -> None:
    """DeBERTa's padding: what is hidden sees nothing either, which the lowest number makes an average of all."""
    both = Masked(lambda m, x, there: (there[:, None] & there[:, :, None])[:, None], ATTEND.get(spelling, _numbers))
    inputs = _pairs(1), are_there([N - 2, N], N)
    r = (R, R, 0) if placement == "stream" else R
    found, sites = _reduced(randomise(both), inputs, r=r, placement=placement)
    assert sites == (2 if placement == "stream" else 3)
    assert relative_error(found, both(*inputs)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("fill", [-torch.inf, False])
def test_queries_that_see_no_key_get_nothing_before_and_after(fill: float | bool) -> None:
    """The fused op gives zeros where a mask of minus infinities, or of flags, hides everything."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(mask, 0.0, fill) if fill else mask)

    both = randomise(Masked(lambda m, x, there: (there[:, None] & there[:, :, None])[:, None], attend))
    inputs = _pairs(1), are_there([N - 2, N], N)
    found, sites = _reduced(both, inputs, r=(R, R, 0))
    assert sites == 2
    assert relative_error(found, both(*inputs)) < TOLERANCE


@torch.no_grad()
def test_failure_while_one_stream_is_written_costs_that_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Rewriter.write

    def failing(rewriter: Rewriter, node: Node) -> None:
        if is_op(node, "gelu") and "text" in module_path(node) and rewriter.ctx.native.get(node.all_input_nodes[0]):
            raise IndexError("planted")
        write(rewriter, node)

    monkeypatch.setattr(Rewriter, "write", failing)
    inputs = _pairs(1), _pairs(2), are_there([N, N], N)
    outcomes: list[Outcome] = []

    def backend(gm: Any, examples: Any) -> Any:
        with pytest.raises(PassError, match=r"insert_reductions failed at node gelu.*planted"):
            rewrite(gm, Options.parse(options), examples)
        outcomes.append(rewrite(gm, Options.parse({**options, "on_error": "fallback"}), examples))
        return gm

    options = {**EAGER, "r": R, "placement": "stream"}
    torch.compile(randomise(Reader(ATTEND["fused"])), backend=backend)(*inputs)
    (outcome,) = outcomes
    assert outcome.compilation is not None
    assert [site.id for site in outcome.compilation.reducing] == ["image.0", "image.1"]
    assert any("IndexError: planted" in warning for warning in outcome.warnings)
