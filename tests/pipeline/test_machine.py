"""What the kernel grants this process, read from a made-up `/proc` and `/sys`; the GPU probe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import machine

GB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@settings(max_examples=40, deadline=None)
@given(
    inner=st.none() | st.integers(1, 64),
    outer=st.none() | st.integers(1, 64),
    used=st.integers(0, 8),
    cache=st.integers(0, 8),
)
def test_memory_is_what_every_control_group_leaves(
    tmp_path_factory: pytest.TempPathFactory,
    inner: int | None,
    outer: int | None,
    used: int,
    cache: int,
) -> None:
    limits = ["max" if limit is None else str(limit * GB) for limit in (inner, outer)]
    root = write(
        tmp_path_factory.mktemp("root"),
        {
            "proc/meminfo": f"MemTotal: {32 * GB // 1024} kB\nMemAvailable: {20 * GB // 1024} kB",
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/step/memory.max": limits[0],
            "sys/fs/cgroup/job/step/memory.current": str(used * GB),
            "sys/fs/cgroup/job/step/memory.stat": f"anon 1\ninactive_file {cache * GB}",
            "sys/fs/cgroup/job/memory.max": limits[1],
            "sys/fs/cgroup/job/memory.current": "0",
        },
    )
    found = machine.memory(root)
    assert found is not None
    # A group's limit above the machine's 32 GB limits nothing
    busy = max(0, used - cache)
    left = [inner - busy] if inner and inner < 32 else []
    left += [outer] if outer and outer < 32 else []
    assert found.available == max(0, min([20, *left])) * GB
    assert found.limited == bool(left)
    assert found.total == min(32, inner or 32, outer or 32) * GB


def test_version_one_groups_and_cpu_quotas(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": f"MemTotal: {32 * GB // 1024} kB\nMemAvailable: {20 * GB // 1024} kB",
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n0::/b\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(8 * GB),
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": str(3 * GB),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/b/cpu.max": "max 100000",
        },
    )
    assert machine.memory(root) == machine.Memory(5 * GB, 8 * GB, limited=True)
    assert machine.cpu_limit(root) == 1.5
    write(root, {"sys/fs/cgroup/b/cpu.max": "50000 100000"})
    assert machine.cpu_limit(root) == 0.5
    assert machine.cpu_limit(tmp_path / "elsewhere") is None
    assert machine.memory(tmp_path / "elsewhere") is None


def probe(code: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], **pipes)


def test_gpu_probe_that_fails_or_hangs_is_reported() -> None:
    failed = machine.finish_gpu_probe(probe("import nothing_of_this_name"))
    assert "nothing_of_this_name" in failed.error
    assert machine.finish_gpu_probe(probe("raise SystemExit(3)")).error == "exit code 3"
    hanging = probe("import time; time.sleep(60)")
    assert "did not import within 0 s" in machine.finish_gpu_probe(hanging, timeout=0.1).error
    assert hanging.returncode is not None


def test_default_extension_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.extensions_folder() == tmp_path / "torch_extensions"
