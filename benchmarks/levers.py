"""What else could make a reduction lose less: other ways to match, to merge and to make up for it, each on its own.

    python benchmarks/levers.py        # about five minutes on two cores

Written by hand in eager mode around the saliency model of examples/, so that an idea can be tried before an operator is
written for it. Each row removes r tokens in each of 12 layers with MLERP, except for what it is called; errors are mean
relative L2 distances of the map from the plain model's, over photographs. What helped is in the package (`match`), the
rest is here as a record of what did not, and of what might.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "levers.json"


@dataclass(frozen=True)
class Way:
    """One way to reduce.

    ``metric`` is what tokens are compared by, ``pairs`` who may merge with whom ("alternate": even with odd places,
    "shifted": odd with even in every other layer, "any": every pair, greedily), ``rounds`` in how many matchings.
    ``score`` changes the similarities ``[B, n, n]``, given the unit metric, features and sizes of the free tokens.
    ``own`` scales what a restored token keeps of its own; ``bias`` ``[C]`` is added to every token that was merged.
    ``thresholds`` make the number of merges of each photograph its own: pairs less similar are skipped.
    """

    metric: str = "keys"
    pairs: str = "alternate"
    rounds: int = 1
    score: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    strategy: str = "mlerp"
    own: float = 1.0
    bias: Tensor | None = None
    thresholds: list[float] | None = None
    seen: list[Tensor] = field(default_factory=list)


METRICS: dict[str, Callable[..., Tensor]] = {
    "keys": lambda q, k, v, x: k.mean(1),
    "heads": lambda q, k, v, x: _flat(k),
    "queries_keys": lambda q, k, v, x: torch.cat([_flat(q), _flat(k)], -1),
    "queries": lambda q, k, v, x: _flat(q),
    "values": lambda q, k, v, x: _flat(v),
    "features": lambda q, k, v, x: x,
    "centred": lambda q, k, v, x: x - x.mean(-1, keepdim=True),
}


def _flat(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def ward(unit: Tensor, x: Tensor, size: Tensor) -> Tensor:
    """Ward's criterion: by how much a merge raises the sum of squared distances to the groups' means."""
    weight = size[:, :, None] * size[:, None, :] / (size[:, :, None] + size[:, None, :])
    return -(torch.cdist(x, x) ** 2) * weight


def energy(unit: Tensor, x: Tensor, size: Tensor) -> Tensor:
    """Similarity, raised where both tokens have much company: tokens that are rare are kept."""
    alike = unit @ unit.transpose(1, 2)
    company = alike.mean(2)
    return alike + 0.5 * (company[:, :, None] + company[:, None, :])


def small_first(unit: Tensor, x: Tensor, size: Tensor) -> Tensor:
    """Similarity, lowered where the group would be large."""
    return unit @ unit.transpose(1, 2) - 0.03 * (size.log()[:, :, None] + size.log()[:, None, :])


def match(metric: Tensor, x: Tensor, size: Tensor, r: int, layer: int, way: Way) -> tuple[Tensor, Tensor]:
    """Sources and destinations ``[B, r]`` among tokens of which the first is protected."""
    unit = F.normalize(metric[:, 1:], dim=-1)
    alike = unit @ unit.transpose(1, 2) if way.score is None else way.score(unit, x[:, 1:], size[:, 1:])
    count = alike.shape[1]
    if way.pairs == "any":
        return _greedy(alike, r)
    first = layer % 2 if way.pairs == "shifted" else 0
    candidates, partners = torch.arange(first, count, 2), torch.arange(1 - first, count, 2)
    best, place = alike[:, candidates][:, :, partners].max(2)
    way.seen.append(best.sort(dim=1, descending=True).values)
    top = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    return candidates[top] + 1, partners[place.gather(1, top)] + 1


def _greedy(alike: Tensor, r: int) -> tuple[Tensor, Tensor]:
    batch, count, _ = alike.shape
    lower = torch.ones(count, count, dtype=torch.bool).tril()
    order = alike.masked_fill(lower, -torch.inf).flatten(1).argsort(dim=1, descending=True)
    sources, destinations = torch.zeros(batch, r, dtype=torch.long), torch.zeros(batch, r, dtype=torch.long)
    for b in range(batch):
        gone, joined, found = set[int](), set[int](), 0
        for pair in order[b].tolist():
            i, j = divmod(pair, count)
            if i in gone or j in gone or (i in joined and j in joined):
                continue
            source, destination = (i, j) if j in joined else (j, i)
            if source in joined:
                source, destination = destination, source
            sources[b, found], destinations[b, found] = source + 1, destination + 1
            gone.add(source)
            joined.add(destination)
            found += 1
            if found == r:
                break
    return sources, destinations


def assign(count: int, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token goes, and which tokens stay."""
    batch, r = sources.shape
    keep = torch.ones(batch, count, dtype=torch.bool).scatter_(1, sources, False)
    place = keep.long().cumsum(1) - 1
    return place.scatter(1, sources, place.gather(1, destinations)), keep.nonzero()[:, 1].view(batch, count - r)


