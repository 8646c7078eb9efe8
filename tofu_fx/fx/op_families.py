"""Families of ATen ops, each spelled once; ``is_op(node, *WORK)`` asks whether a node is of one.

Where a part of the compiler means a family and something more, or all of it but one op, it says so there.
"""

from __future__ import annotations

#: the same values, perhaps in memory of their own
SAME_VALUES = frozenset({"contiguous", "clone", "alias", "detach"})
#: the same values, perhaps in another dtype or on another device
CASTS = frozenset({"to", "_to_copy", "type_as"})
#: the same values but for what a cast rounds, and what dropout takes in training
COPIES = SAME_VALUES | CASTS | {"dropout"}

#: the same elements in the same order, in dims of other sizes
GROUPINGS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten"})
#: as ``GROUPINGS``, dims of size 1 come and go
REGROUPINGS = GROUPINGS | {"squeeze", "unsqueeze"}
#: the same elements with the dims in another order
TURNS = frozenset({"permute", "transpose"})
#: several copies of the elements along a dim
EXPANSIONS = frozenset({"expand", "expand_as", "repeat"})
#: no views by their schema, but what they give may be their input itself
MAY_ALIAS = frozenset({
    "reshape", "contiguous", "to", "flatten", "expand_as", "view_as", "reshape_as", "type_as", "dropout",
})  # fmt: skip

#: tensors of a given value, in the shape of another tensor
LIKE = frozenset({"zeros_like", "ones_like", "full_like", "empty_like"})
#: tensors of a given value and shape; of the tensor that they are called on they have the dtype only
NEW = frozenset({"new_zeros", "new_ones", "new_full", "new_empty"})
#: ops that do not look at the values of their operand
SHAPE_ONLY = LIKE | NEW

#: products of matrices, of which there may be a batch
MATRIX_PRODUCTS = frozenset({"matmul", "bmm"})
#: a product with something added to it
ADDED_PRODUCTS = frozenset({"addmm", "baddbmm"})
#: products of two computed tensors: of queries and keys, of weights and values
PRODUCTS = MATRIX_PRODUCTS | {"baddbmm", "einsum"}
#: what a transformer's time goes into
WORK = PRODUCTS | {"linear", "addmm", "scaled_dot_product_attention"}
#: ``convolution`` is what all of them are one form of
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})

SOFTMAX = frozenset({"softmax", "_softmax"})
#: norms of each token alone
TOKEN_NORMS = frozenset({"layer_norm", "rms_norm"})
