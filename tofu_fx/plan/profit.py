"""Whether a reduction pays: the time that fewer tokens save against the time of matching and moving them.

A coarse model that needs no measurement, so that the same graph is always compiled the same way: matrix products and
attention at a rate, and for each reduction a constant, its matching and the bytes that it moves. Calibration measures
instead. What saves little is declined, so elementwise work, which is also saved, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from tofu_fx.axes.atoms import hint
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.plan.counts import walk
from tofu_fx.plan.flops import matching_flops, node_flops
from tofu_fx.plan.sketch import folds
from tofu_fx.sites.site import Planned


@dataclass(frozen=True)
class Rates:
    """What a device does: operations and bytes per second, and the seconds of one reduction of no tokens at all."""

    flops: float
    bytes: float
    reduction: float


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """Typical rates of a kind of device.

    CPU: measured with float32 on AVX512 cores (60 GFLOP/s a thread in a linear layer, up to four threads, which is
    about as far as products of this size gain; 50 us for `tofu::fuse_tokens` on 74 tokens, and what it adds to the
    attention after it). Elsewhere: not measured; the constant is that of thirty kernel launches.
    """
    if device.type == "cpu":
        return Rates(60e9 * min(torch.get_num_threads(), 4), 8e9, 70e-6)
    return Rates(200e12 if dtype.itemsize == 2 else 25e12, 1.5e12, 150e-6)


@dataclass(frozen=True)
class Work:
    """Matrix products on the tokens of one stream: after how many of its sites, operations, and their exponent.

    Attention does work for each pair of tokens, all other products for each token.
    """

    after: int
    flops: float
    exponent: int


def unprofitable(sites: Sequence[Planned], tracer: AxisTracer, graph: Graph) -> list[Planned]:
    """The reducing sites of one stream that cost more time than they save, given that the others reduce.

    Looked for from the last site on, after which there is the least work.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    work = _work(sites, tracer, graph, order)
    rates = rates_of(*_device(sites[0]))
    chosen = {site.id: site.r for site in sites}
    losing = []
    for site in reversed(sites):
        without = {**chosen, site.id: 0}
        if site.r and _seconds(sites, work, rates, without) <= _seconds(sites, work, rates, chosen):
            losing.append(site)
            chosen = without
    return losing[::-1]


def _work(sites: Sequence[Planned], tracer: AxisTracer, graph: Graph, order: Mapping[Node, int]) -> list[Work]:
    places = [order[site.reduce_at] for site in sites]
    found = []
    for node in graph.nodes:
        flops = node_flops(node) if any(a.base.stream == sites[0].stream for a in tracer.tokens(node)) else 0
        after = sum(place < order[node] for place in places)
        if flops and after:
            pairs = node in tracer.attention_nodes or node in tracer.score_nodes
            found.append(Work(after, flops, 2 if pairs else 1))
    return found


def _seconds(sites: Sequence[Planned], work: Sequence[Work], rates: Rates, removed: Mapping[str, int]) -> float:
    """The time of the work and of the reductions, when each site removes so many tokens."""
    counts, total = [sites[0].tokens], 0.0
    for site, passage in walk(sites, lambda site, count: min(removed[site.id], site.cap(count))):
        counts.append(passage.leaving)
        if passage.removed:
            value = site.reduce_at.meta["val"]
            rows = math.prod(hint(size) for size in value.shape) / sites[0].tokens / site.width
            free = passage.arriving - site.prefix - site.suffix
            moved = 2 * rows * passage.arriving * site.width * value.element_size()
            features = site.width if site.placement == "branch" else site.width / site.heads
            if site.match == "sketch":
                features = site.width / folds(site.width)
            matching = matching_flops(rows, free, features, site.cells)
            total += rates.reduction + matching / rates.flops + moved / rates.bytes
    return total + sum(item.flops * (counts[item.after] / counts[0]) ** item.exponent / rates.flops for item in work)


def _device(site: Planned) -> tuple[torch.device, torch.dtype]:
    value = site.reduce_at.meta["val"]
    return value.device, value.dtype
