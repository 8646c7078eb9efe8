"""What the output feels of a token: the matrices by which "fisher" compares tokens.

At each site, over the calibration inputs: g is the gradient with respect to a token behind the site of log p(y), y
being drawn from the model's own p; of outputs that are no class scores, of random projections of each, divided by its
norm.
``G = sum g g^T`` over tokens, inputs and draws is the Fisher information that the outputs hold about a token (the
Gauss-Newton matrix of the output error), so ``(a - b)^T G (a - b)`` is to second order how much the outputs move if b
takes the place of a. Of G the first eigenvectors are kept, times the roots of their eigenvalues: ``H`` ``[C, k]``. Then
the distance of ``a H`` and ``b H`` says the same.

The run is one of the rewritten graph. Where that gives back all tokens, each has again what distinguished it from its
group, so what leads from a token straight to its own output is not felt.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tofu_fx.calibration.batches import Batch
from tofu_fx.calibration.trial import Trial

#: random numbers per input
DRAWS = 2
#: what is added to G, as a share of its mean eigenvalue, for the directions of which few inputs say little
SHRINKAGE = 0.3
#: columns that a matrix may have; the best number is measured
COLUMNS = (32, 64, 128)
#: samples in one backward pass: the activations of a ViT-S of 257 tokens are 60 MB a sample, of a ViT-L 350 MB
SAMPLES = 8


@dataclass
class Information:
    """The sums ``g g^T`` of each site, ``[C, C]`` float64 on CPU, and why there are none."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def add(self, site: str, gradient: Tensor | None) -> None:
        """Take in the gradients of a site, ``[B, N, C]``."""
        if site in self.refusals:
            return
        if gradient is None:
            self.refusals[site] = "no floating-point output depends on its tokens"
            return
        rows = gradient.detach().flatten(0, 1).float()
        if not bool(rows.isfinite().all()):
            self.refusals[site] = "its gradients hold NaN or infinity"
            return
        found = (rows.T @ rows).double().cpu()
        self.sums[site] = self.sums[site] + found if site in self.sums else found

    def matrices(self, columns: int) -> dict[str, Tensor]:
        """``H`` of each site, ``[C, k]`` float32 with at most so many columns; none where gradients are zero.

        Only distances that are compared with each other matter, so each is scaled to a trace of 1.
        """
        found = {}
        for site, total in self.sums.items():
            trace = float(total.trace())
            if site in self.refusals:
                continue
            if trace <= 0:
                self.refusals[site] = "its gradients are all zero"
                continue
            values, vectors = torch.linalg.eigh(total / trace)
            roots = (values.clamp(min=0) + SHRINKAGE / len(values)).sqrt()
            found[site] = (vectors * roots).flip(1)[:, :columns].float().contiguous()
        return found


def measure_information(
    trial: Trial, batches: Sequence[Batch], classes: bool, seed: int, advance: Any = None
) -> Information:
    """The Fisher information about the tokens behind every site.

    Args:
        trial: the model.
        batches: the calibration inputs.
        classes: whether the output is class scores.
        seed: of the draws.
        advance: called after each part of a batch.
    """
    found, generator = Information(), torch.Generator().manual_seed(seed)
    for batch in batches:
        for part in batch.split(SAMPLES):
            try:
                outputs, tokens = trial.differentiable(part)
                _add(found, outputs, tokens, classes, generator)
            except RuntimeError as error:  # an op without a gradient, or one in place
                reason = str(error).strip().splitlines()[0]
                found.refusals.update(dict.fromkeys((site.id for site in trial.sites), f"no gradients: {reason}"))
                return found
            if advance is not None:
                advance(1)
    return found


def _add(
    found: Information, outputs: Any, tokens: Mapping[str, Tensor], classes: bool, generator: torch.Generator
) -> None:
    leaves = [v for v in tree_leaves(outputs) if isinstance(v, Tensor) and v.is_floating_point() and v.requires_grad]
    if not leaves:
        found.refusals.update(dict.fromkeys(tokens, "no output has a gradient (whole numbers, or made under no_grad)"))
        return
    for draw in range(DRAWS):
        with torch.enable_grad():
            loss = torch.stack([_drawn(value, classes, generator) for value in leaves]).sum()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ops whose backward is not deterministic
            gradients = torch.autograd.grad(
                loss,
                list(tokens.values()),
                retain_graph=draw < DRAWS - 1,
                allow_unused=True,
            )
        for site, gradient in zip(tokens, gradients, strict=True):
            found.add(site, gradient)


def _drawn(value: Tensor, classes: bool, generator: torch.Generator) -> Tensor:
    """A number whose gradients, as random as the draw, have the information of an output for their covariance."""
    if classes:
        scores = value.float().log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator).to(scores.device)
        return scores.gather(-1, drawn).sum()
    rows = value.float().flatten(1) if value.dim() > 1 else value.float().reshape(1, -1)
    noise = torch.randn(rows.shape, generator=generator).to(rows.device)
    length = rows.detach().norm(dim=1)
    return ((rows * noise).sum(1) / torch.where(length > 0, length, 1.0)).sum()
