"""BatchNorm in training: by which pairs it normalises, and whose statistics are kept.

DeepSpeed never synchronises buffers, so everything about running statistics over ranks is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from data_prep.errors import UserError
from pipeline.train.processes import Processes

Norm = nn.modules.batchnorm._BatchNorm


def batchnorms(module: nn.Module) -> list[Norm]:
    """Return the BatchNorm layers of a model."""
    return [m for m in module.modules() if isinstance(m, Norm)]


def synchronised(model: nn.Module, processes: Processes) -> nn.Module:
    """Return the model with SyncBatchNorm: it normalises by the pairs of all processes.

    Raises:
        UserError: there is no GPU; PyTorch has this layer for GPUs alone.
    """
    if processes.device.type != "cuda":
        raise UserError(
            "batchnorm: sync needs GPUs, and this training runs on the CPU",
            where="train.batchnorm",
            todo="set train (statistics are averaged over processes when saved) or frozen",
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def training_mode(module: nn.Module, frozen: bool) -> None:
    """Put a model into training mode; `frozen` BatchNorm stays a fixed map, its affine learns."""
    module.train()
    if frozen:
        for norm in batchnorms(module):
            norm.eval()


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep running statistics where they are, while BatchNorm normalises by the batch.

    Copies take the updates: a layer without any would save other tensors for its backward pass,
    which a recomputed block must not.
    """
    kept = [(norm, dict(norm._buffers)) for norm in batchnorms(module) if norm.training]
    for norm, buffers in kept:
        norm._buffers.update({k: None if v is None else v.clone() for k, v in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)


@contextmanager
def slower_statistics(module: nn.Module, times: int) -> Iterator[None]:
    """Make `times` chunks move the running statistics as far as one whole batch would.

    With momentum m one batch keeps 1 - m of the old statistics; each of n chunks then has to keep
    (1 - m)^(1/n).
    """
    norms = [norm for norm in batchnorms(module) if norm.momentum is not None]
    kept = [norm.momentum for norm in norms]
    for norm, momentum in zip(norms, kept, strict=True):
        assert momentum is not None
        norm.momentum = 1 - (1 - momentum) ** (1 / times)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def average_batchnorm(module: nn.Module, processes: Processes) -> None:
    """Replace the running statistics by their mean over ranks.

    Without this every rank would evaluate another model, and only rank 0's would be saved.
    """
    if processes.world_size == 1:
        return
    for norm in batchnorms(module):
        for buffer in filter(torch.is_tensor, (norm.running_mean, norm.running_var)):
            dist.all_reduce(buffer)
            buffer.div_(processes.world_size)


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of a rank's own running statistics, by name."""
    return {
        name: buffer.detach().cpu().clone()
        for name, buffer in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }


@torch.no_grad()
def set_statistics(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Put running statistics back."""
    buffers = dict(module.named_buffers())
    for name, value in values.items():
        buffers[name].copy_(value)