def merge(x: Tensor, size: Tensor, place: Tensor, kept: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    """Prune, mean or MLERP by a given assignment."""
    batch, left = kept.shape
    rows = place.unsqueeze(2).expand_as(x)
    new_size = torch.zeros(batch, left).scatter_add_(1, place, size)
    stays = x.gather(1, kept.unsqueeze(2).expand(-1, -1, x.shape[2]))
    if strategy == "prune":
        return stays, new_size
    total = torch.zeros_like(stays).scatter_add_(1, rows, x * size.unsqueeze(2))
    if strategy == "mean":
        merged = total / new_size.unsqueeze(2)
    else:
        largest = torch.zeros(batch, left).scatter_reduce_(1, place, x.norm(dim=2), "amax")
        merged = total * (largest / total.norm(dim=2)).unsqueeze(2)
    members = torch.zeros(batch, left).scatter_add_(1, place, torch.ones_like(size))
    return torch.where((members > 1).unsqueeze(2), merged, stays), new_size


def features(model: Any, images: Tensor, r: int, way: Way) -> tuple[Tensor, Tensor]:
    """What the head reads ``[B, 257, C]`` ahead of the final norm, and which tokens were merged ``[B, 257]``."""
    backbone = model.backbone
    x = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(images))))
    size, steps = torch.ones(x.shape[:2]), []
    for layer, block in enumerate(backbone.blocks):
        h = block.norm1(x)
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(h).reshape(*h.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[:, None, None, :])
        x = x + block.ls1(block.attn.proj(_flat(mixed)))
        wanted = r
        if way.thresholds is not None and r:  # one photograph at a time
            probe = replace(way, seen=[])
            match(METRICS[way.metric](q, k, v, x), x, size, 1, layer, probe)
            wanted = min(int((probe.seen[0] > way.thresholds[layer]).sum()), (x.shape[1] - 1) // 2)
        if wanted:
            metric, sizes, place, kept = METRICS[way.metric](q, k, v, x), size, None, None
            for turn in range(way.rounds):
                part = wanted // way.rounds + (turn < wanted % way.rounds)
                to, stay = assign(metric.shape[1], *match(metric, x, sizes, part, layer, way))
                metric, sizes = merge(metric, sizes, to, stay, "mean")
                place = to if place is None else to.gather(1, place)
                kept = stay if kept is None else kept.gather(1, stay)
            assert place is not None
            assert kept is not None
            before = x
            x, size = merge(x, size, place, kept, way.strategy)
            steps.append((before, x, place))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    touched = size > 1
    for before, merged, place in reversed(steps):
        rows = place.unsqueeze(2).expand_as(before)
        x = x.gather(1, rows) + way.own * (before - merged.gather(1, rows))
        touched = touched.gather(1, place)
    return x if way.bias is None else torch.where(touched.unsqueeze(2), x + way.bias, x), touched


def maps(model: Any, x: Tensor) -> Tensor:
    grid = model.backbone.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (16, 16))
    return F.interpolate(torch.sigmoid(model.decoder(grid)), size=(224, 224), mode="bilinear", align_corners=False)


