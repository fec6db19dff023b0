"""Records of a training: `train.jsonl` first; the console and TensorBoard or W&B read the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


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
