"""Attention modules whose projections are ordinary Linear layers, so that they can be inherited.

`nn.MultiheadAttention` and open_clip's `Attention` keep query, key and value in one raw
`in_proj_weight`, and `AttentionPool2d` hands its projections' raw weights to a function. `expose`
replaces each by a module of the same call signature, weights and result whose projections are
called as layers.

Shape legend: B batch, L queries, S keys, C width, A attention heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Wrap a raw weight [O, I] and bias as a Linear that shares the storage."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean "may not attend" mask into an additive one; pass a float mask through."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


class ExposedAttention(nn.Module):
    """`nn.MultiheadAttention` of equal widths with `in_proj` [3C, C] and `out_proj` as layers."""

    kind = "attention"

    def __init__(self, dense: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = dense.embed_dim, dense.num_heads
        self.batch_first, self.dropout = dense.batch_first, dense.dropout
        self.in_proj = _linear(dense.in_proj_weight, dense.in_proj_bias)
        self.out_proj = _linear(dense.out_proj.weight, dense.out_proj.bias)
        self.train(dense.training)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return self.in_proj(query).chunk(3, dim=-1)
        parts = (
            self.in_proj(source).chunk(3, dim=-1)[i] for i, source in enumerate((query, key, value))
        )
        return tuple(parts)

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, batch: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Merge the mask [L, S] or [B x A, L, S] and the padding [B, S] into one additive mask."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, dtype)
            if mask.ndim == 3:
                mask = mask.view(batch, self.num_heads, *mask.shape[1:])
        if padding is not None:
            extra = _additive(padding, dtype)[:, None, None, :]
            mask = extra if mask is None else mask + extra
        return mask

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does; the hint `is_causal` needs a mask beside it."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is only a hint: give attn_mask as well")
        single = query.ndim == 2
        axis = 0 if self.batch_first or single else 1
        q, k, v = self._project(query, key, value)
        if single:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif axis == 1:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        batch, length, width = q.shape
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, batch, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            y = F.dropout(weights, dropout) @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.out_proj(y.transpose(1, 2).reshape(batch, length, width))
        if single:
            return y[0], None if weights is None else weights[0]
        return (y.transpose(0, 1) if axis == 1 else y), weights


class ExposedClipAttention(nn.Module):
    """open_clip's own `Attention` (norms and scales included), its projection as a layer."""

    kind = "clip_attention"

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        source: Any = dense
        self.num_heads, self.logit_scale_max = source.num_heads, source.logit_scale_max
        self.embed_dim = source.in_proj_weight.shape[1]
        self.ln_q: nn.Module
        self.ln_k: nn.Module
        self.ln_inner: nn.Module
        self.attn_drop: nn.Dropout
        self.out_proj: nn.Module
        self.out_drop: nn.Module
        self.in_proj = _linear(source.in_proj_weight, source.in_proj_bias)
        for name in ("ln_q", "ln_k", "attn_drop", "ln_inner", "out_proj", "out_drop"):
            setattr(self, name, getattr(source, name))
        self.logit_scale: nn.Parameter | None = source.logit_scale
        self.head_scale: nn.Parameter | None = source.head_scale
        self.train(dense.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend over [B, L, C]; the mask is [L, L] or [B x A, L, L]."""
        batch, length, width = x.shape
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in self.in_proj(x).chunk(3, dim=-1)
        )
        if attn_mask is not None:
            attn_mask = _additive(attn_mask, q.dtype)
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.view(batch, self.num_heads, length, length)
        if self.logit_scale is not None:
            scale = self.logit_scale.clamp(max=self.logit_scale_max).exp()
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * scale
            scores = scores if attn_mask is None else scores + attn_mask
            y = self.attn_drop(scores.softmax(dim=-1)) @ v
        else:
            dropout = self.attn_drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(
                self.ln_q(q), self.ln_k(k), v, attn_mask=attn_mask, dropout_p=dropout
            )
        if self.head_scale is not None:
            y = y * self.head_scale
        y = self.ln_inner(y.transpose(1, 2).reshape(batch, length, width))
        return self.out_drop(self.out_proj(y))


class ExposedAttentionPool(nn.Module):
    """open_clip's `AttentionPool2d` computing only the one query it uses (the spatial mean).

    [B, C, h, w] -> [B, O]; the original also projects and attends the h x w queries that it throws
    away.
    """

    kind = "attention_pool"

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        source: Any = dense
        self.num_heads = source.num_heads
        self.embed_dim = source.q_proj.in_features
        self.positional_embedding = source.positional_embedding
        self.q_proj, self.k_proj, self.v_proj = source.q_proj, source.k_proj, source.v_proj
        self.c_proj = source.c_proj
        self.train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        """Pool a feature map, [B, C, h, w] -> [B, O]."""
        tokens = x.flatten(2).transpose(1, 2)  # [B, h x w, C]
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        q, k, v = self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(y.transpose(1, 2).flatten(1))


Exposed = ExposedAttention | ExposedClipAttention | ExposedAttentionPool


def exposable(module: nn.Module) -> str:
    """Return the kind of exposure this module needs, "" if none, or "unsupported: why"."""
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            return "unsupported: attention over keys of another width"
        if module.bias_k is not None or module.add_zero_attn:
            return "unsupported: attention with an extra key"
        return "attention"
    origin = f"{type(module).__module__}.{type(module).__name__}"
    return {
        "open_clip.transformer.Attention": "clip_attention",
        "open_clip.modified_resnet.AttentionPool2d": "attention_pool",
    }.get(origin, "")


def expose_module(module: nn.Module, kind: str) -> Exposed:
    """Return the exposed twin of `module`, sharing its parameters."""
    if kind == "attention":
        assert isinstance(module, nn.MultiheadAttention)
        return ExposedAttention(module)
    if kind == "clip_attention":
        return ExposedClipAttention(module)
    if kind == "attention_pool":
        return ExposedAttentionPool(module)
    raise ValueError(f"unknown attention kind {kind!r}")