def bias_of(model: nn.Module, images: Tensor, r: int) -> Tensor:
    """Compensation: by how much the merged tokens are off on average, ``[C]``, on photographs of its own."""
    plain, _ = features(model, images, 0, Way())
    reduced, touched = features(model, images, r, Way())
    return (plain - reduced)[touched].mean(0)


def thresholds_of(model: nn.Module, images: Tensor, r: int) -> list[float]:
    """For each layer the similarity that leaves r merges on average."""
    way = Way()
    features(model, images, r, way)
    return [best.flatten().sort(descending=True).values[r * len(images)].item() for best in way.seen]


def ways(model: nn.Module, others: Tensor, r: int) -> dict[str, Way]:
    return {
        "MLERP, keys averaged over heads (the paper's)": Way(),
        "prune": Way(strategy="prune"),
        "mean": Way(strategy="mean"),
        "metric: keys of all heads": Way(metric="heads"),
        "metric: queries and keys of all heads": Way(metric="queries_keys"),
        "metric: queries of all heads": Way(metric="queries"),
        "metric: values of all heads": Way(metric="values"),
        "metric: features": Way(metric="features"),
        "metric: features less the mean of their channels": Way(metric="centred"),
        "pairs: odd into even in every other layer": Way(pairs="shifted"),
        "pairs: any": Way(pairs="any"),
        "pairs: any, queries and keys": Way(pairs="any", metric="queries_keys"),
        "two rounds": Way(rounds=2),
        "two rounds, queries and keys": Way(rounds=2, metric="queries_keys"),
        "score: Ward's criterion on features": Way(score=ward),
        "score: small groups first": Way(score=small_first),
        "score: rare tokens protected": Way(score=energy),
        "dissimilar pairs skipped (r on average)": Way(thresholds=thresholds_of(model, others, r)),
        "restored tokens keep 0.9 of their own": Way(own=0.9),
        "restored tokens keep 1.1 of their own": Way(own=1.1),
        "merged tokens compensated by their mean error": Way(bias=bias_of(model, others, r)),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, nargs="+", default=[12, 19])
    parser.add_argument("--photographs", type=int, default=24)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    sys.path.append(str(ROOT / "examples"))
    files, console, start = __import__("saliency_model"), Console(), time.perf_counter()
    model = files.load_model()
    photos = files.normalise(files.load_photos(every=5, limit=2 * args.photographs))
    images, others = photos[::2], photos[1::2]
    plain = maps(model, features(model, images, 0, Way())[0])
    rows: dict[str, dict[str, float]] = {}
    for r in args.r:
        for name, way in ways(model, others, r).items():
            parts = images.split(1) if way.thresholds is not None else (images,)
            found = torch.cat([maps(model, features(model, part, r, way)[0]) for part in parts])
            off = (found - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
            rows.setdefault(name, {})[str(r)] = round(off.mean().item(), 4)
            console.print(f"r = {r}, {name}: {off.mean():.4f}", highlight=False)
    table = Table(title=f"relative error of the map, {len(images)} photographs", title_justify="left")
    for column in ("", *(f"r = {r}" for r in args.r)):
        table.add_column(column, justify="right" if column else "left")
    for name, errors in rows.items():
        table.add_row(name, *(f"{errors[str(r)]:.4f}" for r in args.r))
    console.print(table)
    seconds = round(time.perf_counter() - start)
    result = {"photographs": len(images), "rows": rows, "seconds": seconds, "torch": torch.__version__}
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
