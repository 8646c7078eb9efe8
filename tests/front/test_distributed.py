"""DistributedDataParallel: Dynamo cuts the graph at its buckets, and each piece is compiled on its own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tofu_fx.backend import tofu
from tofu_fx.dynamo import is_ddp_bucket

PROCESSES, EACH = 2, 2
# The same float32 graph on the same samples; a kernel may add in another order for another batch.
ROUNDING = 2e-5


def model_of(seed: int = 0) -> nn.Module:
    """Blocks of 0.8 MB: buckets of 1 MB, the smallest that Dynamo takes, cut between them."""
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", depth=3, embed_dim=128, num_heads=2, num_classes=5, img_size=64, global_pool="avg"
    )


def step(model: nn.Module, x: Tensor, inner: str) -> tuple[Tensor, dict[str, Tensor], list[bool], list[str]]:
    """Outputs, gradients, for each compiled graph whether a bucket cut it out, and what the compiler said."""
    cut: list[bool] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        cut.append(is_ddp_bucket(gm))
        options = {"r": 2, "strategy": "mean", "inner_backend": inner, "on_error": "raise", "profitable_only": False}
        return tofu(gm, inputs, options=options)

    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = torch.compile(model, backend=backend)(x)
    (outputs * torch.linspace(-1, 1, 5)).sum().backward()
    grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return outputs.detach(), grads, cut, [str(w.message) for w in caught if "tofu_fx" in str(w.message)]


def run(rank: int, folder: str, inner: str, caps: list[dict[str, float]]) -> None:
    """One process: for each size of buckets a step on its own samples, and the same step by one process on all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    groups = [dist.new_group([member]) for member in range(PROCESSES)]
    x = torch.randn(PROCESSES * EACH, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    own = slice(rank * EACH, (rank + 1) * EACH)
    steps = []
    for cap in caps:
        found = step(DistributedDataParallel(model_of(), **cap), x[own], inner)  # type: ignore[arg-type]
        expected = None
        if rank == 0:  # cut in the same places, so that the same tokens go
            alone = DistributedDataParallel(model_of(), process_group=groups[0], **cap)  # type: ignore[arg-type]
            expected = step(alone, x, inner)
        steps.append((found, expected, own))
    with torch.no_grad():
        torch.save((steps, model_of()(x)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    # By default the first bucket has 1 MB and the others 25.
    torch.multiprocessing.spawn(run, (str(tmp_path), "aot_eager", [{}, {"bucket_cap_mb": 1}]), nprocs=PROCESSES)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]
    whole = [expected for _, expected, _ in saved[0][0]]
    for steps, plain in saved:
        for ((outputs, grads, cut, said), _, own), (all_outputs, all_grads, _, _) in zip(steps, whole, strict=True):
            assert (plain - all_outputs).abs().max() > 10 * ROUNDING, "nothing was reduced"
            torch.testing.assert_close(outputs, all_outputs[own], atol=ROUNDING, rtol=0)
            assert grads.keys() == all_grads.keys()
            scale = max(grad.abs().max() for grad in all_grads.values())
            for name, grad in all_grads.items():
                # Of the processes' gradients DistributedDataParallel takes the mean.
                assert (grads[name] * PROCESSES - grad).abs().max() < ROUNDING * scale, name
            assert all(cut)
            assert sum("optimize_ddp = False" in message for message in said) == 1
            assert not any("nothing was accelerated" in message for message in said)
        assert [len(found[2]) for found, _, _ in steps] == [2, 3]
