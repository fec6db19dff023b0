"""Activation checkpointing: blocks keep their input only and are run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.utils.checkpoint
from torch import nn

from pipeline.train.normalisation import frozen_statistics

# The repeated units of open_clip's and timm's towers, by class name
BLOCKS = ("Bottleneck", "ResidualAttentionBlock", "CustomResidualAttentionBlock", "Block")


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of both towers, outermost only."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if type(module).__name__ in BLOCKS and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[int]:
    """Run the model's blocks checkpointed within the block; yield how many there are.

    open_clip's own switch covers its transformers only. BatchNorm's statistics must not move a
    second time when a block is run again, dropout must draw the same numbers (torch's
    `checkpoint` keeps the generator's state).
    """
    found = blocks(model)
    for block in found:
        block.forward = _recomputing(block, block.forward)
    try:
        yield len(found)
    finally:
        for block in found:
            del block.forward


def _recomputing(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return torch.utils.checkpoint.checkpoint(
            forward,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), frozen_statistics(block)),
            **kwargs,
        )

    return run
