"""Find every attention over tokens: a site, matched so far or declined with its reason.

Works on axes, not on names: an attention is over tokens if queries and keys carry the same positions, and these are
not features. That tells it from channel attention (its "tokens" are features), cross-attention and reduced keys
(queries and keys are different positions). Changes nothing in the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from tofu_fx.axes.atoms import Atom, Axes, Barrier, Dim, dim_size, hint
from tofu_fx.axes.rules.table import find_rule
from tofu_fx.axes.tracer import AxisTracer, trace
from tofu_fx.compilation import Analysed, Lowered
from tofu_fx.fx.nodes import argument, is_op, module_path
from tofu_fx.fx.op_families import CONVOLUTIONS, MATRIX_PRODUCTS
from tofu_fx.fx.stages import advanced
from tofu_fx.sites.attention import OPAQUE, find_attentions, find_comparisons
from tofu_fx.sites.guards import Guard
from tofu_fx.sites.masks import MOST_OF_A_MASK, Masks
from tofu_fx.sites.site import Attention, Decline, Declined, Found, Site

_LINEAR = "linear attention: it sums over all tokens once and compares no two, so that fewer of them save little"
_SAMPLES = (
    "attention between the samples of a batch (a convolution runs over them one by one), not between tokens of each"
)
_MASKED = {
    "later": "causal attention: a token must not see what is merged into it from later ones",
    "pairs": "the mask lets each token see some others only: of a merged token it would see more",
    "unseen": "what the mask hides cannot be seen while compiling, or depends on an input: it may be causal",
    "far": f"the mask is made by more than the {MOST_OF_A_MASK} nodes that are followed: it may be causal",
}


def find_attention(graph: Lowered) -> Analysed:
    """Find every attention, and the axes of the graph; judge which attentions are sites."""
    tracer = trace(lambda space: AxisTracer(graph.gm.graph, find_rule, graph.model_state, space=space))
    attentions = list(find_attentions(tracer))
    attentions += find_comparisons(tracer, attentions)
    attentions = [replace(attention, narrowed=_is_narrowed(attention.node, graph)) for attention in attentions]
    masks = Masks(graph.gm, graph.model_state, tracer.depends, graph.example_inputs)
    linear = _find_linear(graph, attentions, tracer)
    samples = _samples(tracer)
    order = {node: i for i, node in enumerate(graph.gm.graph.nodes)}
    names: Counter[str] = Counter()
    sites: list[Site] = []
    guards: dict[str, Guard] = {}
    for attention in sorted([*attentions, *linear], key=lambda attention: order[attention.node]):
        graph.at.node = attention.node
        path = module_path(attention.node)
        name = path or "attention"
        names[name] += 1
        unique = f"{name}#{names[name]}" if names[name] > 1 else name
        site = _site(tracer, masks, attention, unique, path, guards)
        decline = Decline(_LINEAR, attention.node) if attention in linear else attention.unrecognised
        if site.matched and tracer.space.flat(tracer.of(attention.key)[attention.key_tokens]) in samples:
            decline = Decline(_SAMPLES, attention.node)
        sites.append(site if decline is None else Declined(site.site if isinstance(site, Declined) else site, decline))
    return advanced(Analysed, graph, plain=tracer, attentions=tuple(attentions), sites=tuple(sites), guards=guards)


def _is_narrowed(node: Node, graph: Lowered) -> bool:
    """Whether of what an attention gives only some rows are kept, before anything is added to it."""
    while node not in graph.narrowed:
        if len(node.users) != 1 or is_op(node, "add"):
            return bool(node.users) and all(user in graph.narrowed for user in node.users)
        (node,) = node.users
    return True


def _samples(tracer: AxisTracer) -> set[Atom]:
    """What convolutions run over one by one: samples of a batch, unless each is a patch of which one place is left."""
    maps = (node for node in tracer.graph.nodes if is_op(node, *CONVOLUTIONS))
    several = (node for node in maps if any(hint(size) > 1 for size in node.meta["val"].shape[2:]))
    found = (tracer.space.flat(tracer.of(node)[0]) for node in several)
    return {atom for atom in found if atom is not None}


def _find_linear(graph: Lowered, attentions: Sequence[Attention], tracer: AxisTracer) -> list[Attention]:
    """Products that sum keys and values over all tokens: linear attention, which never compares two tokens."""
    known = {node for a in attentions for node in (a.node, a.scores)}
    compared: set[Node] = set()  # the weights that come of comparing two tokens, up to the next product
    found = []
    for node in graph.gm.graph.nodes:
        if not is_op(node, *MATRIX_PRODUCTS):
            if not is_op(node, "linear") and any(value in compared for value in node.all_input_nodes):
                compared.add(node)
            continue
        left, right = node.args[:2]
        a, b = tracer.of(left), tracer.of(right)
        if min(len(a), len(b)) < 3 or left not in tracer.depends or right not in tracer.depends:
            continue
        summed, other = tracer.space.flat(a[-1]), tracer.space.flat(b[-2])
        left_over = [tracer.space.flat(dim) for dim in (a[-2], b[-1])]
        features = [atom is not None and atom.base.kind == "feature" for atom in left_over]
        if not any(features):
            compared.add(node)
        elif node in known or left in compared or right in compared:
            continue
        elif summed is not None and summed == other and summed.base.kind == "plain" and summed.size > 1:
            found.append(Attention(node, right, -2, -1, left, -1, -2))
    return found


def _site(
    tracer: AxisTracer, masks: Masks, attention: Attention, name: str, path: str, guards: dict[str, Guard]
) -> Found | Declined:
    queries = tracer.of(attention.query)[attention.query_tokens]
    keys = tracer.of(attention.key)[attention.key_tokens]
    heads = _heads(tracer, attention)
    width = dim_size(tracer.of(attention.key)[attention.key_features])
    site = Found(name, path, attention, dim_size(queries), heads, heads * width)
    reason = _reason(tracer, attention, queries, keys)
    if reason is None:
        own, read = tracer.space.flat(queries), tracer.space.flat(keys)
        ahead = own.offset - read.offset if own and read and own.base is read.base else 0
        hides = masks.judge(attention, site.tokens, ahead)
        guard = masks.guard(attention, site.tokens, ahead) if hides in ("pairs", "unseen", "far") else None
        if guard is not None:
            hides = "keys"
        elif hides in ("nothing", "keys"):
            guard = masks.state_guard(attention, site.tokens, ahead)
        if guard is not None:
            guards[name] = guard
        site, reason = replace(site, padding=hides == "keys"), _MASKED.get(hides)
    if reason:
        return Declined(replace(site, tokens=dim_size(keys)), Decline(reason, attention.node))
    return site


def _reason(tracer: AxisTracer, attention: Attention, queries: Dim, keys: Dim) -> str | None:
    if is_op(attention.node, *OPAQUE):
        return (
            "PyTorch's fused inference path hides the attention: call torch.backends.mha.set_fastpath_enabled(False) "
            "before compiling"
        )
    if any(hint(size) == 0 for size in attention.query.meta["val"].shape):
        return "the call is empty: a tensor of it has no element"
    if attention.causal:
        return _MASKED["later"]
    uneven = next((node for node in attention.after[1:] if _adds_to_weights(node)), None)
    if uneven is not None:
        op = str(uneven.target).removesuffix(".default")
        return f"{op} adds to the attention's weights after the softmax, once for each token that there is"
    if any(atom.base.kind == "feature" for atom in keys) and any(atom.base.kind == "feature" for atom in queries):
        return "attention between channels, not tokens"
    if attention.query not in tracer.depends:
        if attention.key not in tracer.depends:
            return "this attention is the same for every input"
        return f"the {dim_size(queries)} queries are weights of the model, not tokens: attention pooling"
    try:
        same = _covers(tracer.space.flat(keys), tracer.space.flat(queries))
    except Barrier as barrier:
        return str(barrier)
    if same:
        return None
    if attention.narrowed:
        return f"of its {dim_size(keys)} tokens {dim_size(queries)} is all that is read afterwards: it takes none away"
    return _different(dim_size(queries), dim_size(keys))


def _different(queries: int, keys: int) -> str:
    """What queries and keys that are not the same tokens are likely to be."""
    said = f"queries ({queries}) and keys ({keys}) are different tokens: "
    if queries == 1:
        return f"{said}one query reads all tokens, and there is nothing to remove from what it gives"
    if queries == keys:
        return f"{said}each is made for itself, by a convolution or pooling or from another input"
    if keys < queries:
        return f"{said}the keys are pooled already, or cross-attention"
    return f"{said}cross-attention, or some tokens read more than their own (latents, halos)"


def _adds_to_weights(node: Node) -> bool:
    """Whether an op after the softmax is more than a multiple: of a merged token's weight it makes too little."""
    if is_op(node, "linear"):
        return argument(node, "bias") is not None
    if is_op(node, "masked_fill"):
        return argument(node, "value") != 0
    if is_op(node, "where"):
        return all(isinstance(value, Node) for value in node.args[1:])
    return is_op(node, "add", "sub", "rsub", "clamp", "tanh", "minimum", "maximum", "baddbmm")


def _covers(keys: Atom | None, queries: Atom | None) -> bool:
    """Whether the keys are the queries' own tokens, with or without null tokens at their ends."""
    if keys is None or queries is None or keys.base is not queries.base:
        return keys == queries
    return keys.offset <= queries.offset and queries.offset + queries.size <= keys.offset + keys.size


def _heads(tracer: AxisTracer, attention: Attention) -> int:
    """Heads: what the keys' size leaves beside tokens, features and the batch (the query's own batch where known)."""
    axes: Axes = tracer.of(attention.key)
    used = {attention.key_tokens % len(axes), attention.key_features % len(axes)}
    rest = [atom for i, dim in enumerate(axes) if i not in used for atom in dim]
    return dim_size(tuple(atom for atom in rest if atom.base.kind == "feature"))
