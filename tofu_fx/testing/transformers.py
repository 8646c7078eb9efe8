"""Small transformers assembled from the ways in which people write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tofu_fx.testing.attention import Attention
from tofu_fx.testing.spec import DIM, HEADS, WIDTH, Spec, canonical, laid_out


class Block(nn.Module):
    """Attention and MLP around a stream that is kept in the layout of the spec."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.attention = Attention(spec)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        sandwich = spec.norm == "sandwich"
        self.behind1, self.behind2 = (nn.LayerNorm(DIM) if sandwich else nn.Identity() for _ in range(2))
        self.gate = nn.Parameter(torch.ones(DIM))
        self.gammas = nn.ParameterList(nn.Parameter(torch.ones(DIM)) for _ in range(2))
        self.drop = nn.Dropout(0.3) if spec.dropout else nn.Identity()

    def forward(self, x: Tensor, batch: int, places: Tensor | None, there: Tensor | None, reducer: Any) -> Tensor:
        """One block; ``places`` and ``there`` as for the attention."""
        spec, pre = self.spec, self.spec.norm != "post"
        inner = self.norm1(x) if pre else x
        branch, keys = self.attention(inner, batch, places, there, reducer)
        branch = self.behind1(branch)
        if spec.parallel == "branches first":
            branch = branch + self.behind2(self.mlp(inner))
        x = self._add(x, branch, 0, batch)
        if reducer is not None:
            if spec.residual == "stream_scaled":
                reducer.not_additive()
            x = laid_out(reducer.reduce(canonical(x, spec, batch), keys), spec)
        if spec.parallel == "branches first":
            return x if pre else self.norm1(x)
        x = x if pre else self.norm1(x)
        inner = inner if spec.parallel == "one by one" else self.norm2(x) if pre else x
        x = self._add(x, self.behind2(self.mlp(inner)), 1, batch)
        if reducer is not None and (not pre or spec.residual == "stream_scaled"):
            reducer.not_additive()
        return x if pre else self.norm2(x)

    def _gated_by_all(self, x: Tensor, branch: Tensor, batch: int) -> Tensor:
        gate = canonical(x, self.spec, batch).mean(1, keepdim=True).sigmoid()
        return laid_out(canonical(branch, self.spec, batch) * gate, self.spec)

    def _add(self, x: Tensor, branch: Tensor, which: int, batch: int) -> Tensor:
        branch = self.drop(branch * self.gammas[which] if self.spec.layer_scale else branch)
        if self.spec.residual == "branch_scaled":
            branch = branch * 0.5
        elif self.spec.residual == "stream_scaled":
            x = x * 0.9
        elif self.spec.residual == "gated":
            branch = branch * self.gate.mean()
        elif self.spec.residual == "token gate":
            branch = branch * x.sigmoid()
        elif self.spec.residual == "pooled gate":
            branch = self._gated_by_all(x, branch, batch)
        if self.spec.in_place:
            x += branch
            return x
        return x + branch


