"""Inherited layers: one shared low-rank down projection, H up projections, a gate that mixes them.

In: a dense Conv2d, Linear or Embedding (only its geometry). Out: a module with the same call
signature. The H outputs of the heads are never built: per image or sequence the up *weights* are
mixed, per token the bottleneck is widened by its gates (docs/inheritance.md).

Shape legend: B batch, N tokens, P positions (height x width), H heads, G groups, R rank, I and O
input and output width, D features that the gate reads.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.inherit.valid import ValidTokens

GateMode = Literal["image", "token", "sequence", "none"]


class _Heads(nn.Module):
    """What every gated layer shares: the up projections [H, O, R] and the gate.

    Args:
        width_in: features the gate reads (groups x rank, times heads for `symmetric`).
        width_out: O.
        rank: R, per group.
        heads: H; with one head there is no gate.
        gate: whether several heads are mixed by a gate; otherwise their plain mean is taken.
        symmetric: every head has its own down projection (an ablation), so `down` has H x R
            outputs.
    """

    def __init__(
        self, width_in: int, width_out: int, rank: int, heads: int, gate: bool, symmetric: bool
    ) -> None:
        super().__init__()
        if rank < 1 or heads < 1:
            raise ValueError(f"rank and heads must be at least 1, got {rank} and {heads}")
        self.rank, self.heads, self.symmetric = rank, heads, symmetric
        self.up = nn.Parameter(torch.zeros(heads, width_out, rank))
        self.gate = nn.Linear(width_in, heads) if gate and heads > 1 else None

    def gates(self, features: Tensor) -> Tensor:
        """Return mixing weights that sum to one over the heads: [..., D] -> [..., H]."""
        if self.gate is None:
            return features.new_full((*features.shape[:-1], self.heads), 1.0 / self.heads)
        return self.gate(features).softmax(dim=-1)

    def mixed_up(self, gates_BH: Tensor) -> Tensor:
        """Return each sample's own up projection, [B, O, R] (or [B, O, H x R] when symmetric)."""
        if self.symmetric:
            scaled = gates_BH[:, :, None, None] * self.up
            return scaled.permute(0, 2, 1, 3).flatten(2)
        heads, width_out, rank = self.up.shape
        mixed = gates_BH.to(self.up.dtype) @ self.up.reshape(heads, width_out * rank)
        return mixed.view(-1, width_out, rank)

    @property
    def constant(self) -> bool:
        """Whether the heads mix without looking at the input."""
        return self.gate is None

    def constant_up(self) -> Tensor:
        """Return the up projection under uniform gates, [O, R] (or [O, H x R] when symmetric)."""
        if self.symmetric:
            return self.up.permute(1, 0, 2).flatten(1) / self.heads
        return self.up[0] if self.heads == 1 else self.up.mean(dim=0)


