"""SLURM's variables to torch.distributed's, and what the launcher makes of exit codes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.env import distributed_environment, first_host, master_port

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_CPUS_PER_TASK": "12",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n0", "n0"),
        ("n[0-1]", "n0"),
        ("gpu[007-009,12]", "gpu007"),
        ("a1,b2", "a1"),
        ("rack[2-3]n[05,7]-ib", "rack2n05-ib"),
        ("node-a[3],node-b[1-2]", "node-a3"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ",", "n[0-1"])
def test_no_node_list(nodelist: str) -> None:
    with pytest.raises(ValueError, match="node list"):
        first_host(nodelist)


def test_environment_of_a_task() -> None:
    assert distributed_environment(TASK, lambda _: True) == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "24711",
        "OMP_NUM_THREADS": "12",
    }


def test_nodes_without_an_address_use_the_one_that_launched() -> None:
    assert distributed_environment(TASK, lambda _: False)["MASTER_ADDR"] == "10.0.0.7"


def test_what_the_profile_says_wins() -> None:
    said = {"MASTER_ADDR": "here", "MASTER_PORT": "1", "OMP_NUM_THREADS": "3", "RANK": "77"}
    found = distributed_environment({**TASK, **said}, lambda _: True)
    assert {**found, "RANK": "77"} == found | said
    assert found["RANK"] == "9", "ranks are SLURM's to give"


def test_ports_differ_between_jobs_and_starts_and_stay_below_the_ephemeral_range() -> None:
    ports = [
        master_port({"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(start)})
        for job in range(1000, 1050)
        for start in range(5)
    ]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 32_768 for port in ports)


def launch(tmp_path: Path, *code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    local = {**TASK, "SLURM_JOB_NODELIST": "localhost", "SLURM_PROCID": "0"}
    return subprocess.run(
        [sys.executable, "-m", "slurm.env", "--", *code],
        env={**os.environ, **local, "INHERCLIP_STATE": str(tmp_path / "state"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (1, 1), (2, 2), (75, 0)])
def test_exit_codes(code: int, seen: int, tmp_path: Path) -> None:
    """75 must not look like a failure: srun would kill the ranks that still save."""
    result = launch(tmp_path, "sh", "-c", f"exit {code}")
    assert result.returncode == seen
    assert (tmp_path / "state.saved").exists() == (code == 75)
    assert "RANK=0" in result.stderr
    assert "MASTER_ADDR=localhost" in result.stderr


def test_only_rank_0_leaves_the_mark_and_a_line(tmp_path: Path) -> None:
    result = launch(tmp_path, "sh", "-c", "exit 75", SLURM_PROCID="3")
    assert result.returncode == 0
    assert not (tmp_path / "state.saved").exists()
    assert result.stderr == ""


def test_death_by_a_signal_is_told_like_a_shell_does(tmp_path: Path) -> None:
    assert launch(tmp_path, "sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_missing_program_is_one_line(tmp_path: Path) -> None:
    result = launch(tmp_path, "/no/such/program")
    assert result.returncode == 127
    assert "cannot start '/no/such/program'" in result.stderr
    assert "Traceback" not in result.stderr


def test_usr1_before_the_command_listens_does_not_kill_it(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive')"
    assert launch(tmp_path, sys.executable, "-c", code).stdout == "alive\n"


def test_outside_of_a_job() -> None:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    result = subprocess.run(
        [sys.executable, "-m", "slurm.env", "--", "true"],
        env=plain,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "start it with srun" in result.stderr
