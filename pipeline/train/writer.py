"""Checkpoints written beside the training: the state is copied, files follow in a thread."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from data_prep.errors import UserError
from data_prep.files import atomic_write, sha256_file

IDLE, BUSY, FAILED = 0, 1, 2
Files = list[tuple[Path, Any]]


class _Catch(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine, except that it keeps copies of what it is told to write."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Files = []

    def save(self, state_dict: Any, path: str) -> None:
        self.files.append((Path(path), copied(state_dict)))

    def preserves_storage_sharing(self) -> bool:
        return False


def captured(engine: Any, folder: Path, tag: str) -> Files:
    """Return what DeepSpeed would write for a checkpoint, copied to memory; all ranks take part."""
    before, catch = engine.checkpoint_engine, _Catch()
    engine.checkpoint_engine = catch
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    finally:
        engine.checkpoint_engine = before
    return catch.files


def copied(value: Any) -> Any:
    """Return a structure with every tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((k, copied(v)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value)(copied(v) for v in value)
    return value


class Writer:
    """One checkpoint at a time, written by a thread of each rank.

    Every rank writes its files and then `rank-N.json` with their hashes. When rank 0 sees the
    `rank-N.json` of all, it makes the checkpoint valid. No collective is needed, so a rank that
    fails leaves no other waiting: its checkpoint stays unfinished and is passed over.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None

    @property
    def state(self) -> int:
        """IDLE, BUSY or FAILED."""
        if self._fault is not None:
            return FAILED
        return BUSY if self._thread is not None and self._thread.is_alive() else IDLE

    def start(
        self, files: Files, target: Path, rank: int, validate: Callable[[dict[str, str]], None],
        world_size: int,
    ) -> None:  # fmt: skip
        """Begin to write; `validate` is called on rank 0 with the hashes of all ranks' files."""

        def work() -> None:
            try:
                own = {}
                for path, content in files:
                    torch.save(content, path)
                    own[str(path.relative_to(target))] = sha256_file(path)
                atomic_write(target / f"rank-{rank}.json", json.dumps(own) + "\n")
                if rank == 0:
                    hashes = self._collect(target, world_size)
                    if hashes is not None:
                        validate(hashes)
            except BaseException as error:  # it must reach the training thread, whatever it is
                self._fault = error

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def _collect(self, target: Path, world_size: int) -> dict[str, str] | None:
        """Wait for every rank's list; None where one does not come."""
        hashes: dict[str, str] = {}
        deadline = time.monotonic() + self.patience
        for rank in range(world_size):
            path = target / f"rank-{rank}.json"
            while not path.is_file():
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.05)
            hashes |= json.loads(path.read_text())
        return hashes

    def wait(self, seconds: float | None = None) -> None:
        """Wait until this rank's part is written, or for so long."""
        if self._thread is not None:
            self._thread.join(self.patience if seconds is None else seconds)

    def refuse_failure(self, folder: Path) -> None:
        """Raise what went wrong on this or another rank.

        Raises:
            UserError: writing failed, as on a full disk.
        """
        fault = self._fault
        full = isinstance(fault, OSError | RuntimeError) and (
            getattr(fault, "errno", None) == 28
            or "No space left" in str(fault)
            or "PytorchStreamWriter failed" in str(fault)
        )
        if fault is not None and not full:
            raise fault
        raise UserError(
            "no space left for a checkpoint" if full else "a checkpoint failed on another rank",
            where=str(folder),
            todo="free some space and run the same command: it continues from the last checkpoint",
        ) from fault
