"""Batches and image sizes that change between calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend

from tests.harness import EAGER, MEANING_TOLERANCE, plan_rows, randomise, relative_error
from tests.oracle.stream import Reducer, reference_vit
from tests.zoo import ZOO
from tofu_fx.backend import rewrite, tofu
from tofu_fx.pipeline import run_passes, without
from tofu_fx.plan.options import Options
from tofu_fx.plan.plan import Plan
from tofu_fx.testing.shuffle import Shuffler


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def counted(model: Any, dynamic: bool | None = None, **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """The model through the backend, and how often it was compiled."""
    counter = CompileCounterWithBackend("eager")
    lookup = {**EAGER, **options}

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        counter.frame_count += 1
        return tofu(gm, inputs, options=lookup)

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=dynamic), counter


def reference(model: Any, x: torch.Tensor, rows: list[tuple[str, int]], prefix: int = 1) -> torch.Tensor:
    return reference_vit(model, x, Reducer(rows, prefix))


@pytest.mark.parametrize("strategy", ["prune", "mlerp"])
@pytest.mark.parametrize("name", ["vit", "vit_avg_of_patches"])
def test_batch_marked_dynamic_compiles_once_and_is_right_at_every_size(name: str, strategy: str) -> None:
    entry = ZOO[name]
    model = entry.model()
    call, counter = counted(model, r=4, strategy=strategy)
    for batch in (3, 2, 5, 4):
        x = entry.batch(batch)
        torch._dynamo.mark_dynamic(x, 0)
        expected = reference(model, entry.batch(batch), [(strategy, 4)] * 3)
        assert relative_error(call(x), expected) < MEANING_TOLERANCE
    assert counter.frame_count == 1


def test_batch_merged_with_tokens_in_a_view_that_infers_the_features() -> None:
    """As experts write it, ``view(batch * tokens, -1)``: the one size that may be inferred is another one then."""
    model = ZOO["vit"].model()
    mlp = model.blocks[1].mlp
    mlp.fc1.register_forward_pre_hook(lambda _, x: (x[0].view(x[0].shape[0] * x[0].shape[1], -1),))
    mlp.register_forward_hook(lambda _, x, out: out.view(*x[0].shape[:2], -1))
    call, counter = counted(model, r=4, strategy="mlerp")
    for batch in (3, 2):
        x = ZOO["vit"].batch(batch)
        torch._dynamo.mark_dynamic(x, 0)
        expected = reference(ZOO["vit"].model(), ZOO["vit"].batch(batch), [("mlerp", 4)] * 3)
        assert relative_error(call(x), expected) < MEANING_TOLERANCE
    assert counter.frame_count == 1


LIKE_OTHERS = pytest.mark.nightly("its ops are those of the others")


@pytest.mark.parametrize(
    "name",
    [
        *("deit3", "eva02", "relpos", "hf_vit_eager", "encoder_tokens_first"),
        *(pytest.param(name, marks=LIKE_OTHERS) for name in ("torchvision_vit", "siglip", "dinov3")),
    ],
)
def test_permutation_holds_in_a_graph_with_a_symbolic_batch(name: str) -> None:
    entry = ZOO[name]
    model = entry.model()

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compilation = run_passes(without("insert_reductions"), gm, Options.parse({**EAGER, "r": 1}), inputs)
        plan = Plan(sites=plan_rows(compilation, r=0, strategy="prune"))
        shuffled = rewrite(gm, Options.parse({**EAGER, "plan": plan}), inputs, reducer=Shuffler()).compilation
        assert shuffled is not None
        assert len(shuffled.reducing) == entry.sites
        return shuffled.gm

    torch._dynamo.reset()
    call = torch.compile(model, backend=backend, dynamic=None)
    for batch in (3, 2):
        x = entry.batch(batch)
        torch._dynamo.mark_dynamic(x, 0)
        assert relative_error(call(x), model(entry.batch(batch))) < 1e-5


def test_dynamic_true_gives_right_results_at_every_batch() -> None:
    entry = ZOO["vit"]
    model = entry.model()
    call, counter = counted(model, dynamic=True, r=4, strategy="mlerp")
    for batch in (2, 4, 3):
        expected = reference(model, entry.batch(batch), [("mlerp", 4)] * 3)
        assert relative_error(call(entry.batch(batch)), expected) < MEANING_TOLERANCE
    assert counter.frame_count == 1


def test_batch_of_one_is_right_and_a_sample_does_not_depend_on_its_batch() -> None:
    entry = ZOO["deit_distilled"]
    model = entry.model()
    call, _ = counted(model, r=4, strategy="mlerp")
    x = entry.batch(3)
    alone = call(x[:1])
    expected = reference(model, x[:1], [("mlerp", 4)] * 3, prefix=2)
    assert relative_error(alone, expected) < MEANING_TOLERANCE
    # The same decisions; BLAS may round a batch of another size differently.
    assert relative_error(call(x)[:1], alone) < MEANING_TOLERANCE


def test_another_image_size_compiles_again_with_its_own_token_counts_in_timm() -> None:
    torch.manual_seed(0)
    import timm

    model = randomise(
        timm.create_model(
            "vit_tiny_patch16_224", depth=3, embed_dim=48, num_heads=3, num_classes=10, img_size=96,
            dynamic_img_size=True,
        )
    )  # fmt: skip
    call, counter = counted(model, ratio=0.3, strategy="mean")
    for size, counts in ((96, [4, 3, 4]), (64, [2, 1, 2]), (96, [4, 3, 4])):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        tokens = (size // 16) ** 2 + 1
        assert sum(counts) == round(0.3 * tokens)
        assert relative_error(call(x), reference(model, x, [("mean", r) for r in counts])) < MEANING_TOLERANCE
    assert counter.frame_count == 2


def test_another_image_size_stays_right_in_transformers() -> None:
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=96
    )
    model = randomise(transformers.ViTModel(config))
    call, _ = counted(model, r=4, strategy="mlerp")
    for size in (96, 64, 80):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        outputs, plain = call(x, interpolate_pos_encoding=True), model(x, interpolate_pos_encoding=True)
        assert outputs.last_hidden_state.shape == plain.last_hidden_state.shape
        assert 1e-3 < relative_error(outputs.last_hidden_state, plain.last_hidden_state) < 2
