"""The part of each rank in, the whole on every rank out; nobody waits for a rank that failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.errors import UserError

ResultT = TypeVar("ResultT")


def world_of() -> tuple[int, int]:
    """Return (rank, number of ranks): (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def rank_batches(total: int, batch_size: int, rank: int, world: int) -> list[range]:
    """Return the batches of one rank: a contiguous run of the whole list of batches.

    Joined in rank order, the ranks' batches are 0..total-1 in order, each index once.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    starts = range(0, total, batch_size)
    low, high = len(starts) * rank // world, len(starts) * (rank + 1) // world
    return [range(start, min(start + batch_size, total)) for start in starts[low:high]]


def agree(action: Callable[[], ResultT]) -> ResultT:
    """Do something on every rank that may fail on some (a file that one node lacks).

    Raises:
        UserError: it failed on any rank; raised on all, so that none waits for another.
    """
    _, world = world_of()
    if world == 1:
        return action()
    result: ResultT | None = None
    fault: UserError | None = None
    try:
        result = action()
    except UserError as error:
        fault = error
    faults: list[UserError | None] = [None] * world
    dist.all_gather_object(faults, fault)
    for found in faults:
        if found is not None:
            raise found
    return result  # type: ignore[return-value]  # no fault anywhere: the action returned


def join(
    features: Sequence[Tensor], rest: list[Any], fault: UserError | None, device: torch.device
) -> tuple[Tensor, list[Any]]:
    """Join what all ranks computed, in rank order.

    Args:
        features: this rank's batches of embeddings [b, D].
        rest: what else it knows of its samples.
        fault: why it stopped early, if it did.
        device: where it computes.

    Returns:
        All embeddings [N, D] on the CPU, and all of `rest`.

    Raises:
        UserError: a rank has a fault (the first one is raised on every rank), or there is nothing.
    """
    _, world = world_of()
    local = torch.cat(list(features)) if features else torch.zeros(0, 0)
    reports: list[Any] = [(fault, len(local), local.shape[1], rest)]
    if world > 1:
        reports = [None] * world
        dist.all_gather_object(reports, (fault, len(local), local.shape[1], rest))
    for found, *_ in reports:
        if found is not None:
            raise found
    width = max(report[2] for report in reports)
    if not width:
        raise UserError("the evaluation set is empty")
    if world == 1:
        return local, rest
    joined = _gather(local.reshape(-1, width), [report[1] for report in reports], device)
    return joined, [item for report in reports for item in report[3]]


def _gather(features: Tensor, rows: Sequence[int], device: torch.device) -> Tensor:
    """Join the ranks' features [n_r, D] to [N, D] on the CPU; `rows` is n_r of every rank."""
    # NCCL moves GPU tensors only; gloo is happiest with CPU tensors.
    place = device if "nccl" in str(dist.get_backend()) else torch.device("cpu")
    padded = torch.zeros(max(rows), features.shape[1], dtype=torch.float32, device=place)
    padded[: len(features)] = features.to(place)
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count].cpu() for part, count in zip(parts, rows, strict=True)])
