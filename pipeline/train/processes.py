"""Who runs: one process, torchrun's processes, or SLURM's tasks, behind one small value."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from data_prep.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among all of a training job."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and talks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return on every rank whether `flag` is set on at least one."""
        return self.maximum(float(flag)) > 0

    def maximum(self, value: float) -> float:
        """Return on every rank the largest `value` of all ranks."""
        return self.maxima(value)[0]

    def maxima(self, *values: float) -> list[float]:
        """Return on every rank the largest of all ranks for each value, in one exchange."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [float(value) for value in tensor.tolist()]

    def total(self, value: float) -> float:
        """Return on every rank the sum of `value` over all ranks."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return on every rank the mean over ranks of a tensor [n]."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the torch device that a config's `device` asks for.

    Raises:
        UserError: a GPU is asked for where there is none; the CPU is never a silent substitute.
    """
    if name == "cpu":
        return torch.device("cpu")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError(
            "device: cuda is asked for, but torch sees no GPU",
            where="device",
            todo="run `inherclip doctor`, or set device=cpu (or auto)",
        )
    if not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}",
            todo="start one process per GPU",
        )
    return torch.device("cuda", local_rank)


def join(device: str = "auto", timeout_minutes: float = 10.0) -> Processes:
    """Join the process group that the environment describes; it is left when the process ends.

    DeepSpeed keeps references to its first group, so all arms of a process share one.

    A process that was not started by a launcher is a group of one. DeepSpeed finds the group
    already made, so it never tries MPI, and never compiles its shared-memory collective: that
    takes about 45 s with a compiler, and a killed build leaves a lock on which every later run
    waits for ever.
    """
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:  # a task of srun
        from slurm.env import distributed_environment

        os.environ.update(distributed_environment(os.environ))
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        if world_size > 1:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
        atexit.register(_leave)
    return Processes(rank, world_size, local_rank, chosen)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
