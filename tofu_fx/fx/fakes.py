"""Fake values, computed in microseconds where that is safe.

``FakeTensorMode`` takes from half a millisecond to ten to compute an op on shapes that it has not met, and every layer
after a reduction has shapes of its own. Nearly all of that goes into cases that are rare: constants, sizes that
depend on data, kernels that lay out their result by device. For the ops named here the mode ends with the op's own
meta kernel on the inputs as they are, so that kernel is asked at once. Anything else, and anything unusual about the
inputs, is left to the mode. What came out is remembered by the form of what went in: verify computes once more what
insert_reductions computed, and one layer what the last one did. ``tests/fx/test_fakes.py`` holds all of it against the
mode, on every op of many models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    disable_fake_tensor_cache,
    in_kernel_invocation_manager,
)
from torch.multiprocessing.reductions import StorageWeakRef

from tofu_fx.fx.op_families import GROUPINGS

#: beside the elementwise ops, which PyTorch tags: no result's form depends on a device, a value or a global setting
_PLAIN = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "movedim", "expand", "expand_as", "repeat", "select", "slice", "split", "split_with_sizes", "chunk", "unbind",
    "cat", "stack", "gather", "index_select", "embedding", "contiguous", "clone", "alias", "detach", "dropout",
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "softmax", "_softmax", "log_softmax", "layer_norm", "mean",
    "sum", "amax", "amin", "var", "any",
}  # fmt: skip
#: our own, whose fakes do nothing but make tensors like their inputs
_OWN = {"fuse_tokens", "permute_tokens", "restore_tokens"}
#: what comes out is like the first input, if all are floating, in order and of one dtype and shape (but for the weights
#: of layer_norm)
_LIKE_FIRST = {"layer_norm", "gelu", "relu", "silu", "sigmoid", "tanh", "add", "sub", "mul", "div"}
#: of dims of size 1, whose strides mean nothing, the mode makes other strides than the kernel
_REGROUPING = GROUPINGS


class _Form(NamedTuple):
    """A tensor that shares memory with no other."""

    shape: Sequence[int | SymInt]
    strides: Sequence[int | SymInt]
    dtype: torch.dtype


#: for each mode what came out, a tensor or several, of calls on inputs of a form
_KNOWN: WeakKeyDictionary[FakeTensorMode, dict[Any, Any]] = WeakKeyDictionary()


def compute(target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a call gives in the fake mode that is in force."""
    values = [*args, *kwargs.values()]
    tensors = list(_tensors(values)) if _is_pure(target) else []
    if not tensors or not _are_usual(tensors):
        return target(*args, **kwargs)
    first = tensors[0]
    if not _are_static(values):
        form = _symbolic(_plain_name(target), tensors, args)
        if form is not None:
            return _of_form(form, first)
        with disable_fake_tensor_cache(first.fake_mode):  # no symbol comes twice: no entry would be met again
            return target(*args, **kwargs)
    if _is_view(target):
        return _computed(target, args, kwargs, tensors)
    known = _KNOWN.setdefault(first.fake_mode, {})
    key = (target, _key(args), *((name, _key(value)) for name, value in kwargs.items()))
    found = known.get(key)
    if found is None:
        value = _computed(target, args, kwargs, tensors)
        found = _form_of(value, tensors)
        if found is not None:
            known[key] = found
        return value
    return _of_form(found, first)


def _symbolic(name: str | None, tensors: list[Any], args: Sequence[Any]) -> _Form | None:
    """What comes out where sizes are symbols, which take the mode far longer; None for the mode to say."""
    first = tensors[0]
    if name == "linear":
        weight, bias = tensors[1], args[2] if len(args) > 2 else None
        fits = first.is_floating_point() and weight.dtype is first.dtype and weight.shape[1:] == first.shape[-1:]
        if fits and weight.dim() == 2 and _fits(bias, weight) and _is_in_order(first):
            shape = (*first.shape[:-1], weight.shape[0])
            return _Form(shape, make_contiguous_strides_for(shape), first.dtype)
    elif name in _LIKE_FIRST and _makes_like_first(name, tensors, args):
        return _Form(first.shape, first.stride(), first.dtype)
    return None


def _makes_like_first(name: str | None, tensors: list[Any], args: Sequence[Any]) -> bool:
    shape = args[1] if name == "layer_norm" and len(args) > 1 else tensors[0].shape
    return _are_alike(tensors, shape) and not any(isinstance(arg, complex) for arg in args)


def _computed(target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Any]) -> Any:
    """What a call gives, by the meta kernel where that will do."""
    name, first = _plain_name(target), tensors[0]
    if name is None:
        return target(*args, **kwargs)
    # torch 2.11's mode puts what dropout leaves as it is in order; its kernel, as when the model runs, does not.
    if (name == "dropout" or (name in _REGROUPING and 1 in first.shape)) and not _is_in_order(first):
        return target(*args, **kwargs)
    if name in _LIKE_FIRST and _makes_like_first(name, tensors, args):
        target, args, kwargs = torch.ops.aten.new_empty.default, (first, first.shape), {}
    elif name == "linear" and len(args) == 3 and _fits(args[2], args[1]):
        args = args[:2]  # a bias changes nothing about the form, and the kernel that adds it is a slow one
    with torch._C._DisablePythonDispatcher(), in_kernel_invocation_manager(first.fake_mode):
        value = target(*args, **kwargs)
    return _wrapped(value, first)


