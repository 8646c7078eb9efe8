"""Dynamo's graph -> one uniform pre-dispatch ATen vocabulary.

Before: ``call_method view``, ``torch.nn.functional.layer_norm``, ``operator.add``, modules, ...
After:  ``aten.view.default``, ``aten.layer_norm.default``, ``aten.add.Tensor``, ... with what matters kept whole
(``aten.linear``, ``aten.scaled_dot_product_attention``), each node with its module path, source line and fake value.
The graph is still ahead of autograd, so training works as in any graph that Dynamo hands out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from tofu_fx.compilation import Captured, Lowered
from tofu_fx.errors import Unsupported
from tofu_fx.fx.autocast import Autocasts
from tofu_fx.fx.held import fake_of, lift_tensors, put_back
from tofu_fx.fx.nodes import MODEL_STATE, is_impure, is_parameter, source_line
from tofu_fx.fx.recorder import record
from tofu_fx.fx.spellings import respell
from tofu_fx.fx.stages import advanced


def lower_to_aten(graph: Captured) -> Lowered:
    """The graph in its ATen form; placeholders keep their order and Dynamo's notes.

    Raises:
        Unsupported: for higher-order ops (activation checkpointing, autograd.Function, flex_attention, cond): inlining
            them would lose what they are for, or give wrong gradients. For the transforms of torch.func (vmap, grad,
            jvp), inside of which tensors are wrapped.
    """
    traced = graph.gm
    _refuse_what_cannot_be_inlined(traced)
    before = traced.graph.find_nodes(op="placeholder")
    lifted, held = lift_tensors(traced)
    fakes = [fake_of(node) for node in lifted.graph.find_nodes(op="placeholder")]
    modes = {fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)}
    if not modes:
        raise Unsupported("the graph has no tensor input")
    if len(modes) > 1:
        raise Unsupported("the graph's inputs were traced in several fake modes, which cannot be mixed")
    # The placeholders' own fake mode: the one in the tracing context is another, and mixing the two is refused.
    (fake_mode,) = modes
    with torch._guards.tracing(None):
        lowered = record(lifted, fakes, fake_mode) or _trace(lifted, fakes, fake_mode)
    put_back(lowered, held)
    after = lowered.graph.find_nodes(op="placeholder")
    for old, new in zip(before, after, strict=True):
        _carry_over(old, new)
    state = frozenset(new for old, new in zip(before, after, strict=True) if _is_state(old))
    lowered.graph.eliminate_dead_code(is_impure_node=is_impure)
    respell(lowered.graph)
    outputs, _ = torch.utils._pytree.tree_flatten(lowered.graph.output_node().args[0])
    made = tuple(out.meta.get("val") if isinstance(out, Node) else out for out in outputs)
    return advanced(Lowered, graph, gm=lowered, model_state=state, traced_outputs=made)


def _refuse_what_cannot_be_inlined(traced: GraphModule) -> None:
    # Higher-order ops first: Dynamo puts what they need around them (a vmap for flex_attention's mask).
    for node in traced.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            name = node.target.name()
            instead = "; scaled_dot_product_attention can" if "flex_attention" in name else ""
            raise Unsupported(
                f"the graph holds the higher-order op {name}{source_line(node)}, which cannot be inlined{instead}"
            )
    for node in traced.graph.nodes:
        transform = re.fullmatch(r"_(\w+)_increment_nesting", getattr(node.target, "__name__", ""))
        if transform is not None:
            raise Unsupported(
                f"the graph holds torch.func's {transform.group(1)}{source_line(node)} at node {node.name}: the "
                "tensors inside are wrapped, so that what is done to them cannot be recorded ahead of autograd; call "
                "it outside of the compiled function, or write it with batched operators"
            )


def _trace(traced: GraphModule, fakes: Sequence[Any], fake_mode: FakeTensorMode) -> GraphModule:
    """The ATen graph by make_fx, for any graph."""
    with fake_mode, fx_traceback.preserve_node_meta():
        return make_fx(
            lambda *args: _run(traced, args),
            tracing_mode="real",
            pre_dispatch=True,
            _allow_non_fake_inputs=True,
        )(*fakes)


class _Traced(Interpreter):
    """Runs Dynamo's graph with its autocast regions in force, which tracing only records."""

    regions: Autocasts

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.regions.visit(n)
        return value


def _run(traced: GraphModule, args: Sequence[Any]) -> Any:
    interpreter = _Traced(traced)
    with Autocasts() as interpreter.regions:
        return interpreter.run(*args)


def _carry_over(old: Node, new: Node) -> None:
    """Dynamo's notes on a placeholder: AOTAutograd reads them to know parameters from inputs."""
    new.meta.update({key: value for key, value in old.meta.items() if key not in new.meta})
    new.name = old.name
    new.target = old.target
    # DistributedDataParallel's buckets have inputs without a source; AOTAutograd wants the attribute all the same.
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source


def _is_state(node: Node) -> bool:
    """Whether a placeholder is a parameter, a buffer or another tensor held by a module, rather than an input."""
    if is_parameter(node) or node.meta.get(MODEL_STATE):
        return True
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = str(name() if callable(name) else name)
    held_by_module = re.search(r"\._?(modules|parameters|buffers)\b|L\['self'\]\.", name) is not None
    return held_by_module or re.search(r"_(parameters|buffers)_", str(node.target)) is not None
