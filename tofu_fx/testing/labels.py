"""Which token, of which sample, each element of a tensor belongs to: found out by trying, without a rule for any op.

Elements of some tokens are made NaN, the op runs again, and what changes depends on them. Done once for each bit of the
token's number, and once for its opposite, this names for every element of a result the one token that it depends on,
or shows that it depends on several or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tofu_fx.testing.axis import MANY, Axis, Unfit, are_several, distinct

#: other names of pointwise ops, without their tag
_UNTAGGED = ("multiply", "divide", "subtract")
_SOFTMAX = ("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax")


Call = Callable[[Sequence[Any]], Any]


def parts(value: Any) -> list[Tensor]:
    """The tensors of a result that is one or several; none of a number (a size)."""
    several = value if isinstance(value, (tuple, list)) else [value]
    return [part for part in several if isinstance(part, Tensor)]


@dataclass
class Trial:
    """One op on given operands, to be run again with some of them changed."""

    target: Any
    call: Call
    operands: list[Any]

    def __post_init__(self) -> None:
        self.results = parts(self.call(self.operands))

    @cached_property
    def _nan(self) -> list[Tensor | None]:
        """Where each result is not a number; None where it is one everywhere."""
        nan = [result != result for result in self.results]
        return [where if bool(where.any()) else None for where in nan]

    @property
    def name(self) -> str:
        """The name of the op."""
        return str(getattr(getattr(self.target, "_schema", None), "name", "")).removeprefix("aten::")

    @property
    def pointwise(self) -> bool:
        """Whether each element of the result is made of the elements at its place alone."""
        return torch.Tag.pointwise in getattr(self.target, "tags", ()) or self.name in _UNTAGGED

    @property
    def is_view(self) -> bool:
        """Whether the results are views of the first operand."""
        schema = getattr(self.target, "_schema", None)
        returns = schema.returns if schema is not None else ()
        return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)

    def follow(self, place: int, labels: Tensor) -> list[Tensor]:
        """For each result the label of the operand's elements that each element depends on; -1 of several or none."""
        if self.pointwise:
            return [labels.broadcast_to(result.shape) for result in self.results]
        if self.is_view and all(result.dtype == self.operands[place].dtype for result in self.results):
            views = parts(self.call([*self.operands[:place], labels, *self.operands[place + 1 :]]))
            if all(view.dtype == labels.dtype for view in views):  # a cast is a view, too, and would change them
                return views
        if self.name in _SOFTMAX:
            return [labels]  # each element is its own logit's, whatever they are all divided by
        return self._decode(place, labels)

    def _decode(self, place: int, labels: Tensor) -> list[Tensor]:
        found = [torch.zeros(result.shape, dtype=torch.long) for result in self.results]
        single = [torch.ones(result.shape, dtype=torch.bool) for result in self.results]
        for bit in range(max(int(labels.max()).bit_length(), 1)):
            chosen = (labels >> bit) & 1 == 1
            ones, zeros = (self._touched(place, where & (labels >= 0)) for where in (chosen, ~chosen))
            for i in range(len(found)):
                single[i] &= ones[i] ^ zeros[i]
                found[i] |= ones[i].long() << bit
        return [torch.where(s, f, -1) for s, f in zip(single, found, strict=True)]

    def _touched(self, place: int, where: Tensor) -> list[Tensor]:
        if not bool(where.any()):
            return [torch.zeros(result.shape, dtype=torch.bool) for result in self.results]
        other = torch.where(where, _other(self.operands[place]), self.operands[place])
        again = parts(self.call([*self.operands[:place], other, *self.operands[place + 1 :]]))
        changed = [a != b for a, b in zip(again, self.results, strict=True)]
        return [
            where if nan is None else where & ~(nan & (a != a))
            for where, nan, a in zip(changed, self._nan, again, strict=True)
        ]


def _other(value: Tensor) -> Tensor:
    """Other values than these, that show wherever they come: not a number, the other flag, another element's index."""
    if value.is_floating_point() or value.is_complex():
        return torch.full_like(value, float("nan"))
    return ~value if value.dtype == torch.bool else value.flatten().roll(1).view(value.shape)


def carry(trial: Trial, operands: Sequence[list[Axis]]) -> list[list[Axis]]:
    """The axes of each result, from those of each operand."""
    found: list[list[Axis]] = [[] for _ in trial.results]
    for place, axes in enumerate(operands):
        for axis in axes:
            tokens = trial.follow(place, axis.token)
            if not any(bool((token >= 0).any()) for token in tokens):
                continue
            for i, (token, sample) in enumerate(zip(tokens, trial.follow(place, axis.sample), strict=True)):
                if bool((token >= 0).any()):
                    _add(found[i], Axis(axis.stream, token, sample))
    # A single token, taken from the others (a class token), has no places among them any more.
    return [
        [Axis(axis.stream, _filled(axis.token, 2), _filled(axis.sample, 1)) for axis in axes if not axis.is_single]
        for axes in found
    ]