class InheritedConv2d(_Heads):
    """Low-rank convolution: the kernel goes down to R channels per group, 1x1 heads come back up.

    [B, I, h, w] -> [B, O, h', w'], like the `nn.Conv2d` it replaces; the gate is one vector per
    image.
    """

    kind = "conv"

    def __init__(
        self,
        dense: nn.Conv2d,
        rank: int,
        heads: int = 1,
        *,
        gate: bool = True,
        symmetric: bool = False,
    ) -> None:
        groups, copies = dense.groups, heads if symmetric else 1
        super().__init__(
            copies * groups * rank, dense.out_channels, rank, heads, gate, symmetric and heads > 1
        )
        self.groups = groups
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.down = nn.Conv2d(
            dense.in_channels,
            copies * groups * rank,
            dense.kernel_size,  # type: ignore[arg-type]
            stride=dense.stride,  # type: ignore[arg-type]
            padding=dense.padding,  # type: ignore[arg-type]
            dilation=dense.dilation,  # type: ignore[arg-type]
            groups=groups,
            bias=False,
            padding_mode=dense.padding_mode,
        )
        self.bias = (
            nn.Parameter(torch.zeros(dense.out_channels)) if dense.bias is not None else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, [B, I, h, w] -> [B, O, h', w']."""
        h = self.down(x)
        if self.constant:
            return F.conv2d(h, self.constant_up()[:, :, None, None], self.bias, groups=self.groups)
        up_BOR = self.mixed_up(self.gates(h.mean(dim=(2, 3))))
        batch, _, height, width = h.shape
        up = up_BOR.reshape(batch * self.groups, self.out_channels // self.groups, -1)
        y = torch.bmm(up, h.reshape(batch * self.groups, -1, height * width).to(up.dtype))
        y = y.view(batch, self.out_channels, height, width)
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)

    def intended(self) -> Tensor:
        """Return the dense kernel that this layer equals while its gates are uniform."""
        down = self.down.weight.view(self.groups, -1, *self.down.weight.shape[1:])
        up = self.constant_up().view(self.groups, -1, down.shape[1])
        return torch.einsum("gor,grikl->goikl", up, down).flatten(0, 1)

    def extra_repr(self) -> str:
        """Show rank and heads."""
        return f"rank={self.rank}, heads={self.heads}"


class InheritedLinear(_Heads):
    """Low-rank linear layer with heads gated per token (default) or per sequence.

    [..., I] -> [..., O]; with `mode="sequence"` the input is [B, N, I].
    """

    kind = "linear"

    def __init__(
        self,
        dense: nn.Linear,
        rank: int,
        heads: int = 1,
        *,
        gate: bool = True,
        symmetric: bool = False,
        mode: GateMode = "token",
    ) -> None:
        copies = heads if symmetric else 1
        super().__init__(
            copies * rank, dense.out_features, rank, heads, gate, symmetric and heads > 1
        )
        self.in_features, self.out_features, self.mode = dense.in_features, dense.out_features, mode
        self.down = nn.Linear(dense.in_features, copies * rank, bias=False)
        self.bias = (
            nn.Parameter(torch.zeros(dense.out_features)) if dense.bias is not None else None
        )
        self.valid: ValidTokens | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, [..., I] -> [..., O]."""
        h = self.down(x)
        if self.constant:
            return F.linear(h, self.constant_up(), self.bias)
        if self.mode == "sequence" and h.ndim == 3:
            summary = h.mean(dim=1) if self.valid is None else self.valid(h)
            y = torch.bmm(h, self.mixed_up(self.gates(summary)).transpose(1, 2).to(h.dtype))
            return y if self.bias is None else y + self.bias.to(y.dtype)
        gates = self.gates(h).to(h.dtype).unsqueeze(-1)
        heads = h.unflatten(-1, (self.heads, self.rank)) if self.symmetric else h.unsqueeze(-2)
        wide = (gates * heads).flatten(-2)  # [..., H x R]
        return F.linear(wide, self.up.permute(1, 0, 2).flatten(1), self.bias)

    def intended(self) -> Tensor:
        """Return the dense weight [O, I] that this layer equals while its gates are uniform."""
        return self.constant_up() @ self.down.weight

    @property
    def int8_original_dtype(self) -> torch.dtype:
        """The weight's type: open_clip asks this of an MLP layer that has no plain `weight`."""
        return self.up.dtype

    def extra_repr(self) -> str:
        """Show rank, heads and gate."""
        return f"rank={self.rank}, heads={self.heads}, mode={self.mode}"


class InheritedEmbedding(nn.Module):
    """A lookup of R codes per token followed by one linear map: [B, N] integers -> [B, N, O]."""

    kind = "embedding"

    def __init__(self, dense: nn.Embedding, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.rank, self.heads = rank, 1
        self.num_embeddings, self.embedding_dim = dense.num_embeddings, dense.embedding_dim
        self.down = nn.Embedding(dense.num_embeddings, rank, padding_idx=dense.padding_idx)
        self.up = nn.Linear(rank, dense.embedding_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look the tokens up, [...] integers -> [..., O]."""
        return self.up(self.down(tokens))

    def intended(self) -> Tensor:
        """Return the dense table [vocabulary, O] that this layer equals."""
        return self.down.weight @ self.up.weight.T

    def extra_repr(self) -> str:
        """Show the rank."""
        return f"rank={self.rank}"


Inherited = InheritedConv2d | InheritedLinear | InheritedEmbedding


def build_layer(
    dense: nn.Module,
    rank: int,
    heads: int = 1,
    *,
    gate: bool = True,
    symmetric: bool = False,
    mode: GateMode = "token",
) -> Inherited:
    """Return an empty inherited layer with the geometry, device, type and mode of `dense`."""
    layer: Inherited
    if isinstance(dense, nn.Conv2d):
        layer = InheritedConv2d(dense, rank, heads, gate=gate, symmetric=symmetric)
    elif isinstance(dense, nn.Linear):
        layer = InheritedLinear(dense, rank, heads, gate=gate, symmetric=symmetric, mode=mode)
    elif isinstance(dense, nn.Embedding):
        layer = InheritedEmbedding(dense, rank)
    else:
        raise TypeError(f"no inherited layer for {type(dense).__name__}")
    layer.to(device=dense.weight.device, dtype=dense.weight.dtype)
    layer.train(dense.training)
    return layer
