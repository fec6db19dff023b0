"""Records of a training: `train.jsonl` first; the console and TensorBoard or W&B read the same."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipeline.train.job import Job

Record = dict[str, Any]


class Tracker:
    """Where the records of one training go; on ranks other than 0 nowhere.

    On a terminal a progress bar stays below the console lines.
    """

    def __init__(self, job: Job, step: int, main: bool) -> None:
        self.job, self.main = job, main
        self.log = TrainLog(job.folder / "train.jsonl", step) if main else None
        self.sinks = [SINKS[name](job, step) for name in job.settings.trackers if main]
        self.bar = _bar(job.arm, job.settings.steps, step) if main else None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        for sink in self.sinks:
            sink.close()

    def write(self, record: Record, line: str) -> None:
        """Write a record to all sinks and its line to the console."""
        if self.log is None:
            return
        self.log.write(record)
        for sink in self.sinks:
            sink.write(record)
        if self.bar is not None:
            self.bar.clear()
        self.job.say(line)

    def step(self, done: int) -> None:
        """Move the progress bar."""
        if self.bar is not None:
            self.bar.update(done - self.bar.n)


def _bar(arm: str, steps: int | None, step: int) -> Any:
    """Return a progress bar, None where nobody watches."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(total=steps, initial=step, desc=arm, unit="step", leave=False, dynamic_ncols=True)


class _TensorBoard:
    """Event files in `arms/ARM/tensorboard`; a resumed run hides what it takes again."""

    def __init__(self, job: Job, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _absent("tensorboard", error) from error
        self.writer = SummaryWriter(str(job.folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """A W&B run named after run folder and arm; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, job: Job, step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _absent("wandb", error) from error
        name = f"{job.folder.parent.parent.name}/{job.arm}"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "inherclip"),
            name=name,
            id=f"{name}-{job.fingerprint}".replace("/", "-"),
            resume="allow",  # the same training after an interruption is the same run
            dir=str(job.folder),
            config=job.settings.model_dump(mode="json"),
        )

    def write(self, record: Record) -> None:
        self.run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self.run.finish()


SINKS: dict[str, Callable[[Job, int], Any]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


def _absent(package: str, error: ImportError) -> UserError:
    return UserError(
        f"{package} is asked for and not installed ({error})",
        where="train.trackers",
        todo=f"pip install inherclip[{package}], or take it out of the list",
    )


def _numbers(record: Record) -> dict[str, float]:
    return {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}


def memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process so far, in GB: the GPU's, or else resident."""
    if device.type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


class TrainLog:
    """`train.jsonl`: a line per logged step, exact across interruptions.

    Args:
        path: The file; lines after `step` are dropped, since those steps will be run again.
        step: The step that training (re)starts after.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(path) if line["step"] <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, record: Record) -> None:
        """Append one record."""
        with self.path.open("a") as handle:
            handle.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[Record]:
    """Return the records of a `train.jsonl`; a last line that was cut off is dropped."""
    records = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


class Rates:
    """Samples per second and the share of time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.started, self.waited, self.samples = time.perf_counter(), 0.0, 0

    def add(self, samples: int, waited: float) -> None:
        """Count one step's global samples and its seconds of waiting for data."""
        self.samples += samples
        self.waited += waited

    def read(self) -> dict[str, float]:
        """Return the interval's rates and start a new one."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        rates = {
            "samples_per_s": round(self.samples / seconds, 2),
            "data_wait": round(self.waited / seconds, 4),
        }
        self.reset()
        return rates


def console_line(arm: str, record: Record, steps: int, started: float, first: int) -> str:
    """Return a record as one line for people: step, loss terms, rates, remaining time."""
    done = record["step"] - first
    elapsed = time.perf_counter() - started
    remaining = elapsed / max(done, 1) * (steps - record["step"])
    terms = [
        f"{name.removeprefix('loss/')} {value:.3f}"
        for name, value in record.items()
        if name.startswith("loss/")
    ]
    parts = [
        f"{arm} {record['step']}/{steps}",
        f"loss {record['loss']:.3f}" + (f" ({', '.join(terms)})" if len(terms) > 1 else ""),
        f"lr {record['lr']:.1e}",
        f"scale {record['scale']:.1f}",
    ]
    if record.get("grad_norm") is not None:
        parts.append(f"grad {record['grad_norm']:.2f}")
    parts += [
        f"{record['samples_per_s']:.0f} samples/s",
        f"data wait {record['data_wait']:.0%}",
        f"{record['memory_gb']:.1f} GB",
        f"ETA {duration(remaining)}",
    ]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Return seconds as `1 h 05 min`, `3 min 20 s` or `12 s`."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    if seconds >= 60:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds} s"


Say = Callable[[str], None]
