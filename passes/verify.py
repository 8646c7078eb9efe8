"""Prove that the rewritten graph gives the caller what was traced: shapes, dtypes, devices and layout of each output.

Every node's fake value was computed while the graph was written; this pass computes them once more from the inputs
alone, so that no node stands on a value that another node no longer has. Both times by ``tofu_fx.fx.fakes.compute``:
what it saves is the mode's way to an op's meta kernel, never the check that shapes fit. And wherever there are tokens
of a reduced stream there are all of its samples. Changes nothing in the graph.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch.fx import Interpreter, Node

from tofu_fx.axes.atoms import hint
from tofu_fx.compilation import Cursor, Followed
from tofu_fx.errors import TofuError
from tofu_fx.fx.autocast import Autocasts, is_region
from tofu_fx.fx.fakes import compute
from tofu_fx.fx.nodes import is_op
from tofu_fx.rewriting.strides import strides_of
from tofu_fx.rewriting.token_count_inputs import fake_mode_of, faking

S = TypeVar("S", bound=Followed)


class _Checked(Interpreter):
    """Runs the graph on fake tensors and compares each node's value with the one noted when it was written.

    Not its strides: attention chooses its kernel, and so its output's layout, by whether a mask requires a gradient;
    a noted value no longer says that.
    """

    cursor: Cursor
    regions: Autocasts

    def run_node(self, n: Node) -> Any:
        self.cursor.node = n
        if is_region(n):
            self.regions.visit(n)
            return None
        noted = n.meta.get("val")
        if n.op == "get_attr" and isinstance(noted, torch.Tensor):
            return noted  # a real tensor, which does not go with fake ones
        if is_op(n, "item"):
            return noted  # a number that a tensor holds when the model runs, by the symbol that stands for it
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and isinstance(noted, torch.Tensor) and _form(value)[:3] != _form(noted)[:3]:
            raise TofuError(f"{n.name} is {_form(value)}, was written as {_form(noted)}")
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return compute(target, args, kwargs)


def verify(graph: S) -> S:
    """Raise TofuError where an output is not what was traced, or where samples of a reduced stream have met."""
    gm = graph.gm
    _check_samples(graph)
    fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    interpreter = _Checked(gm)
    interpreter.cursor = graph.at
    with faking(fake_mode_of(gm)), Autocasts() as interpreter.regions:
        outputs = interpreter.run(*fakes)
    flat, _ = torch.utils._pytree.tree_flatten(outputs)
    noted, _ = torch.utils._pytree.tree_flatten(gm.graph.output_node().args[0])
    if len(flat) != len(graph.traced_outputs):
        raise TofuError(f"{len(flat)} outputs, {len(graph.traced_outputs)} were traced")
    for i, (now, node, traced) in enumerate(zip(flat, noted, graph.traced_outputs, strict=True)):
        if not isinstance(traced, torch.Tensor):
            continue
        # Where the layout depends on the kernel that attention will choose, the noted value and this one differ in it.
        known = not isinstance(node, Node) or _form(node.meta["val"]) == _form(now)
        if _form(now)[: None if known else 3] != _form(traced)[: None if known else 3]:
            raise TofuError(f"output {i} is {_form(now)}, was traced as {_form(traced)}")
    return graph


def _check_samples(graph: Followed) -> None:
    """What has a stream's tokens has its samples, each once and in order: whatever a rule said of the ops between."""
    tracer = graph.axes
    for node in tracer.axes:
        graph.at.node = node
        for part in tracer.parts(node):
            tracer.samples.check(part)


def _form(value: Any) -> Any:
    """What a caller can rely on: shape, dtype, device and strides."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    shape = tuple(hint(size) for size in value.shape)
    return shape, value.dtype, value.device, strides_of(value)
