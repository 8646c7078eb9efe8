"""Record what a Dynamo graph calls on its way down to ATen, as ``make_fx`` does with ``pre_dispatch=True``.

``make_fx`` takes more than a millisecond a node, most of it for things that a Dynamo graph of fixed shapes does not
have: proxies of symbolic sizes, constants, subclasses. This records the rest in a tenth of the time and leaves a graph
with any of these to ``make_fx``. ``tests/fx/test_recorder.py`` holds the two against each other.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, snapshot_fake
from torch.fx.proxy import _COPY_META_FIELDS
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from tofu_fx.fx.autocast import Autocasts, is_region
from tofu_fx.fx.fakes import compute
from tofu_fx.fx.nodes import graph_module

logger = logging.getLogger(__name__)
_SET_GRAD = torch._C._set_grad_enabled
_RARE_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
_FLAGS = (torch.bool, torch.uint8)


class _UnusualError(Exception):
    """Something that make_fx is to record."""


def record(traced: GraphModule, fakes: Sequence[Any], fake_mode: FakeTensorMode) -> GraphModule | None:
    """The graph of ATen calls that a Dynamo graph makes on fake inputs; None where ``make_fx`` is to trace it."""
    if not all(map(_is_usual, traced.graph.nodes)) or not all(map(_is_static, fakes)):
        return None
    graph = Graph()
    try:
        with _surroundings(fake_mode), _Recorder(graph) as recorder, Autocasts() as regions:
            interpreter = _Walk(traced)
            interpreter.recorder, interpreter.regions = recorder, regions
            outputs = interpreter.run(*fakes)
    except Exception as error:  # noqa: BLE001 - make_fx may know better, and says what is wrong with a graph that cannot be run
        logger.debug("left to make_fx: %r", error)
        return None
    graph.output(tree_map_only(Tensor, recorder.node_of, outputs))
    return graph_module(torch.nn.Module(), graph)


@contextmanager
def _surroundings(fake_mode: FakeTensorMode) -> Iterator[None]:
    """What the graph does to the grad mode ends here, however it ends."""
    with torch.set_grad_enabled(torch.is_grad_enabled()), enable_python_dispatcher(), fake_mode:
        yield


def _is_usual(node: Node) -> bool:
    """Whether a node of a Dynamo graph is an input, an output or a call that nothing but ATen ops come of."""
    if node.op not in ("placeholder", "call_function", "call_method", "output"):
        return False
    return not (getattr(node.target, "__module__", None) or "").startswith("torch._functorch")


def _is_static(value: Any) -> bool:
    return isinstance(value, FakeTensor) and not value._has_symbolic_sizes_strides and value.layout is torch.strided


class _Walk(Interpreter):
    """Runs a Dynamo graph; switches of grad mode and autocast, which no dispatcher sees, are recorded here."""

    recorder: _Recorder
    regions: Autocasts

    def run_node(self, n: Node) -> Any:
        self.recorder.origin = n
        if n.op == "placeholder":
            value = super().run_node(n)
            self.recorder.note(self.recorder.graph.placeholder(str(n.target)), value)
            return value
        if n.target is _SET_GRAD or is_region(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            if n.target is _SET_GRAD:
                _SET_GRAD(*args)
            self.regions.visit(n)
            switch = self.recorder.graph.call_function(n.target, args)  # type: ignore[arg-type]
            self.recorder.describe(switch, None)
            return switch
        return super().run_node(n)


class _Recorder(ProxyTorchDispatchMode):
    """Appends a node for each op that is called, before autograd and autocast see it."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(None, "real", pre_dispatch=True)  # type: ignore[arg-type]
        self.graph = graph
        #: the Dynamo node that is being run
        self.origin: Node | None = None
        self._nodes = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if any(tag in func.tags for tag in _RARE_TAGS) and not _indexes_by_number(func, args):
            raise _UnusualError
        name = self.graph._target_to_str(func.overloadpacket.__name__)
        inputs, named = tree_map_only(Tensor, self.node_of, (tuple(args), kwargs))
        node = self.graph.create_node("call_function", func, inputs, named, name)
        value = compute(func, args, kwargs)
        # PyTorch's factory functions hand out a copy of a tensor that is held elsewhere, which nobody would know.
        self.note(node, value, copied=not node.all_input_nodes or _is_factory(func))
        return value

    def node_of(self, value: Tensor) -> Node:
        """The node that made a tensor."""
        if value not in self._nodes:  # a constant
            raise _UnusualError
        node: Node = self._nodes[value]
        return node

    def note(self, node: Node, value: Any, copied: bool = False) -> None:
        """Remember what a node made; several results become nodes of their own."""
        self.describe(node, tree_map_only(Tensor, snapshot_fake if copied else _snapshot, value))
        if isinstance(value, Tensor):
            self._nodes[value] = node
        elif isinstance(value, (list, tuple)):
            for i, part in enumerate(value):
                self.note(self.graph.call_function(operator.getitem, (node, i)), part)
        elif value is not None:
            raise _UnusualError  # a number that depends on data

    def describe(self, node: Node, value: Any) -> None:
        """Give a node its fake value, and the module path and source line of the Dynamo node."""
        assert self.origin is not None
        if node.op == "call_function":
            known = self.origin.meta
            node.meta.update({key: known[key] for key in ("stack_trace", *_COPY_META_FIELDS) if known.get(key)})
        node.meta["val"] = value


def _is_factory(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _indexes_by_number(func: Any, args: Sequence[Any]) -> bool:
    """``x[indices]``: only flags as indices make a shape that depends on data."""
    return func is torch.ops.aten.index.Tensor and all(i is None or i.dtype not in _FLAGS for i in args[1])


def _snapshot(value: Tensor) -> Tensor | None:
    """A value that neither autograd knows nor, where it could, an op in place makes known to it."""
    grad = value.requires_grad or torch.is_grad_enabled()
    plain = type(value) is FakeTensor and value.constant is None and not grad
    return value if plain else snapshot_fake(value)
