"""A real two-node SLURM for the tests marked `slurm`, in a folder of its own, on free ports."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm import status
from slurm.jobs import ClusterProfile, Resources, Stage, load_cluster
from slurm.submit import submit_graph

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "local_cluster.sh"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def free_ports(number: int) -> int:
    """First of `number` ports in a row that nobody listens on."""
    for start in range(17_000, 19_900, number):
        sockets = []
        try:
            for port in range(start, start + number):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
            return start
        except OSError:
            continue
        finally:
            for opened in sockets:
                opened.close()
    raise RuntimeError("no free ports")


@dataclass
class Cluster:
    """A running cluster and shorthands for what the tests do with it."""

    folder: Path
    profile: ClusterProfile

    def call(self, *command: str) -> str:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout

    def submit(self, run: Path, *stages: Stage, **profile: object) -> None:
        cluster = self.profile.model_copy(update=profile)
        assert submit_graph(stages, cluster, run, say=lambda _: None) == 0

    def jobs(self, run: Path) -> dict[str, status.JobStatus]:
        _, found = status.Reader(run).read()
        return {j.stage + ("" if j.slice is None else f"[{j.slice}]"): j for j in found}

    def wait(
        self, run: Path, until: Callable[[dict[str, status.JobStatus]], bool], seconds: float = 90
    ) -> dict[str, status.JobStatus]:
        deadline = time.monotonic() + seconds
        while True:
            jobs = self.jobs(run)
            if until(jobs):
                return jobs
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"== {p.name}\n{p.read_text()[-1500:]}"
                    for p in sorted((run / "slurm" / "logs").glob("*"))
                )
                queue = self.call("squeue", "-a", "-t", "all")
                raise AssertionError(f"timed out; {jobs}\n{queue}\n{logs}")
            time.sleep(0.5)

    def wait_end(self, run: Path, seconds: float = 90) -> dict[str, status.JobStatus]:
        moving = ("waiting", "running", "saved", "unknown")
        return self.wait(
            run, lambda jobs: all(j.state not in moving for j in jobs.values()), seconds
        )


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"no SLURM on this machine: {', '.join(missing)} not found")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: Unix sockets lie in it
    command = [str(SCRIPT), "start", str(folder), "--port", str(free_ports(4))]
    # Accounting (sacct) is used where slurmdbd and MariaDB are installed; both ways must work.
    command += ["--accounting", os.environ.get("INHERCLIP_TEST_ACCOUNTING", "auto")]
    before = os.environ.get("SLURM_CONF")
    try:
        started = subprocess.run(command, capture_output=True, text=True, timeout=150)
        assert started.returncode == 0, started.stdout + started.stderr
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        small = Resources(cpus_per_task=1, memory="400M", time="00:10:00")
        profile = load_cluster("local").model_copy(update={"resources": {"default": small}})
        yield Cluster(folder, profile)
    finally:
        subprocess.run([str(SCRIPT), "stop", str(folder)], timeout=120, check=False)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"  # with a space, as users have them
    folder.mkdir()
    return folder


@dataclass
class Fake:
    """The pretended scheduler: its jobs and the calls that it got."""

    home: Path

    @property
    def jobs(self) -> dict[str, dict]:
        store = self.home / "jobs.json"
        return json.loads(store.read_text()) if store.exists() else {}

    @property
    def calls(self) -> list[str]:
        return (self.home / "calls").read_text().splitlines()

    def set(self, number: str, **fields: object) -> None:
        jobs = self.jobs
        jobs[number].update(fields)
        (self.home / "jobs.json").write_text(json.dumps(jobs))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    home = tmp_path / "fake"
    home.mkdir()
    program = Path(__file__).with_name("fake_slurm.py").read_text()
    for name in ("sbatch", "squeue", "scontrol", "scancel", "sacct"):
        (home / name).write_text(f"#!{sys.executable} -S\n{program}")
        (home / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(home))
    return Fake(home)
