"""What the output feels of a token: the information that calibration measures, and what it does where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tofu_fx
from tests.harness import compiled, randomise
from tofu_fx.calibration.batches import Batch
from tofu_fx.calibration.fisher import DRAWS, SHRINKAGE, Information, measure_information
from tofu_fx.calibration.trial import Trial
from tofu_fx.plan.options import Options

N, WIDTH, HEADS, FELT = 17, 24, 2, 4
QUICK: dict[str, Any] = {"inner_backend": "eager", "progress": False}


class Felt(nn.Module):
    """Two blocks, then a mean of a few channels of each token."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(FELT, outputs, bias=outputs > 1)

    def forward(self, x: Tensor, moved: list[Tensor] | None = None) -> Tensor:
        for i in range(2):
            q, k, v = self.qkv[i](x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            if moved is not None:
                x = x + moved[i]
            x = x + self.mlp[i](x)
        return self.head(x[..., :FELT].mean(1))


def isolate(model: Felt) -> None:
    """Let nothing of the other channels reach those that the output reads, but for a little in who attends to whom."""
    with torch.no_grad():
        for qkv, mlp in zip(model.qkv, model.mlp, strict=True):
            qkv.weight[2 * WIDTH :, FELT:] = 0
            qkv.weight[: 2 * WIDTH] *= 0.1
            mlp.weight[:, FELT:] = 0


def inputs(samples: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(samples, N, WIDTH, generator=torch.Generator().manual_seed(seed))


def felt(outputs: int = 1) -> Felt:
    model = Felt(outputs)
    randomise(model)
    return model.eval()


def information(model: nn.Module, *batches: Tensor, classes: bool = False) -> Information:
    with Trial(model, Options(profitable_only=False, placement="stream")) as trial:
        found = [Batch((batch,)) for batch in batches]
        for batch in found:
            trial.plain(batch)
        return measure_information(trial, found, classes, seed=5)


@pytest.mark.parametrize("classes", [False, True])
def test_it_is_the_sum_over_tokens_of_the_gradients_by_hand(classes: bool) -> None:
    model, x = felt(5 if classes else 1), inputs()
    found = information(model, x, classes=classes)
    assert found.refusals == {}
    generator = torch.Generator().manual_seed(5)
    moved = [torch.zeros_like(x, requires_grad=True) for _ in range(2)]
    with torch.enable_grad():
        out = model(x, moved)
    expected = [torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2)]
    for _ in range(DRAWS):
        with torch.enable_grad():
            if classes:
                drawn = torch.multinomial(out.detach().softmax(-1), 1, generator=generator)
                loss = out.log_softmax(-1).gather(-1, drawn).sum()
            else:
                loss = (out * torch.randn(len(x), 1, generator=generator) / out.detach().abs()).sum()
        for total, gradient in zip(expected, torch.autograd.grad(loss, moved, retain_graph=True), strict=True):
            for row in gradient.flatten(0, 1).double():
                total += torch.outer(row, row)
    assert list(found.sums) == ["attention", "attention#2"]
    for total, wanted in zip(found.sums.values(), expected, strict=True):
        assert torch.allclose(total, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_matrices_have_the_information_in_few_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 8, generator=generator) * torch.tensor([9.0, 5, 3, 1, 0.1, 0.1, 0.1, 0.1])
    found = Information()
    found.add("site", rows.view(4, 25, 8))
    (matrix,) = found.matrices(4).values()
    assert matrix.shape == (8, 4)
    total = (rows.T @ rows).double()
    whole = total / total.trace() + SHRINKAGE / 8 * torch.eye(8, dtype=torch.float64)
    # The best of its rank: what is left of the whole are the eigenvalues that are not among the first four.
    left = whole - (matrix @ matrix.T).double()
    expected = torch.linalg.eigvalsh(whole)
    found_left = torch.linalg.eigvalsh(left)
    assert torch.allclose(found_left[-4:], expected[:4], atol=1e-5)
    assert torch.allclose(found_left[:4], torch.zeros(4, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize(
    ("gradient", "reason"),
    [
        (None, "no floating-point output depends on its tokens"),
        (torch.full((1, 2, 3), torch.nan), "its gradients hold NaN or infinity"),
        (torch.zeros(1, 2, 3), "its gradients are all zero"),
    ],
)
def test_sites_without_gradients_say_why(gradient: Tensor | None, reason: str) -> None:
    found = Information()
    found.add("site", gradient)
    assert found.matrices(3) == {}
    assert found.refusals == {"site": reason}


def test_a_plan_takes_it_where_the_output_feels_few_channels(tmp_path: Any) -> None:
    model, x = felt(6), inputs(16)
    isolate(model)
    x[..., FELT:] *= 3  # most of what distinguishes tokens is of no account
    plan = tofu_fx.calibrate(model, x, flops=0.85, metric="relative_l2", **QUICK)
    assert plan.calibration is not None
    assert {row.match for row in plan.sites if row.r} == {"fisher"}
    assert any("columns of the matrices" in note for note in plan.calibration.notes)
    plan.save(tmp_path / "plan.json")
    with torch.no_grad():
        found, plain = compiled(model, plan=str(tmp_path / "plan.json"))(x), model(x)
        error = ((found - plain).norm(dim=1) / plain.norm(dim=1)).mean()
    assert float(error) == pytest.approx(plan.calibration.measured.error, rel=1e-3)


def test_parameters_that_want_no_gradient_and_the_callers_no_grad_make_no_difference() -> None:
    model, x = felt(), inputs()
    expected = information(model, x)
    with torch.no_grad():
        found = information(model.requires_grad_(False), x)
    assert found.refusals == {}
    for a, b in zip(found.sums.values(), expected.sums.values(), strict=True):
        assert torch.equal(a, b)


def test_a_model_keeps_no_gradients() -> None:
    model, x = felt(), inputs().requires_grad_()
    information(model, x)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert x.grad is None


class Numbers(Felt):
    def forward(self, x: Tensor, moved: list[Tensor] | None = None) -> Tensor:
        return super().forward(x).argmax(-1)


def test_whole_numbers_for_outputs_leave_the_other_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    model = Numbers(5)
    randomise(model)

    def differ(outputs: Tensor, plain: Tensor) -> Tensor:
        return (outputs != plain).double()

    plan = tofu_fx.calibrate(model.eval(), inputs(8), flops=0.9, metric=differ, inner_backend="eager")
    assert {row.match for row in plan.sites if row.r} <= {"keys", "heads", "queries_keys", "features"}
    told = " ".join(capsys.readouterr().err.split())
    assert "tokens are not compared by 'fisher' at 2 sites: no output has a gradient" in told


def test_same_seed_gives_the_same_matrices() -> None:
    model, x = felt(6), inputs(8)
    first, second = (tofu_fx.calibrate(model, x, flops=0.85, metric="relative_l2", seed=3, **QUICK) for _ in range(2))
    assert first.projections == second.projections
    assert first.sites == second.sites


class Broken(Felt):
    """The head is in a graph of its own, which has no attention."""

    def forward(self, x: Tensor, moved: list[Tensor] | None = None) -> Tensor:
        for i in range(2):
            q, k, v = self.qkv[i](x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x if moved is None else x + moved[i]
            x = x + self.mlp[i](x)
        # Where all tokens are wanted again each has what distinguished it from its group: of that nothing is felt.
        x = x if moved is None else x - sum(moved)
        torch._dynamo.graph_break()
        return self.head(x[..., :FELT].mean(1))


def test_gradients_pass_through_graphs_that_have_no_site() -> None:
    model, x = Broken(), inputs()
    randomise(model)
    found = information(model.eval(), x)
    assert found.refusals == {}
    generator = torch.Generator().manual_seed(5)
    moved = [torch.zeros_like(x, requires_grad=True) for _ in range(2)]
    with torch.enable_grad():
        out = model(x, moved)
    for _ in range(DRAWS):
        loss = (out * torch.randn(len(x), 1, generator=generator) / out.detach().abs()).sum()
        for total, gradient in zip(
            found.sums.values(), torch.autograd.grad(loss, moved, retain_graph=True), strict=True
        ):
            total -= (gradient.flatten(0, 1).T @ gradient.flatten(0, 1)).double()
    for total in found.sums.values():
        assert float(total.abs().max()) < 1e-3  # of entries up to 90
