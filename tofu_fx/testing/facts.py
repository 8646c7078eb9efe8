"""What the interpreter is told: which site reduces what, where its tokens stand, and where tokens must be whole.

Plain numbers and names, so that the interpreter shares no code with the compiler. Names are those of the ATen graph
as traced (``Compilation.before``).
"""

from __future__ import annotations

import math

from torch.fx import Node

from tofu_fx.axes.atoms import Atom, Axes
from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.compilation import Compilation
from tofu_fx.fx.nodes import is_op
from tofu_fx.sites.site import Attention, Branch, Planned
from tofu_fx.testing.told import Entry, Facts, Span, Vectors, Where

_UNMASKED = ("view", "reshape", "mul", "div", "to", "softmax", "unflatten", "flatten")  # these hide nothing


def facts_of(compilation: Compilation) -> Facts:
    """The facts of a compilation that reduces tokens."""
    options, tracer = compilation.options, compilation.axes
    assert compilation.before is not None
    known = {node.name for node in compilation.before.graph.nodes}
    entries = []
    for site in compilation.reducing:
        for branch in site.branches or (None,):
            owner = site.shares or site.id
            if branch is not None and options.reuse == "none":
                owner = f"{owner} {branch.kind}"
            entries.append(_entry(tracer, site, branch, owner, known))
    barriers = frozenset(b.node.name for b in compilation.barriers if b.node.op != "output")
    return Facts(
        entries=tuple(entries),
        barriers=barriers,
        ends=frozenset(node.name for node in tracer.ends),
        attentions=frozenset(node.name for node in tracer.attention_nodes),
        inputs=frozenset(n.name for n in tracer.depends if n.op in ("placeholder", "get_attr")),
        proportional=options.proportional_attention is not False,
    )


def _entry(tracer: AxisTracer, site: Planned, branch: Branch | None, owner: str, known: set[str]) -> Entry:
    node = branch.enter if branch is not None else site.reduce_at
    axes = tracer.of(node)
    run = next(atom for dim in axes for atom in dim if atom.is_token)
    samples = _samples(tracer, site, axes)
    # A branch that shares its input with others is entered at an alias, which the graph as traced does not have; if
    # two sites claimed the branch, of which one was given up, at an alias of an alias.
    source = node
    while source.name not in known:
        source = source.all_input_nodes[0]
    own = node is site.reduce_at or site.match in ("features", "sketch")
    query, key, weights = _attended(tracer, site, run, samples)
    return Entry(
        site=site.id,
        node=source.name,
        readers=None if source is node else frozenset(user.name for user in node.users if user.name in known),
        stream=run.base.stream,
        placement=site.placement,
        owner=owner,
        strategy=site.strategy,
        match=site.match if own else "features",
        r=site.r,
        tokens=run.size,
        prefix=run.prefix,
        suffix=run.suffix,
        grid=site.cells,
        masked=_is_masked(site.attention),
        where=Where(_span(axes, run), tuple(_span(axes, atom) for atom in samples)),
        query=query,
        key=key,
        weights=weights,
        projection=site.projection,
    )


def _is_masked(attention: Attention) -> bool:
    """Whether anything joins the scores on their way to the softmax: what it hides the interpreter sees for itself."""
    return attention.mask is not None or any(not is_op(node, *_UNMASKED) for node in attention.way[1:])


def _samples(tracer: AxisTracer, site: Planned, axes: Axes) -> tuple[Atom, ...]:
    """The axes of the stream that its keys have too: each of their positions is a sample of its own."""
    keys = {atom for dim in tracer.of(site.attention.key) for atom in dim}
    own = [atom for dim in axes for atom in dim if not atom.is_token]
    return tuple(atom for atom in own if atom in keys and atom.base.kind != "feature")


def _attended(
    tracer: AxisTracer, site: Planned, run: Atom, samples: tuple[Atom, ...]
) -> tuple[Vectors, Vectors, Vectors]:
    """Where the tokens stand in queries, keys and attention weights."""
    attention = site.attention
    query = _vectors(tracer, attention.query, attention.query_tokens, attention.query_features, site, run, samples)
    key = _vectors(tracer, attention.key, attention.key_tokens, attention.key_features, site, run, samples)
    if attention.softmax is None:
        q, k = tracer.of(attention.query), tracer.of(attention.key)
        axes: Axes = (*tracer.of(attention.node)[:-2], q[-2], k[-2])
        place, node = len(axes) - 1, attention.node
    else:
        axes = tracer.of(attention.softmax)
        # The last that still has the softmax's dims: the products of bmm and baddbmm have batch and heads in one.
        node = next((n for n in reversed(attention.after) if tracer.of(n) == axes), attention.softmax)
        place = attention.softmax_dim % len(axes)
    where = _where(axes, place, samples, key.where.tokens.ahead)
    return query, key, Vectors(node.name, where, place, fused=is_op(node, "scaled_dot_product_attention"))


def _vectors(
    tracer: AxisTracer, node: Node, place: int, feature: int, site: Planned, run: Atom, samples: tuple[Atom, ...]
) -> Vectors:
    axes = tracer.of(node)
    place, feature = place % len(axes), feature % len(axes)
    atom = next((atom for atom in axes[place] if atom.is_token), None)
    ahead = atom.prefix - run.prefix if atom is not None else _null_tokens(tracer, site, node, place)
    return Vectors(node.name, _where(axes, place, samples, ahead), feature)


def _null_tokens(tracer: AxisTracer, site: Planned, node: Node, place: int) -> int:
    """Tokens that only the keys have, ahead of the queries' own."""
    own = tracer.space.flat(tracer.of(site.attention.query)[site.attention.query_tokens])
    other = tracer.space.flat(tracer.of(node)[place])
    return 0 if own is None or other is None or own.base is not other.base else own.offset - other.offset


def _where(axes: Axes, place: int, samples: tuple[Atom, ...], ahead: int) -> Where:
    size = math.prod(atom.size for atom in axes[place])
    found = tuple(_span(axes, atom) for atom in samples if any(atom in dim for dim in axes))
    return Where(Span(place, size, 1, ahead), found)


def _span(axes: Axes, atom: Atom) -> Span:
    dim = next(i for i, atoms in enumerate(axes) if atom in atoms)
    behind = axes[dim][axes[dim].index(atom) + 1 :]
    return Span(dim, atom.size, math.prod(other.size for other in behind))
