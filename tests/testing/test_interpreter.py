"""The interpreter: independent of what it proves, and `prove` sees with it the faults that matter."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tofu_fx.testing
from tests.mutation_models import BiasedByPairs
from tofu_fx.ops import fuse, merging
from tofu_fx.rewriting.companions import Companions
from tofu_fx.rewriting.layout import aten
from tofu_fx.rewriting.similarity import Similarity
from tofu_fx.rewriting.versions import Stream
from tofu_fx.testing import Proofs, Spec, Undecided, prove
from tofu_fx.testing.formulas import choose, merge, partners_of
from tofu_fx.testing.strategies import made

FOLDER = Path(tofu_fx.testing.__file__).parent
FILES = ("interpreter", "reduced", "running", "told", "labels", "axis", "formulas")


@pytest.mark.parametrize("name", FILES)
def test_interpreter_imports_nothing_of_the_compiler(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    ours = {module for module in imported if module is not None and module.startswith("tofu_fx")}
    assert ours <= {f"tofu_fx.testing.{file}" for file in FILES}
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "tofu"]


def test_interpreter_is_loaded_without_the_compiler() -> None:
    program = """
import importlib, sys, types
for name in ("tofu_fx", "tofu_fx.testing"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
sys.modules["tofu_fx.testing"].__path__ = [sys.argv[1]]
import tofu_fx.testing.interpreter, tofu_fx.testing.reduced
print(sorted(name for name in sys.modules if name.startswith("tofu_fx")))
"""
    out = subprocess.run([sys.executable, "-c", program, str(FOLDER)], capture_output=True, text=True, check=True)
    expected = sorted(["tofu_fx", "tofu_fx.testing", *(f"tofu_fx.testing.{name}" for name in FILES)])
    assert out.stdout.strip() == str(expected)


def test_merging_copies_is_merging_by_size() -> None:
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [4.0, 0.0], [9.0, 3.0]]])
    before, chief = torch.tensor([[0, 0, 2, 3]]), torch.tensor([[0, 0, 0, 3]])
    mean = merge(x, before, chief, "mean")
    assert torch.equal(mean[0, :, 0], torch.tensor([2.0, 2.0, 2.0, 9.0]))
    assert torch.equal(merge(x, before, chief, "mlerp")[0, :, 0], torch.tensor([4.0, 4.0, 4.0, 9.0]))
    assert torch.equal(merge(x, before, chief, "prune")[0, :, 0], torch.tensor([1.0, 1.0, 1.0, 9.0]))


def test_a_decision_within_rounding_is_left_undecided() -> None:
    score = torch.tensor([[0.0, 0.5, 0.0, 0.1], [0.0] * 4, [0.0, 0.2, 0.0, 0.5 + 1e-7], [0.0] * 4])
    assert choose(score, 2, partners_of(4, ())) == [(2, 3), (0, 1)]
    with pytest.raises(Undecided):
        choose(score, 1, partners_of(4, ()))


def proofs_of(spec: Spec, **options: Any) -> Proofs:
    drawn = made(spec)
    return prove(drawn.model, *drawn.inputs, options={"placement": "stream", **options})


def lost_sizes(patch: pytest.MonkeyPatch) -> None:
    """Sizes are not carried to the next reduction."""
    size = Stream.size
    patch.setattr(Stream, "size", lambda self, emit, version, like: size(self, emit, 0, like))


def padding_mixed(patch: pytest.MonkeyPatch) -> None:
    """Padding is not kept apart."""
    patch.setattr(Similarity, "_apart", lambda self, node: node)


def destination_as_one(patch: pytest.MonkeyPatch) -> None:
    """The operator takes the destination of a merge for a single token."""
    weights = merging._weights

    def wrong(size: Tensor, groups: merging.Groups) -> tuple[Tensor, Tensor]:
        weight, total = weights(size, groups)
        return weight.index_fill(0, groups.start, 1.0), total

    patch.setattr(merging, "_weights", wrong)
    patch.setattr(fuse.cpu, "usable", lambda x: False)


def skips_pruned(patch: pytest.MonkeyPatch) -> None:
    """Features from before the reductions are pruned instead of merged."""
    patch.setattr(Companions, "_is_older_feature", lambda *_: False)


def table_shifted(patch: pytest.MonkeyPatch) -> None:
    """Tables show each token the row of its neighbour."""
    kept = Stream.kept
    patch.setattr(
        Stream, "kept", lambda self, emit, *rest: emit.call(aten.roll.default, kept(self, emit, *rest), [1], [1])
    )


def no_log_size(patch: pytest.MonkeyPatch) -> None:
    """Attention takes a merged token for one."""
    patch.setattr("tofu_fx.rewriting.rewriter.attention_bias", lambda *_: None)


def unweighted_pool(patch: pytest.MonkeyPatch) -> None:
    """A mean over tokens takes a merged token for one."""
    patch.setattr("tofu_fx.rewriting.rewriter.weighted", lambda rewriter, node, value, newest: value)


PLANTED: dict[Callable[[pytest.MonkeyPatch], None], tuple[Spec, set[str]]] = {
    lost_sizes: (Spec(depth=3, pooling="mean"), {"mean", "mlerp"}),
    padding_mixed: (Spec(depth=2, pooling="tokens", mask="padding"), {"mean", "mlerp"}),
    destination_as_one: (Spec(depth=3, pooling="mean"), {"mean", "mlerp"}),
    skips_pruned: (Spec(depth=3, pooling="mean", skip="concatenate"), {"mean", "mlerp"}),
    table_shifted: (Spec(depth=2, pooling="mean", positions="every block"), {"prune", "mean", "mlerp"}),
    no_log_size: (Spec(depth=2, pooling="mean"), {"prune", "mean", "mlerp"}),
    unweighted_pool: (Spec(depth=1, pooling="mean"), {"prune", "mean", "mlerp"}),
}


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_prove_sees_a_planted_fault(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, strategies = PLANTED[fault]
    sound = proofs_of(spec).check()
    assert not sound.undecided
    fault(monkeypatch)
    seen = {said.split()[1] for said in proofs_of(spec).failures if said.startswith("meaning")}
    assert seen >= strategies


class Flat(nn.Module):
    """Attention with batch and tokens in one dim, and residual adds that are spelled ``branch + x``."""

    def __init__(self, pooled: bool, tokens: int = 16, width: int = 16) -> None:
        super().__init__()
        self.pooled, self.width = pooled, width
        self.prefix, self.table = (
            nn.Parameter(torch.randn(1, 3, width)),
            nn.Parameter(torch.randn(1, 3 + tokens, width)),
        )
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(8))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = torch.cat([self.prefix.expand(batch, -1, -1), x], 1)
        for i, mlp in enumerate(self.mlps):
            x, tokens = x + self.table, x.shape[1]
            flat = self.norms[2 * i](x).reshape(-1, self.width)
            q, k, v = (p(flat).view(batch, tokens, 2, -1).transpose(1, 2) for p in self.projections[4 * i : 4 * i + 3])
            heads = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v
            x = self.projections[4 * i + 3](heads.transpose(1, 2).reshape(batch, tokens, self.width)) + x
            x = mlp(self.norms[2 * i + 1](x)) + x
        x = self.norms[4](x)
        return x.logsumexp(1) if self.pooled else x


def test_branch_that_is_entered_flat_ends_at_its_residual_add() -> None:
    torch.manual_seed(0)
    proofs = prove(Flat(pooled=True).eval(), torch.randn(4, 16, 16)).check()
    assert len(proofs.matched) == 2
    assert {site.placement for site in proofs.matched} == {"branch"}
    assert "mlerp, stream" in proofs.meaning


def test_tokens_are_restored_with_their_own_features_whichever_operand_of_the_residual_add_is_first() -> None:
    torch.manual_seed(0)
    proofs = prove(Flat(pooled=False).eval(), torch.randn(4, 16, 16), options={"placement": "stream"}).check()
    assert not proofs.undecided


def test_merged_tokens_that_count_once_are_those_of_the_interpreter() -> None:
    proofs = proofs_of(Spec(depth=3, pooling="mean"), proportional_attention=False).check()
    assert set(proofs.meaning) == {"prune", "mean", "mlerp"}


@pytest.mark.parametrize("match", ["heads", "queries_keys", "features", "sketch"])
def test_every_metric_is_that_of_the_interpreter(match: str) -> None:
    proofs = proofs_of(Spec(depth=2, pooling="mean"), match=match).check()
    assert set(proofs.meaning) == {"prune", "mean", "mlerp"}


def test_proofs_run_in_every_placement_that_a_user_can_get() -> None:
    drawn = made(Spec(depth=2, pooling="mean"))
    proofs = prove(drawn.model, *drawn.inputs).check()
    ways = ("prune", "mean", "mlerp")
    assert set(proofs.meaning) == {*ways, *(f"{way}, {place}" for way in ways for place in ("branch",))}


class GatedByNeighbours(nn.Module):
    """Each block multiplies its tokens by a convolution over them, which needs all of them, by an op without a tag."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.near = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for qkv, near in zip(self.qkv, self.near, strict=True):
            gate = near(x.transpose(1, 2)).transpose(1, 2)
            query, key, value = qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = x + torch.multiply(mixed, gate)
        return x.mean(1)


def test_whole_features_that_join_the_tokens_by_an_op_without_a_tag_are_merged_too() -> None:
    # torch.multiply has no tag that says it is pointwise: the interpreter took the gate for a table of rows (ConvBERT).
    torch.manual_seed(0)
    assert torch.Tag.pointwise not in aten.multiply.Tensor.tags
    proofs = prove(GatedByNeighbours().eval(), torch.randn(2, 12, 16), options={"placement": "stream"}).check()
    assert not proofs.undecided


class ReadByParts(nn.Module):
    """Each block's attention reads its queries and its keys from slices of the stream, which are all of it."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.query = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.pair = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for to_query, to_pair in zip(self.query, self.pair, strict=True):
            here, there = x[:, :12], x[:, :12]
            query = to_query(here).unflatten(-1, (2, -1)).transpose(1, 2)
            key, value = to_pair(there).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4)
            x = x + nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x.mean(1)


class Viewed(nn.Module):
    """Attention whose fused kernel gives what can be viewed, where its formula gives what cannot."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for qkv in self.qkv:
            query, key, value = qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
            x = x + mixed.view(x.shape)
        return x.mean(1)


@pytest.mark.parametrize("placement", ["stream", "branch"])
@pytest.mark.parametrize("kind", [ReadByParts, Viewed, BiasedByPairs])
def test_model_that_the_walk_over_transformers_found_is_proved(kind: type[nn.Module], placement: str) -> None:
    # Of CANINE, data2vec-vision and BROS: the interpreter's own nodes had no values noted; it viewed what only a fused
    # kernel lays out so; and neither it nor the compiler followed the tokens in a dim that only the table had. (With
    # torch 2.11, whose graphs take a branch's tokens first, its keys' weights were not there yet.)
    torch.manual_seed(0)
    proofs = prove(kind().eval(), torch.randn(2, 12, 16), options={"placement": placement}).check()
    assert len(proofs.matched) >= 2
    assert not proofs.undecided


class CountedPlaces(nn.Module):
    """As many places as a tensor says, beside the tokens (SAM 3)."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))

    def forward(self, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(0, count, dtype=x.dtype) / count
        for qkv in self.qkv:
            query, key, value = qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            x = x + nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x.mean(1), places


@pytest.mark.parametrize("captured", [False, True])
def test_number_that_a_tensor_holds_is_no_failure_of_a_pass(captured: bool) -> None:
    torch.manual_seed(0)
    with torch._dynamo.config.patch(capture_scalar_outputs=captured):
        proofs = prove(CountedPlaces().eval(), torch.randn(2, 12, 16), torch.tensor(5), options={"placement": "stream"})
    assert len(proofs.check().matched) == 2