@cache
def _is_pure(target: Any) -> bool:
    """Whether an op writes into none of its inputs, and takes no object of a class, which may have no hash."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return not any("__torch__" in str(argument.type) for argument in target._schema.arguments)


@cache
def _is_view(target: torch._ops.OpOverload) -> bool:
    """Whether an op may give a part of an input's memory, so that there is nothing to remember."""
    return any(value.alias_info is not None for value in target._schema.returns)


def _key(value: Any) -> Any:
    """What of an argument the form of a result depends on. 1, 1.0 and True are not the same."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg()
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    return type(value), value


def _form_of(value: Any, inputs: list[Any]) -> Any:
    """The form of new tensors; None of anything that shares memory, or that has more to it than a form."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not (_are_usual([inputs[0], *parts]) and _are_static(parts) and all(map(_is_whole, parts))):
        return None
    memory = {StorageWeakRef(part.untyped_storage()) for part in parts}
    if len(memory - {StorageWeakRef(value.untyped_storage()) for value in inputs}) < len(parts):
        return None
    forms = [_Form(tuple(part.shape), part.stride(), part.dtype) for part in parts]
    return type(value)(forms) if isinstance(value, (list, tuple)) else forms[0]


def _is_whole(tensor: Any) -> bool:
    return not (tensor.storage_offset() or tensor.is_conj() or tensor.is_neg() or tensor.requires_grad)


def _of_form(form: Any, like: FakeTensor) -> Any:
    with in_kernel_invocation_manager(like.fake_mode):
        return _wrapped(_made(form), like)


def _made(form: Any) -> Any:
    if not isinstance(form, _Form):
        return type(form)(map(_made, form))
    return torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device="meta")


@cache
def _plain_name(target: torch._ops.OpOverload) -> str | None:
    """The name of a pure op whose fake values need nothing but its meta kernel; None for any other."""
    schema = target._schema
    namespace, name = schema.name.split("::")
    if namespace == "tofu":
        return name if name in _OWN else None
    plain = namespace == "aten" and (name in _PLAIN or torch.Tag.pointwise in target.tags)
    # An op that is told its device or layout makes more than the kernel knows of.
    told = any(argument.name in ("device", "layout") for argument in schema.arguments)
    return name if plain and not told else None


def _tensors(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _are_usual(tensors: list[Any]) -> bool:
    """Whether all are fake, of one mode and device, and neither autograd nor autocast has a say."""
    first = tensors[0]
    if not isinstance(first, FakeTensor) or torch.is_autocast_enabled(first.fake_device.type):
        return False
    grad = torch.is_grad_enabled()
    return all(
        type(t) is FakeTensor
        and t.fake_mode is first.fake_mode
        and t.fake_device == first.fake_device
        and t.layout is torch.strided
        and t.constant is None
        and not (grad and t.requires_grad)
        for t in tensors
    )


def _are_static(values: Iterable[Any]) -> bool:
    """Whether no size and no number is a symbol."""
    for value in values:
        if isinstance(value, (SymInt, SymFloat, SymBool)):
            return False
        if isinstance(value, FakeTensor) and value._has_symbolic_sizes_strides:
            return False
        if isinstance(value, (list, tuple)) and not _are_static(value):
            return False
    return True


def _are_alike(tensors: list[Any], shape: Sequence[int]) -> bool:
    """Whether all are of one floating dtype and in order, and of a shape, which is where the first one's ends.

    What does not fit is an error, which the kernel is to raise: it means that tokens cannot be fewer there.
    """
    first, *others = tensors
    fits = tuple(shape) == tuple(first.shape[first.dim() - len(shape) :])
    return (
        fits
        and first.is_floating_point()
        and _is_in_order(first)
        and all(t.dtype is first.dtype and t.shape == tuple(shape) and _is_in_order(t) for t in others)
    )


def _fits(bias: Any, weight: Any) -> bool:
    return bias is None or (bias.shape == weight.shape[:1] and bias.dtype is weight.dtype)


def _is_in_order(tensor: Any) -> bool:
    """Whether a tensor is contiguous, its dims of size 1 included."""
    return bool(tensor.stride() == make_contiguous_strides_for(tensor.shape))


def _wrapped(value: Any, like: FakeTensor) -> Any:
    if isinstance(value, FakeTensor):  # an op that gives its input itself
        return value
    if isinstance(value, Tensor):
        return FakeTensor(like.fake_mode, value, like.fake_device)
    if isinstance(value, (list, tuple)):
        return type(value)(_wrapped(part, like) for part in value)
    return value
