"""RUN/slurm: which jobs were submitted for which stage (`jobs.json`), scripts, logs, states."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from slurm.attempt import State, read_state
from slurm.errors import SlurmError


class Submitted(BaseModel):
    """One submission of a stage: `slices` is None for a plain job."""

    model_config = ConfigDict(extra="forbid")

    id: str
    slices: list[int] | None = None
    submitted: str = ""
    dependencies: list[str] = []


class Entry(BaseModel):
    """A stage and all jobs that were ever submitted for it, oldest first."""

    model_config = ConfigDict(extra="forbid")

    after: list[str] = []
    after_any: bool = False
    array: int | None = None
    nodes: int = 1
    time: str = ""
    memory: str | None = None
    progress: str | None = None
    total: int | None = None
    done: bool = False
    identity: str = ""
    jobs: list[Submitted] = []

    def latest(self) -> list[tuple[int | None, str]]:
        """Return (slice, job id) of the newest job of every slice; slice None for a plain job."""
        newest: dict[int | None, str] = {}
        for job in self.jobs:
            for part in [None] if job.slices is None else job.slices:
                newest[part] = job.id if part is None else f"{job.id}_{part}"
        return sorted(newest.items(), key=lambda item: -1 if item[0] is None else item[0])


class Ledger(BaseModel):
    """The contents of `RUN/slurm/jobs.json`, in the order of the graph."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    cluster: str = ""
    submitted: str = ""
    stages: dict[str, Entry] = {}


class Folder:
    """The files of a run's submission.

    Args:
        run: Run folder.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run).resolve()
        self.root = self.run / "slurm"
        self.ledger_file = self.root / "jobs.json"

    def plain(self, stage: str) -> str:
        """Return a stage's name as a file name."""
        return re.sub(r"[^A-Za-z0-9_.+-]", "-", stage)

    def script(self, stage: str) -> Path:
        """Return where a stage's job script lies."""
        return self.root / "scripts" / f"{self.plain(stage)}.sbatch"

    def log(self, stage: str, part: int | None, job: str) -> Path:
        """Return the log file of a job: one per job, all its tries one after the other."""
        suffix = "" if part is None else f".{part}"
        return self.root / "logs" / f"{self.plain(stage)}{suffix}-{job.split('_')[0]}.log"

    def state_file(self, stage: str, part: int | None) -> Path:
        """Return where `slurm.attempt` keeps the state of a job or slice."""
        suffix = "" if part is None else f".{part}"
        return self.root / "state" / f"{self.plain(stage)}{suffix}.json"

    def state(self, stage: str, part: int | None) -> State | None:
        """Read the state of a job or slice; None before its first try."""
        return read_state(self.state_file(stage, part))

    def load(self) -> Ledger:
        """Read `jobs.json`; an empty ledger where nothing was submitted yet.

        Raises:
            SlurmError: the file is damaged.
        """
        try:
            return Ledger.model_validate_json(self.ledger_file.read_text())
        except FileNotFoundError:
            return Ledger()
        except ValidationError as error:
            what = f"cannot read the record of jobs: {error.errors()[0]['msg']}"
            raise SlurmError(what, where=str(self.ledger_file), todo="move it away") from None

    def save(self, ledger: Ledger) -> None:
        """Write `jobs.json` so that no reader sees a part of it."""
        self.write(self.ledger_file, json.dumps(ledger.model_dump(), indent=1) + "\n")

    def write(self, path: Path, text: str) -> None:
        """Write a file under its final name only when it is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text)
            temporary.replace(path)
        except OSError as error:
            raise SlurmError(f"cannot write: {error.strerror}", where=str(path)) from error
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second submission of the same run out.

        Raises:
            SlurmError: one is under way, or the folder cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle: Any = (self.root / ".lock").open("w")
        except OSError as error:
            raise SlurmError(f"cannot write: {error.strerror}", where=str(self.root)) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SlurmError(
                    "another submission of this run is under way", where=str(self.run)
                ) from None
            yield
