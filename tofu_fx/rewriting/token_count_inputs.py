"""The inputs of the rewritten graph: those that were traced and, for inductor, the token counts.

Every reduction gives the layers after it a shape of their own, and inductor compiles a set of C++ kernels for each
shape: with a reduction in each of 12 layers that is most of the compile time. So the token count after each reduction
is made an integer *input* of the graph. Inductor then writes kernels for any count, finds that the layers' kernels are
the same text, and compiles them once. The counts never change: the compiled callable always gets the same numbers.

They are symbols of a fake mode and shape environment of their own, whose guards nobody needs to check for that reason.
Where Dynamo has symbols too (a dynamic batch), the graph stays in Dynamo's environment with the counts as constants; so
it does off the CPU, where kernels for one shape are worth more than a short compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tofu_fx.errors import Unsupported
from tofu_fx.rewriting.layout import CONSTANT, Count
from tofu_fx.sites.site import Planned

_COUNT = "tokens_"


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """The fake mode of a graph's placeholders."""
    values = (node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder"))
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


@contextmanager
def faking(fake_mode: FakeTensorMode) -> Iterator[None]:
    """Compute fake values: apart from Dynamo's own tracing, and through the Python dispatcher.

    Composite ops take symbolic sizes only through the latter. Entering it is slow, so once for a whole graph.
    """
    with torch._guards.tracing(None), enable_python_dispatcher(), fake_mode:
        yield


class InputFakes:
    """Copies the sources of a graph into the rewritten one, in the fake mode that it is to have (inside ``faking``)."""

    def __init__(self, gm: GraphModule, wanted: bool, any_device: bool = False) -> None:
        """Decide whether token counts are inputs: if that is ``wanted``, and possible with what the graph is given.

        Raises:
            Unsupported: on ``any_device`` they must be, and cannot.
        """
        nodes = gm.graph.find_nodes(op="placeholder")
        self.shared = wanted and all(_can_share(node, any_device) for node in nodes)
        if any_device and not self.shared:
            raise Unsupported("its inputs have symbolic sizes, or are no tensors: calibrate with fixed shapes")
        self.fake_mode = FakeTensorMode(shape_env=ShapeEnv()) if self.shared else fake_mode_of(gm)

    def copy(self, graph: Graph, node: Node) -> Node:
        """A placeholder or constant of the old graph in the new one, with Dynamo's notes on it."""
        new = graph.node_copy(node)
        new.meta = dict(node.meta)
        if hasattr(node, "_dynamo_source"):
            new._dynamo_source = node._dynamo_source
        value = node.meta["val"]
        if self.shared and isinstance(value, torch.Tensor):
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            # Lowering detached the values; whether a gradient is wanted is what Dynamo noted.
            new.meta["val"] = fake.requires_grad_(node.meta.get("example_value", value).requires_grad)
        return new

    def token_count(self, graph: Graph, site: Planned) -> Count:
        """The token count after a site: a number, or an input of the graph that stands for it."""
        if not self.shared:
            return site.tokens_out
        source: Any = ConstantSource(f"tofu_tokens_{site.id}")
        environment = self.fake_mode.shape_env
        assert environment is not None
        symbol = environment.create_unspecified_symbol(site.tokens_out, source, DimDynamic.DYNAMIC)
        known = sum(str(node.target).startswith(_COUNT) for node in graph.find_nodes(op="placeholder"))
        node = graph.placeholder(f"{_COUNT}{known}_{site.tokens_out}")
        node.meta["val"] = environment.create_symintnode(symbol, hint=site.tokens_out, source=source)
        node._dynamo_source = None
        return node


def _can_share(node: Node, on_any_device: bool) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not (on_any_device or value.device.type == "cpu"):
        return False
    return all(isinstance(size, int) for size in (*value.shape, *value.stride()))


def carry_over(old: GraphModule, new: GraphModule) -> None:
    """Dynamo's notes on the graph as a whole: AOTAutograd reads them to find static inputs."""
    held = [name for name, _ in (*new.named_parameters(), *new.named_buffers())]
    if all(name.startswith(CONSTANT) for name in held):
        new.meta.update(old.meta)
        if hasattr(old, "_param_name_to_source"):
            sources: Any = old._param_name_to_source
            new._param_name_to_source = {**sources, **{name: ConstantSource(name) for name in held}}  # type: ignore[assignment]
