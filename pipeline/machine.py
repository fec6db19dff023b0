"""What this process may use of the machine: cores, memory, GPUs, build locks.

In:  `/proc`, `/sys/fs/cgroup` (below `root`, so that tests can bring their own) and a torch
subprocess.
Out: plain numbers, no judgement; bytes and cores as the kernel will really grant them, control
groups included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 control groups write "no limit" as a number near 2**63


@dataclass(frozen=True)
class Memory:
    """Bytes this process can have."""

    available: int
    total: int
    limited: bool
    """Whether a control group sets the total, not the machine."""


@dataclass(frozen=True)
class Gpus:
    """What torch says of CUDA; `error` when it could not say."""

    names: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    bf16: bool = False
    built_for: str | None = None
    error: str = ""


@dataclass(frozen=True)
class BuildLock:
    """A lock file of a torch extension build."""

    path: Path
    age: float
    """Seconds since it was taken."""
    holder: int | None
    """Process on this machine that has it open."""


def cpu_limit(root: Path = _ROOT) -> float | None:
    """Return the cores that control groups grant, or None without a limit."""
    limits = []
    for folder in _groups(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2
        if quota.isdigit() and period.isdigit():
            limits.append(int(quota) / int(period))
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def cores() -> int:
    """Return the cores this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory(root: Path = _ROOT) -> Memory | None:
    """Return the memory left to this process, or None where the system does not say."""
    fields = dict(_pairs(_text(root / "proc/meminfo")))
    if "MemTotal" not in fields or "MemAvailable" not in fields:
        return None
    total, available = fields["MemTotal"] * 1024, fields["MemAvailable"] * 1024
    limited = False
    for folder in _groups(root, "memory"):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _text(folder / limit_name), _text(folder / used_name)
            if not limit.isdigit() or int(limit) >= _UNLIMITED or int(limit) >= total:
                continue
            cache = dict(_pairs(_text(folder / "memory.stat"))).get(cache_name, 0)
            busy = max(0, int(used) - cache) if used.isdigit() else 0
            total, limited = int(limit), True
            available = max(0, min(available, total - busy))
    return Memory(available, total, limited)


def start_gpu_probe() -> subprocess.Popen[str]:
    """Start a process that asks torch about CUDA, so that this one need not import torch."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROBE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_gpu_probe(probe: subprocess.Popen[str], timeout: float = 60.0) -> Gpus:
    """Wait for the probe, at most `timeout` seconds."""
    try:
        out, err = probe.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        return Gpus(error=f"torch did not import within {timeout:.0f} s")
    lines = out.strip().splitlines()
    if probe.returncode or not lines:
        reasons = err.strip().splitlines()
        return Gpus(error=reasons[-1] if reasons else f"exit code {probe.returncode}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return Gpus(**answer)


_PROBE = """
import json, warnings
warnings.simplefilter("ignore")
import torch
devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
properties = [torch.cuda.get_device_properties(i) for i in devices]
print(json.dumps({
    "names": [p.name for p in properties],
    "memory": [p.total_memory for p in properties],
    "bf16": bool(properties) and torch.cuda.is_bf16_supported(),
    "built_for": torch.version.cuda,
}))
"""


def extensions_folder() -> Path:
    """Return where torch builds its extensions, DeepSpeed's included."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(cache) / "torch_extensions"


def build_locks(folder: Path, root: Path = _ROOT) -> list[BuildLock]:
    """Return the build locks below `folder`.

    The builder keeps its lock file open until it is done, hence a process of ours that has it open
    is at work.
    """
    found = sorted({*folder.glob("*/lock"), *folder.glob("*/*/lock")})
    holders = _holders(root, {path.resolve() for path in found}) if found else {}
    locks = []
    for path in found:
        try:
            age = max(0.0, time.time() - path.stat().st_mtime)
        except FileNotFoundError:
            continue  # the build finished while we looked
        locks.append(BuildLock(path, age, holders.get(path.resolve())))
    return locks


def _holders(root: Path, paths: set[Path]) -> dict[Path, int]:
    holders = {}
    for link in root.glob("proc/[0-9]*/fd/*"):
        try:
            target = Path(os.readlink(link))
        except OSError:
            continue  # another user's process, or one that just ended
        if target in paths:
            holders[target] = int(link.parent.parent.name)
    return holders


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield this process's control group folders, from the innermost outwards."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        unified = number == "0" and not controllers
        if not unified and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if unified else controller)
        inner = top / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))


def _pairs(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            yield words[0], int(words[1])


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
