"""Exact resume: what was written is either whole and verified, or passed over with a warning.

    resume/step-00000200/          DeepSpeed's files (model, optimizer, ZeRO shards) of all ranks
    resume/step-00000200/rank-0.pt random generators of each rank
    resume/step-00000200/state.json  written last: step, samples, fingerprint, sizes and hashes

The loader needs no state of its own: its position is the step (see `data_prep.reader`).
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from data_prep.errors import UserError
from data_prep.files import atomic_write, sha256_file
from pipeline.train.processes import Processes

STATE = "state.json"


@dataclass(frozen=True)
class Position:
    """Where training stands after `step` updates."""

    step: int
    samples: int
    corrupt: int = 0
    seconds: float = 0.0


class ResumeFolder:
    """The resumable checkpoints of one arm.

    Args:
        folder: `arms/ARM/resume`.
        fingerprint: Hash of everything that shapes the training; others' checkpoints are removed.
        keep: How many checkpoints stay.
        say: Where warnings go.
    """

    def __init__(
        self, folder: Path, fingerprint: str, keep: int, say: Callable[[str], None]
    ) -> None:
        self.folder, self.fingerprint, self.keep, self.say = folder, fingerprint, keep, say

    def save(self, engine: Any, position: Position, processes: Processes) -> None:
        """Write a checkpoint; all ranks must call this at the same step."""
        tag = f"step-{position.step:08d}"
        target = self.folder / tag
        if processes.is_main:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        processes.barrier()

        def write() -> None:
            engine.save_checkpoint(str(self.folder), tag=tag, save_latest=False)
            own = {**_generators(processes), "batchnorm": _statistics(engine.module)}
            torch.save(own, target / f"rank-{processes.rank}.pt")

        _check_written(write, target)
        processes.barrier()
        if processes.is_main:
            files = sorted(p for p in target.rglob("*") if p.is_file())
            state = {
                "step": position.step,
                "samples": position.samples,
                "corrupt": position.corrupt,
                "seconds": position.seconds,
                "fingerprint": self.fingerprint,
                "world_size": processes.world_size,
                "zero_stage": engine.zero_optimization_stage(),
                "files": {str(p.relative_to(target)): sha256_file(p) for p in files},
            }
            atomic_write(target / STATE, json.dumps(state, indent=1) + "\n")
            self._retire(target)
        processes.barrier()

    def restore(self, engine: Any, processes: Processes) -> Position | None:
        """Load the newest whole checkpoint into the engine; None if there is none.

        Raises:
            UserError: the checkpoint was written by another number of processes under ZeRO.
        """
        chosen = self._newest() if processes.is_main else None
        holder = [str(chosen) if chosen else None]
        if processes.world_size > 1:
            dist.broadcast_object_list(holder, src=0)
        if holder[0] is None:
            return None
        target = Path(holder[0])
        state = json.loads((target / STATE).read_text())
        if state["world_size"] != processes.world_size and state["zero_stage"] > 0:
            raise UserError(
                f"the checkpoint was written by {state['world_size']} processes at ZeRO stage "
                f"{state['zero_stage']}; there are {processes.world_size} now",
                where=str(target),
                todo="resume with as many processes, or train at zero_stage 0",
            )
        engine.load_checkpoint(str(self.folder), tag=target.name)
        own = target / f"rank-{processes.rank}.pt"
        if own.is_file():
            record = torch.load(own, weights_only=False)
            _set_generators(record, processes)
            if state["world_size"] == processes.world_size:
                _set_statistics(engine.module, record["batchnorm"])
        processes.barrier()
        return Position(state["step"], state["samples"], state["corrupt"], state["seconds"])

    def clear(self) -> None:
        """Remove all checkpoints: the arm is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _newest(self) -> Path | None:
        """Return the newest checkpoint that is whole and ours; remove what can never be used."""
        for target in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                state = json.loads((target / STATE).read_text())
            except (OSError, json.JSONDecodeError):
                self.say(f"{target.name} was never finished: passed over")
                shutil.rmtree(target, ignore_errors=True)
                continue
            if state["fingerprint"] != self.fingerprint:
                self.say(f"{target.name} belongs to another configuration or data: removed")
                shutil.rmtree(target, ignore_errors=True)
                continue
            damaged = [
                name
                for name, digest in state["files"].items()
                if not (target / name).is_file() or sha256_file(target / name) != digest
            ]
            if damaged:
                self.say(f"{target.name} is damaged ({damaged[0]}): passed over")
                continue
            return target
        return None

    def _retire(self, newest: Path) -> None:
        """Remove all but the newest `keep` checkpoints."""
        others = [p for p in sorted(self.folder.glob("step-*")) if p != newest]
        for target in others[: max(0, len(others) - self.keep + 1)]:
            shutil.rmtree(target, ignore_errors=True)


def _check_written(write: Callable[[], None], target: Path) -> None:
    """Run `write`; a full disk removes the torn checkpoint and becomes a message."""
    try:
        write()
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) == 28 or "No space left" in str(error)
        full = full or "PytorchStreamWriter failed" in str(error)
        if not full:
            raise
        shutil.rmtree(target, ignore_errors=True)
        raise UserError(
            "no space left for a checkpoint",
            where=str(target.parent),
            todo="free some space and run the same command: it continues from the last checkpoint",
        ) from error


def _generators(processes: Processes) -> dict[str, Any]:
    cuda = processes.device.type == "cuda"
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(processes.device) if cuda else None,
    }


def _set_generators(state: dict[str, Any], processes: Processes) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and processes.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], processes.device)


def _statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a rank's own BatchNorm statistics; DeepSpeed's checkpoint holds rank 0's only."""
    return {
        name: buffer.detach().cpu().clone()
        for name, buffer in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }


@torch.no_grad()
def _set_statistics(module: nn.Module, statistics: dict[str, torch.Tensor]) -> None:
    buffers = dict(module.named_buffers())
    for name, value in statistics.items():
        buffers[name].copy_(value)


@torch.no_grad()
def average_batchnorm(module: nn.Module, processes: Processes) -> None:
    """Replace BatchNorm's running statistics by their mean over ranks.

    DeepSpeed never synchronises buffers: without this every rank would evaluate another model,
    and only rank 0's would be saved.
    """
    if processes.world_size == 1:
        return
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for buffer in filter(torch.is_tensor, (norm.running_mean, norm.running_var)):
                dist.all_reduce(buffer)
                buffer.div_(processes.world_size)
