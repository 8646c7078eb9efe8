"""Entries of branches that nobody else reads: an alias each, where the residual stream or another branch does."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from tofu_fx.axes.tracer import AxisTracer
from tofu_fx.fx.nodes import is_op
from tofu_fx.sites.site import Placed


def detach(site: Placed, plain: AxisTracer, others: Collection[Node]) -> Placed:
    """The site with an entry of its own for each branch whose input others read, too.

    That is the residual of a post-norm block, or an MLP beside the attention that is to keep all tokens.

    Appends ``aten.alias`` to the graph, with the axes of what it is an alias of.
    """
    branches = []
    for branch in site.branches:
        nodes = list(plain.graph.nodes)
        apart = _read_apart(nodes, branch.enter)
        if branch.kind == "attention" and "mlp" not in site.kinds:
            beside = [user for user in branch.enter.users if user not in branch.inside and user not in apart]
            apart += [user for user in beside if _is_beside(user, nodes, site.attention.node, others)]
        if apart:
            users = [user for user in branch.enter.users if user not in apart]
            with plain.graph.inserting_after(branch.enter):
                alias = plain.graph.call_function(torch.ops.aten.alias.default, (branch.enter,))
            alias.meta = dict(branch.enter.meta)
            for user in users:
                user.replace_input_with(branch.enter, alias)
            plain.axes[alias] = plain.of(branch.enter)
            plain.depends.add(alias)
            branch = replace(branch, enter=alias, inside=(branch.inside - {branch.enter}) | {alias})
        branches.append(branch)
    return replace(site, branches=tuple(branches), reduce_at=branches[0].enter)


def _read_apart(nodes: Sequence[Node], enter: Node) -> list[Node]:
    """The users of a branch's entry that are not part of it: they join it with what comes out of it, or return it."""
    behind: set[Node] = set()
    apart = []
    for node in nodes:
        inputs = node.all_input_nodes
        if enter in inputs and (node.op == "output" or any(value in behind for value in inputs)):
            apart.append(node)
        if enter in inputs or any(value in behind for value in inputs):
            behind.add(node)
    return apart


def _is_beside(user: Node, nodes: Sequence[Node], attention: Node, others: Collection[Node]) -> bool:
    """Whether a user of an attention's entry starts a branch beside it, whose result is added to that of the attention.

    What is concatenated with it ahead of one projection (Flux's single blocks) has to have its tokens, and what leads
    to another attention has them too.
    """
    own, attended = {user}, {attention}
    for node in nodes:
        from_own = any(value in own for value in node.all_input_nodes)
        from_attended = any(value in attended for value in node.all_input_nodes)
        if from_own and from_attended:
            return is_op(node, "add")
        if from_own and node in others:
            return False
        if from_own:
            own.add(node)
        if from_attended:
            attended.add(node)
    return True
