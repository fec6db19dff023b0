"""Exact resume: what was written is either whole and verified, or passed over with a warning.

    resume/FINGERPRINT/step-00000200/
        DeepSpeed's files (model, optimizer, ZeRO shards) of all ranks
        rank-0.pt    generators and BatchNorm statistics of each rank
        rank-0.json  hashes of what each rank wrote
        average.pt   the running average of the weights, if there is one
        state.json   written last: step, samples, hashes

The fingerprint is of everything that shapes the training: after a change of configuration or data
nothing is mixed up, and nothing lost if the change is taken back.

The loader needs no state of its own: its position is the step (see `data_prep.reader`).
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_prep.errors import UserError
from data_prep.files import atomic_write, sha256_file
from pipeline.train.average import WeightAverage
from pipeline.train.normalisation import set_statistics, statistics
from pipeline.train.processes import Processes
from pipeline.train.writer import FAILED, Writer, captured

STATE = "state.json"
PATIENCE = 600.0  # seconds that rank 0 waits for the other ranks' files


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
        fingerprint: Hash of everything that shapes the training.
        keep: How many checkpoints stay.
        say: Where warnings go.
    """

    def __init__(
        self, folder: Path, fingerprint: str, keep: int, say: Callable[[str], None]
    ) -> None:
        self.folder, self.keep, self.say = folder / fingerprint, keep, say
        self._writer = Writer(PATIENCE)

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its part of a checkpoint."""
        return self._writer.state == FAILED

    def save(
        self,
        engine: Any,
        position: Position,
        processes: Processes,
        average: WeightAverage | None = None,
    ) -> None:
        """Copy the state and begin to write it; all ranks must call this at the same step.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        self.finish(processes)
        target = self.folder / f"step-{position.step:08d}"
        if processes.is_main:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        processes.barrier()
        files = captured(engine, self.folder, target.name)
        own = {**_generators(processes), "batchnorm": statistics(engine.module)}
        if average is not None:
            own["average_batchnorm"] = statistics(average.model)
            if processes.is_main:
                files.append((target / "average.pt", average.state()))
        files.append((target / f"rank-{processes.rank}.pt", own))
        state = {
            **asdict(position),
            "world_size": processes.world_size,
            "zero_stage": engine.zero_optimization_stage(),
        }

        def validate(hashes: dict[str, str]) -> None:
            atomic_write(target / STATE, json.dumps({**state, "files": hashes}, indent=1) + "\n")
            self._retire(target)

        self._writer.start(files, target, processes.rank, validate, processes.world_size)

    def finish(self, processes: Processes) -> None:
        """Wait until the checkpoint under way is written; all ranks must call this.

        Raises:
            UserError: it could not be, on this rank or on another.
        """
        self._writer.wait()
        if processes.any(self.failed):
            self.refuse_failure()

    def wait(self, seconds: float) -> None:
        """Wait so long for the checkpoint under way, without the other ranks: training failed."""
        self._writer.wait(seconds)

    def refuse_failure(self) -> None:
        """Raise the UserError about a checkpoint that could not be written."""
        self._writer.refuse_failure(self.folder)

    def restore(
        self, engine: Any, processes: Processes, average: WeightAverage | None = None
    ) -> Position | None:
        """Load the newest whole checkpoint into engine and average; None if there is none.

        Raises:
            UserError: it was written at another ZeRO stage, or by another number of processes at
                stage 1 or 2, where optimizer states lie in parts.
        """
        chosen = self._newest() if processes.is_main else None
        holder = [str(chosen) if chosen else None]
        if processes.world_size > 1:
            dist.broadcast_object_list(holder, src=0)
        if holder[0] is None:
            return None
        target = Path(holder[0])
        state = json.loads((target / STATE).read_text())
        _refuse_other_parts(target, state, engine.zero_optimization_stage(), processes)
        engine.load_checkpoint(str(self.folder), tag=target.name)
        own = target / f"rank-{processes.rank}.pt"
        if own.is_file():
            record = torch.load(own, weights_only=False)
            _set_generators(record, processes)
            if state["world_size"] == processes.world_size:
                set_statistics(engine.module, record["batchnorm"])
        if average is not None:
            average.load(torch.load(target / "average.pt", weights_only=True))
            if state["world_size"] == processes.world_size:
                set_statistics(average.model, record["average_batchnorm"])
        processes.barrier()
        return Position(state["step"], state["samples"], state["corrupt"], state["seconds"])

    def _newest(self) -> Path | None:
        """Return the newest checkpoint that is whole and ours; remove what can never be used."""
        for target in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                state = json.loads((target / STATE).read_text())
            except (OSError, json.JSONDecodeError):
                self.say(f"{target.name} was never finished: passed over")
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


def _refuse_other_parts(
    target: Path, state: dict[str, Any], stage: int, processes: Processes
) -> None:
    """Refuse a checkpoint whose optimizer states are cut up otherwise than here."""
    if state["zero_stage"] != stage:
        raise UserError(
            f"it was written at ZeRO stage {state['zero_stage']}, this is stage {stage}",
            where=str(target),
            todo=f"set train.zero_stage={state['zero_stage']}, or remove the folder to start anew",
        )
    if stage > 0 and state["world_size"] != processes.world_size:
        raise UserError(
            f"the checkpoint was written by {state['world_size']} processes at ZeRO stage "
            f"{stage}; there are {processes.world_size} now",
            where=str(target),
            todo=f"resume with {state['world_size']} processes (at stage 0 any number will do), "
            "or remove the folder to start anew",
        )


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
