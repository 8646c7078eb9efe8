"""The state of one stream while the graph is rewritten: its versions, and how a tensor gets from one to another.

Version 0 has the tokens that the graph was traced with. Each reduction makes the next version. A tensor that is older
than what it meets is *rebased* to the newer version; one that must be whole is *restored* to version 0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from tofu_fx import ops  # noqa: F401 - registers torch.ops.tofu
from tofu_fx.axes.atoms import Atom, Barrier
from tofu_fx.rewriting.layout import Count, Emitter, Layout, aten

tofu = torch.ops.tofu
_END = 2**63 - 1


@dataclass(frozen=True)
class Version:
    """One reduction, from the version before to this one. All nodes are canonical: ``[B, N, ...]`` over the run.

    ``additive`` says that between the last reduction and this one the stream only had branches added to it, so that
    what a token was before can be added back when the tokens are restored.
    """

    strategy: str
    count: Count
    size_before: Node
    size: Node
    assignment: Node
    kept: Node
    before: Node
    merged: Node
    additive: bool


@dataclass
class Stream:
    """The versions of one stream. ``run`` is the token atom at its reductions, ``batch`` its batch atoms."""

    run: Atom
    batch: tuple[Atom, ...]
    versions: list[Version] = field(default_factory=list)
    _kept: dict[int, Node] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        """Number of reductions so far."""
        return len(self.versions)

    def count(self, emit: Emitter, version: int, run: Atom) -> Count:
        """Tokens of a run (which may have other protected tokens than the stream's own) at a version."""
        now = self.versions[version - 1].count if version else self.run.size
        more = run.size - self.run.size
        return emit.arithmetic(operator.add, now, more) if more else now

    def reduce(
        self,
        emit: Emitter,
        x: Node,
        write: Callable[[Node, Count], Node],
        strategy: str,
        count: Count,
        additive: bool,
    ) -> Version:
        """Append what makes the next version of ``x`` ``[B, N, C]``, of ``count`` tokens.

        ``write`` appends the operator, from the tokens' sizes and the number that go; features of the same tokens
        from before it follow by ``strategy``.
        """
        size = self.size(emit, self.newest, x)
        gone = emit.arithmetic(operator.sub, self.count(emit, self.newest, self.run), count)
        fused = write(size, gone)
        merged, new_size, assignment, kept = (emit.call(operator.getitem, fused, i) for i in range(4))
        version = Version(strategy, count, size, new_size, assignment, kept, x, merged, additive)
        self.versions.append(version)
        return version

    def size(self, emit: Emitter, version: int, like: Node) -> Node:
        """How many original tokens each token stands for, ``[B, N]`` float32."""
        if version:
            return self.versions[version - 1].size
        column = emit.call(aten.select.int, like, 2, 0)
        return emit.call(aten.ones_like.default, column, dtype=torch.float32)

    def log_size(self, emit: Emitter, version: int, run: Atom, dtype: torch.dtype) -> Node:
        """The bias of proportional attention: log(size) of a run's tokens, ``[B, N]``."""
        bias = emit.once(aten.log.default, self.sizes_of(emit, version, run))
        return bias if dtype == torch.float32 else emit.once(aten.to.dtype, bias, dtype)

    def sizes_of(self, emit: Emitter, version: int, run: Atom) -> Node:
        """Sizes of the tokens of a run: the stream's own with protected tokens (of size 1) cut off or put on."""
        size = self.versions[version - 1].size
        ahead, behind = run.prefix - self.run.prefix, run.suffix - self.run.suffix
        size = self._cut(emit, size, 1, ahead, behind)
        if ahead > 0 or behind > 0:
            size = emit.once(aten.constant_pad_nd.default, size, (max(ahead, 0), max(behind, 0)), 1.0)
        return size

    def kept(self, emit: Emitter, version: int, run: Atom) -> Node:
        """For each token of a run at a version, the original token (version 0) whose place it holds, ``[B, N]``."""
        index = self._composed(emit, version)
        ahead, behind = run.prefix - self.run.prefix, run.suffix - self.run.suffix
        index = self._cut(emit, index, 1, ahead, behind)
        index = emit.once(aten.add.Scalar, index, ahead) if ahead else index
        if ahead <= 0 and behind <= 0:
            return index
        # Null tokens that only the keys have stay where they are: 0, 1, ... and ..., size - 2, size - 1.
        column = emit.once(aten.slice.Tensor, index, 1, 0, 1)
        ends = [(0, max(ahead, 0)), (run.size - max(behind, 0), run.size)]
        front, back = (
            [emit.once(aten.full_like.default, column, place) for place in range(first, last)] for first, last in ends
        )
        return emit.call(aten.cat.default, [*front, index, *back], 1)

    def _composed(self, emit: Emitter, version: int) -> Node:
        if version not in self._kept:
            kept = self.versions[version - 1].kept
            if version > 1:
                kept = emit.call(aten.gather.default, self._composed(emit, version - 1), 1, kept)
            self._kept[version] = kept
        return self._kept[version]

    def _cut(self, emit: Emitter, node: Node, dim: int, ahead: int, behind: int) -> Node:
        """Cut protected tokens off the ends of ``dim`` (negative numbers; positive ones are ignored)."""
        if ahead < 0:
            node = emit.once(aten.slice.Tensor, node, dim, -ahead, _END)
        if behind < 0:
            node = emit.once(aten.slice.Tensor, node, dim, 0, behind)
        return node

    def trim(self, emit: Emitter, node: Node, run: Atom) -> Node:
        """A canonical tensor over ``run`` cut to the stream's own run (keys with an extra null token)."""
        ahead, behind = self.run.prefix - run.prefix, self.run.suffix - run.suffix
        if ahead > 0 or behind > 0:
            raise Barrier("the keys lack protected tokens that the stream has")
        return self._cut(emit, node, 1, ahead, behind)

    def rebase(self, emit: Emitter, node: Node, layout: Layout, version: int) -> Node:
        """Features of the version before -> ``version``, by the same merge."""
        step = self.versions[version - 1]
        x = layout.to_canonical(emit, node, self.count(emit, version - 1, layout.atom))
        merges = x.meta["val"].is_floating_point()
        strategy = step.strategy if merges else "prune"  # what is no feature (a flag, an index) follows the survivor
        merge = _caller(emit, tofu.rebase.default, step.size_before, step.assignment, step.kept, strategy)
        x = self._on_own_run(emit, x, layout.atom, merge)
        return layout.from_canonical(emit, x, self.count(emit, version, layout.atom))

    def restore(self, emit: Emitter, node: Node, layout: Layout, version: int, additive: bool) -> Node:
        """A tensor at ``version`` -> all tokens of version 0.

        Where the stream was additive each token gets its own features from before the reduction plus what its
        representative has gained since; else a copy of its representative.
        """
        x = layout.to_canonical(emit, node, self.count(emit, version, layout.atom))
        for step in reversed(self.versions[:version]):
            known = (step.assignment, step.before, step.merged) if additive else (step.assignment,)
            x = self._on_own_run(emit, x, layout.atom, _caller(emit, tofu.restore_tokens.default, *known))
            additive = additive and step.additive
        return layout.from_canonical(emit, x, layout.atom.size)

    def _on_own_run(self, emit: Emitter, x: Node, run: Atom, change: Callable[[Node], Node]) -> Node:
        """Apply ``change`` to a canonical tensor over ``run``, given over the stream's own run.

        Protected tokens that the stream lacks go around it. Those that ``run`` lacks are zeros meanwhile: protected
        tokens are never merged with others, so they spoil nothing.
        """
        ahead, behind = run.prefix - self.run.prefix, run.suffix - self.run.suffix
        own = self._cut(emit, x, 1, -ahead, -behind)
        if ahead < 0 or behind < 0:
            own = emit.call(aten.constant_pad_nd.default, own, (0, 0, max(-ahead, 0), max(-behind, 0)), 0.0)
        own = self._cut(emit, change(own), 1, ahead, behind)
        outer = [emit.call(aten.slice.Tensor, x, 1, 0, ahead)] if ahead > 0 else []
        outer.append(own)
        outer += [emit.call(aten.slice.Tensor, x, 1, -behind, _END)] if behind > 0 else []
        return emit.call(aten.cat.default, outer, 1) if len(outer) > 1 else own


def _caller(emit: Emitter, target: Any, *rest: Any) -> Callable[[Node], Node]:
    return lambda x: emit.call(target, x, *rest)
