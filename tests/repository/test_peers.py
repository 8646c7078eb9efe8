"""The peers of benchmarks/, against loops written from the papers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks" / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def groups(place: torch.Tensor) -> list[list[int]]:
    """Which tokens of one sample are together."""
    return sorted(torch.nonzero(place == p).flatten().tolist() for p in place.unique())


def joined(links: dict[int, int], tokens: int) -> list[list[int]]:
    return sorted(sorted([t, *(s for s, d in links.items() if d == t)]) for t in range(tokens) if t not in links)


@pytest.fixture
def metric() -> torch.Tensor:
    return torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(3))


def test_tome_joins_the_most_similar_candidates_in_its_order(peers: ModuleType, metric: torch.Tensor) -> None:
    place = peers.tome(metric, 1, 4, 0.0)
    for sample, got in zip(metric, place, strict=True):
        likeness = {
            (a, b): float(F.cosine_similarity(sample[a], sample[b], dim=0)) for a in range(16) for b in range(16)
        }
        best = {a: max(range(1, 16, 2), key=lambda b, a=a: likeness[a, b]) for a in range(2, 16, 2)}
        leaving = sorted(best, key=lambda a: -likeness[a, best[a]])[:4]
        order = [a for a in range(0, 16, 2) if a not in leaving] + list(range(1, 16, 2))
        assert got.tolist() == [order.index(best[t] if t in leaving else t) for t in range(16)]


def test_atc_joins_the_two_clusters_of_the_least_mean_distance(peers: ModuleType, metric: torch.Tensor) -> None:
    place = peers.atc(metric, 1, 9, 0.0)
    for sample, got in zip(metric, place, strict=True):
        clusters = [[t] for t in range(1, 16)]

        def apart(one: list[int], other: list[int], sample: torch.Tensor = sample) -> float:
            return float(
                torch.stack([1 - F.cosine_similarity(sample[a], sample[b], dim=0) for a in one for b in other]).mean()
            )

        for _ in range(9):
            pairs = [(i, j) for i in range(len(clusters)) for j in range(i)]
            i, j = min(pairs, key=lambda p: apart(clusters[p[0]], clusters[p[1]]))
            clusters[j] = sorted(clusters[j] + clusters.pop(i))
        assert groups(got) == sorted([[0], *clusters])
        assert got[0] == 0


def test_pitome_merges_the_tokens_of_high_energy(peers: ModuleType, metric: torch.Tensor) -> None:
    r, depth = 3, 0.5
    place = peers.pitome(metric, 1, r, depth)
    for sample, got in zip(metric, place, strict=True):
        likeness = F.cosine_similarity(sample[None], sample[:, None], dim=-1)
        energies = {}
        for i in range(1, 16):
            terms = [float(c) if c >= 0.45 else float(torch.exp(c - 0.45)) - 1 for c in likeness[i, 1:]]
            energies[i] = sum(terms) / len(terms)
        ranked = sorted(energies, key=lambda i: -energies[i])[: 2 * r]
        links = {a: max(ranked[1::2], key=lambda b, a=a, like=likeness: float(like[a, b])) for a in ranked[::2]}
        assert groups(got) == joined(links, 16)


def test_nothing_merged_is_the_plain_model_and_copies_come_back(peers: ModuleType) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, init_values=0.1).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = model.forward_features(x)
        for grouping in peers.PEERS.values():
            with peers.merging(model, grouping, [0, 0]):
                # The attention's mask of zeros takes another kernel than no mask.
                torch.testing.assert_close(model.forward_features(x), plain)
            with peers.merging(model, grouping, [3, 3]):
                merged = model.forward_features(x)
            assert merged.shape == plain.shape
            assert [len(tokens.unique(dim=0)) for tokens in merged] == [17 - 6, 17 - 6]
        assert torch.equal(model.forward_features(x), plain)


def test_an_average_is_weighted_by_sizes(peers: ModuleType) -> None:
    x, size = torch.tensor([[[1.0], [4.0], [10.0]]]), torch.tensor([[1.0, 2.0, 5.0]])
    merged, sizes = peers.average(x, size, torch.tensor([[0, 0, 1]]), 2)
    assert merged.flatten().tolist() == [3.0, 10.0]
    assert sizes.tolist() == [[3.0, 5.0]]