def _filled(labels: Tensor, least: int) -> Tensor:
    """Labels with those of none filled in along each dim in which the known ones agree.

    Features that a table adds to those of the tokens, side by side, are the tokens' as well. Labels of which there are
    fewer than ``least`` stay: those of one token alone say nothing of its neighbours.
    """
    known = labels >= 0
    if bool(known.all()) or not bool(known.any()) or (least > 1 and not are_several(labels)):
        return labels
    for dim in range(labels.dim()):
        known = labels >= 0
        highest = labels.amax(dim, keepdim=True)
        lowest = torch.where(known, labels, MANY).amin(dim, keepdim=True)
        if bool((lowest[highest >= 0] == highest[highest >= 0]).all()):
            labels = torch.where(known, labels, highest)
    return labels


def _add(axes: list[Axis], new: Axis) -> None:
    """Add an axis, as a part of one that is there where both are of the same tokens."""
    for i, axis in enumerate(axes):
        agree = (axis.token == new.token) | (axis.token < 0) | (new.token < 0)
        if axis.stream == new.stream and bool(agree.all()):
            token, sample = (torch.maximum(a, b) for a, b in ((axis.token, new.token), (axis.sample, new.sample)))
            axes[i] = Axis(axis.stream, token, sample)
            return
    axes.append(new)


@dataclass(frozen=True, eq=False)
class Companion:
    """An operand that is no part of a stream but is indexed by its tokens: dim -> the token of each index, -1 of none.

    ``axis`` has the labels of its elements where it holds one feature vector for each token of each sample.
    """

    place: int
    stream: int
    sample: Tensor
    dims: dict[int, Tensor]
    axis: Axis | None

    def survivors(self, value: Tensor, chief: Tensor) -> Tensor:
        """The operand with the rows of the tokens that stand for others, ``chief`` ``[N]``, in the place of all."""
        for dim, tokens in self.dims.items():
            value = value.index_select(dim, _moved(tokens, chief))
        return value


def _moved(tokens: Tensor, chief: Tensor) -> Tensor:
    """For each index the one to take instead: of the token's chief, the same of those that belong to it."""
    index = torch.arange(len(tokens))
    of_token = {int(token): (tokens == token).nonzero().flatten() for token in distinct(tokens)}
    for token, places in of_token.items():
        chiefs = of_token.get(int(chief[token]))
        if chiefs is None or len(chiefs) != len(places):
            raise Unfit("a table has rows for some tokens of a group only")
        index[places] = chiefs
    return index


def companions(trial: Trial, place: int, results: list[list[Axis]], own: list[Axis]) -> list[Companion]:
    """The ways in which an operand is indexed by the tokens of the results, in dims in which it has none of its own.

    ``own`` are the axes of the operand. It may be of tokens in one dim and be indexed by them in another: what each
    query finds at each distance, by its product with a table.
    """
    value, found = trial.operands[place], []
    axes = [axis for part in results for axis in part]
    taken = {dim for axis in own for dim in range(value.dim()) if _varies(axis.token, dim)}
    for axis in axes:
        dims = _dims(trial, place, results, axis, "token")
        dims = {dim: tokens for dim, tokens in dims.items() if dim not in taken}
        if dims:
            found.append(Companion(place, axis.stream, axis.sample, dims, None))
    one = not own and len(found) == 1 and len(found[0].dims) == 1
    if one and value.is_floating_point() and _is_full(trial, value):
        (dim,), (axis,) = found[0].dims, [axis for axis in axes if axis.sample is found[0].sample]
        samples = _dims(trial, place, results, axis, "sample")
        if samples or int(axis.sample.max()) == 0:
            token = _along(found[0].dims[dim], dim, value)
            where = [_along(labels, d, value) for d, labels in samples.items()] or [torch.zeros_like(token)]
            features = Axis(axis.stream, token, torch.stack(where).amax(0))
            found = [Companion(place, axis.stream, axis.sample, found[0].dims, features)]
    return found


def _is_full(trial: Trial, value: Tensor) -> bool:
    """Whether no element of the operand is used for several of the result."""
    if trial.pointwise:
        return value.shape == trial.results[0].shape
    return trial.name in ("cat", "stack")


def _along(labels: Tensor, dim: int, value: Tensor) -> Tensor:
    shape = [-1 if d == dim else 1 for d in range(value.dim())]
    return labels.view(shape).expand(value.shape)


def _varies(labels: Tensor, dim: int) -> bool:
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def _dims(trial: Trial, place: int, results: list[list[Axis]], axis: Axis, what: str) -> dict[int, Tensor]:
    """The dims of an operand of which each index touches one token (or sample) of the axis only, and which."""
    value, labels = trial.operands[place], getattr(axis, what)
    varying = {labels.shape[dim] for dim in range(labels.dim()) if _varies(labels, dim)}
    (part,) = (i for i, axes in enumerate(results) if axis in axes)
    found = {}
    for dim, size in enumerate(value.shape):
        if size not in varying or not value.numel():
            continue
        index = trial.follow(place, _along(torch.arange(size), dim, value))[part]
        seen = index >= 0
        lowest, highest = (
            torch.full((size,), start).scatter_reduce(0, index[seen], labels[seen], reduce)
            for start, reduce in ((MANY, "amin"), (-1, "amax"))
        )
        if bool((lowest[highest >= 0] == highest[highest >= 0]).all()) and bool((highest >= 0).any()):
            found[dim] = highest
    return found