class Transformer(nn.Module):
    """Embedding, blocks, pooling as the spec says. Input ``[B, patches, 5]``; ``example_inputs`` makes all it takes.

    ``reducer`` is for a reference in eager mode that reduces tokens by hand after each attention: an object with
    ``reduce(x, keys)``, ``logits(scores)``, ``rows_of(table)``, ``pairs_of(table)``, ``mean(x, prefix)``,
    ``merged(x)``, ``restore(x)`` and ``not_additive()``,
    which work on ``[B, N, C]``, and with the attribute ``origin``. It knows
    nothing of masks given with the input and of branches added one by one.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Linear(5, DIM)
        self.prefix_tokens = nn.Parameter(torch.randn(1, spec.prefix, DIM))
        self.suffix_tokens = nn.Parameter(torch.randn(1, spec.suffix, DIM))
        self.pos_embed = nn.Parameter(torch.randn(1, spec.tokens, DIM))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.join = nn.Linear(2 * DIM, DIM) if spec.skip == "concatenate" else nn.Identity()
        self.norm = nn.Identity() if spec.norm == "post" else nn.LayerNorm(DIM)
        self.head = nn.Conv2d(DIM, 3, 3, padding=1) if spec.pooling == "conv" else nn.Linear(DIM, 3)
        self.latent = nn.Parameter(torch.randn(1, 1, DIM))

    def example_inputs(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        """What the model is called with; of padded inputs each has another number of patches."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, self.spec.patches, 5, generator=generator)
        if not self.spec.given_mask:
            return (x,)
        there = torch.ones(batch, self.spec.tokens, dtype=torch.bool)
        last = self.spec.prefix + self.spec.patches
        for row in range(batch):
            there[row, last - row % 4 : last] = False
        if self.spec.mask == "square":
            there = there[:, None, None, :].expand(-1, 1, self.spec.tokens, -1).contiguous()
        return x, there

    def forward(self, x: Tensor, there: Tensor | None = None, reducer: Any = None) -> Any:
        """The outputs; ``there`` says which tokens are no padding: ``[B, N]`` for the mask "padding", ``[B, 1, N, N]``
        for "square"."""
        spec, batch = self.spec, x.shape[0]
        x = self.embed(x)
        ends = [self.prefix_tokens.expand(batch, -1, -1), x, self.suffix_tokens.expand(batch, -1, -1)]
        x = torch.cat([part for part in ends if part.shape[1]], 1) if spec.prefix + spec.suffix else x
        x = laid_out(x if spec.positions in ("none", "queries and keys") else x + self.pos_embed, spec)
        earlier = x
        for i, block in enumerate(self.blocks):
            if spec.skip != "none" and i and i == spec.depth - 1:
                if reducer is not None:
                    earlier = laid_out(reducer.merged(canonical(earlier, spec, batch)), spec)
                x = self.join(torch.cat((x, earlier), -1)) if spec.skip == "concatenate" else x + earlier
            places = self._places(batch, reducer) if spec.positions in ("every block", "queries and keys") else None
            if i and spec.positions == "every block":
                x = x + places  # type: ignore[operator]
            x = block(x, batch, places if spec.positions == "queries and keys" else None, there, reducer)
            x = reshaped(aliased(x, spec.alias), spec, batch)
            if spec.mixing != "none":
                x = laid_out(mixed(canonical(x, spec, batch), spec.mixing), spec)
            if spec.dead_code:
                (x.sum(spec.token_dim) * 2).softmax(-1)
        if reducer is not None and spec.pooling in ("tokens", "conv"):
            x = laid_out(reducer.restore(canonical(x, spec, batch)), spec)
        return self._pool(self.norm(x), batch, reducer)

    def _places(self, batch: int, reducer: Any) -> Tensor:
        """The position table, such that it can be added to the stream."""
        table = self.pos_embed if reducer is None else reducer.rows_of(self.pos_embed[0])[:, 0]
        if self.spec.layout == "NBC":
            return table.transpose(0, 1)
        return table.expand(batch, -1, -1).reshape(-1, DIM) if self.spec.layout == "merged" else table

    def _pool(self, x: Tensor, batch: int, reducer: Any) -> Tensor:
        """The head, in the layout of the stream; where batch and tokens are one dim they are distinguished for it."""
        spec = self.spec
        if spec.layout == "merged" or (reducer is not None and spec.pooling in ("mean", "mean_patches", "attention")):
            x = canonical(x, spec, batch)
            dim = 1
        else:
            dim = spec.token_dim
        if spec.pooling == "class":
            return self.head(x.select(dim, 0))
        if spec.pooling == "tokens":
            return self.head(x)
        if spec.pooling == "max":
            return self.head(x.amax(dim))
        if spec.pooling == "logsumexp":
            return self.head(x.logsumexp(dim))
        if spec.pooling == "conv":
            patches = slice(spec.prefix, spec.prefix + spec.patches)
            if spec.prefix + spec.suffix:
                x = x[:, patches] if dim == 1 else x[patches]
            x = x.transpose(1, 2) if dim == 1 else x.permute(1, 2, 0)
            return self.head(x.reshape(batch, DIM, *spec.grid))
        if spec.pooling == "attention":
            return self._attend(x, dim, reducer)
        prefix = spec.prefix if spec.pooling == "mean_patches" else 0
        if reducer is not None:
            return self.head(reducer.mean(x, prefix))
        return self.head((x[:, prefix:] if dim == 1 else x[prefix:]).mean(dim))

    def _attend(self, x: Tensor, dim: int, reducer: Any) -> Tensor:
        """One learned query attends to all tokens."""
        if dim == 0:
            weights = torch.einsum("bqc,nbc->bqn", self.latent.expand(x.shape[1], -1, -1), x).softmax(-1)
            return self.head(torch.einsum("bqn,nbc->bqc", weights, x))[:, 0]
        scores = self.latent @ x.transpose(1, 2)
        weights = (scores if reducer is None else reducer.logits(scores[:, None])[:, 0]).softmax(-1)
        return self.head(weights @ x)[:, 0]


def aliased(x: Tensor, how: str) -> Tensor:
    """The same values by another name."""
    ways = {
        "none": lambda: x,
        "view_as": lambda: x.view_as(x),
        "detach": x.detach,
        "clone": x.clone,
        "identity": lambda: nn.functional.dropout(x, 0.5, training=False),
        "contiguous": x.contiguous,
        "slice": lambda: x[..., :],
    }
    return ways[how]()


def reshaped(x: Tensor, spec: Spec, batch: int) -> Tensor:
    """The same values, by way of another shape."""
    if spec.reshape == "features":
        return x.unflatten(-1, (HEADS, WIDTH)).flatten(-2)
    if spec.reshape == "swap":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if spec.reshape == "flatten":
        if spec.layout == "merged":
            return x.view(batch, -1, DIM).flatten(0, 1)
        return x.flatten(0, 1).unflatten(0, x.shape[:2])
    return x


def mixed(x: Tensor, how: str) -> Tensor:
    """``[B, N, C]`` with something of the other samples in each sample: what a reduced stream must be whole for."""
    ways = {
        "centred": lambda: x - x.mean(0),
        "first": lambda: x + 0.5 * x[:1],
        "sample": lambda: x + 0.5 * x[0],
        "scaled": lambda: x / (1 + x.var(0, correction=0)),
        "maximum": lambda: x + 0.5 * x.amax(0),
        "groups": lambda: x + 0.5 * x.unflatten(0, (2, -1)).sum(0).repeat(2, 1, 1),
        "product": lambda: torch.einsum("ab,bnc->anc", torch.eye(x.shape[0]) + 0.2, x),
        "attention": lambda: x + _over_samples(x),
        "rolled": lambda: x + 0.5 * x.roll(1, 0),
    }
    return ways[how]()


def _over_samples(x: Tensor) -> Tensor:
    """At each place the samples attend to each other."""
    return ((x.transpose(0, 1) @ x.permute(1, 2, 0)).softmax(-1) @ x.transpose(0, 1)).transpose(0, 1)
