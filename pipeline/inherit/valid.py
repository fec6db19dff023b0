"""Which token positions are real: for calibration, and for gates that summarise a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _pooling(model: nn.Module) -> tuple[str, int]:
    """Return how a CLIP's text tower pools, and its end-of-text id."""
    holder: Any = model.text if isinstance(getattr(model, "text", None), nn.Module) else model
    pool = getattr(holder, "text_pool_type", getattr(holder, "pool_type", "argmax"))
    return str(pool), int(getattr(holder, "text_eos_id", getattr(holder, "eos_id", None)) or 0)


def valid_tokens(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return which positions of `tokens` [B, N] are real: all up to the end-of-text token.

    open_clip pools at the largest token id (`argmax`) or at a given one (`eos`); a tower that pools
    otherwise has no padding that could be recognised, and every position counts.
    """
    return _until_end(tokens, *_pooling(model))


def _until_end(tokens: Tensor, pool: str, eos: int) -> Tensor:
    if pool == "argmax":
        end = tokens.argmax(dim=-1)
    elif pool == "eos":
        end = tokens.eq(eos).to(torch.int32).argmax(dim=-1)
    else:
        return torch.ones_like(tokens, dtype=torch.bool)
    return torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]


class ValidTokens(nn.Module):
    """Which tokens of the current batch are not padding; shared by a tower's sequence gates.

    The tower's token embedding notes them in the forward pass, the gates read them in the same one.
    """

    def __init__(self, pool: str, eos: int) -> None:
        super().__init__()
        self.pool, self.eos = pool, eos
        self.mask: Tensor | None = None  # [B, N]

    def note(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember the valid positions of the tokens that enter the embedding (a pre-hook)."""
        self.mask = _until_end(args[0], self.pool, self.eos)

    def forward(self, features: Tensor) -> Tensor:
        """Return the mean of `features` [B, N, R] over the valid tokens, [B, R]."""
        if self.mask is None:
            raise RuntimeError("a sequence gate ran before its tower's token embedding")
        weight = self.mask.to(features.dtype).unsqueeze(-1)
        return (features * weight).sum(dim=1) / weight.sum(dim=1)


def share_valid_tokens(model: nn.Module) -> None:
    """Connect the sequence gates of a CLIP's text tower to its token embedding, in place."""
    from pipeline.inherit.layers import InheritedLinear

    gates = [
        module
        for name, module in model.named_modules()
        if isinstance(module, InheritedLinear)
        and module.mode == "sequence"
        and module.gate is not None
        and not name.startswith("visual.")
    ]
    embedding = next((m for n, m in model.named_modules() if n.endswith("token_embedding")), None)
    if embedding is None or not gates:
        return
    valid = ValidTokens(*_pooling(model))
    embedding.register_forward_pre_hook(valid.note)
    for module in gates:
        module.valid = valid
