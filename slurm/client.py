"""The SLURM commands: called with argument lists, their output parsed, their absence explained."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slurm.errors import SlurmError

_TIMEOUT = 60
_HELP = (
    "run this on a login node of the cluster, load its SLURM module, or try it on this machine "
    "with slurm/local_cluster.sh start; `inherclip run` needs no SLURM, `--dry-run` neither"
)
ACTIVE = (
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
)


@dataclass(frozen=True)
class JobInfo:
    """What SLURM says of one job or array element.

    Attributes:
        state: `PENDING`, `RUNNING`, `COMPLETED`, `FAILED`, `TIMEOUT`, ... without what follows it.
        reason: Why it waits or failed, in SLURM's word; empty where there is none.
        elapsed: Run time as SLURM prints it.
        nodes: Node list.
        restarts: How often it was requeued, -1 where unknown.
    """

    state: str
    reason: str = ""
    elapsed: str = ""
    nodes: str = ""
    restarts: int = -1

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE


def is_here(program: str = "sbatch") -> bool:
    """Whether a SLURM command is installed."""
    return shutil.which(program) is not None


def is_reachable() -> bool:
    """Whether SLURM is installed and its controller answers."""
    if not is_here() or not is_here("scontrol"):
        return False
    result = call(["scontrol", "ping"])
    return result.returncode == 0 and " is UP" in result.stdout


def require() -> None:
    """Make sure that jobs can be submitted from here.

    Raises:
        SlurmError: SLURM is not installed, or no controller answers.
    """
    if not is_here():
        raise SlurmError("there is no SLURM here (sbatch not found)", todo=_HELP)
    if not is_reachable():
        raise SlurmError(
            "SLURM's commands are here, but no controller answers",
            todo="see `scontrol ping`: is the controller up, is SLURM_CONF right? For a cluster on "
            "this machine: slurm/local_cluster.sh start",
        )


def call(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a SLURM command.

    Raises:
        SlurmError: it is not installed, or does not answer within a minute.
    """
    try:
        return subprocess.run(
            list(command), input=text, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"there is no SLURM here ({command[0]} not found)", todo=_HELP) from None
    except subprocess.TimeoutExpired:
        what = f"{command[0]} did not answer in {_TIMEOUT} s"
        raise SlurmError(what, todo="look at the controller with `scontrol ping`") from None


def sbatch(script: str, *options: str) -> str:
    """Submit a script file and return the job id.

    Raises:
        SlurmError: SLURM refuses the job.
    """
    result = call(["sbatch", "--parsable", *options, script])
    if result.returncode != 0:
        raise refusal(result, script)
    return result.stdout.strip().split(";")[0]


def refusal(result: subprocess.CompletedProcess[str], where: str) -> SlurmError:
    """Explain why SLURM refused."""
    text = (result.stderr or result.stdout).strip()
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in text.splitlines()]
    what = "; ".join(dict.fromkeys(lines)) or f"exit code {result.returncode}"
    todo = "check partition, account, limits and resources in the cluster profile (`sinfo -l`)"
    if "contact" in what or "configuration source" in what or "Connection refused" in what:
        todo = "is the controller up (`scontrol ping`), is SLURM_CONF right?"
    return SlurmError(f"SLURM refuses: {what}", where=where, todo=todo)


def test_only(text: str) -> str:
    """Let sbatch check a script without submitting it; returns its answer.

    Raises:
        SlurmError: SLURM would refuse the job.
    """
    result = call(["sbatch", "--test-only"], text=text)
    if result.returncode != 0:
        raise refusal(result, "sbatch --test-only")
    return re.sub(r"^sbatch: ", "", (result.stderr or result.stdout).strip())


def queue() -> dict[str, JobInfo]:
    """Return what the controller remembers of all jobs, by id (`12`, `12_3`).

    Raises:
        SlurmError: no SLURM here, or no controller.
    """
    result = call(["squeue", "-h", "-r", "-a", "-t", "all", "-o", "%i|%A|%T|%r|%M|%N"])
    if result.returncode != 0:
        raise refusal(result, "squeue")
    found: dict[str, JobInfo] = {}
    for line in result.stdout.splitlines():
        shown, raw, state, reason, elapsed, nodes = line.split("|")
        reason = "" if reason == "None" else reason
        found[shown] = found[raw] = JobInfo(state, reason, elapsed, nodes)
    return found


def accounting(ids: Iterable[str]) -> dict[str, JobInfo] | None:
    """Return what the accounting knows of jobs, by id; None where there is no accounting."""
    wanted = ",".join(sorted(set(ids)))
    fields = "JobID,State,Reason,Elapsed,NodeList"
    if not wanted or not is_here("sacct"):
        return None if wanted else {}
    result = call(["sacct", "-n", "-P", "--array", "-j", wanted, f"--format={fields}"])
    if result.returncode != 0:
        return None
    found: dict[str, JobInfo] = {}
    for line in result.stdout.splitlines():
        shown, state, reason, elapsed, nodes = line.split("|")
        job, _, step = shown.partition(".")
        word = state.split(" ")[0].rstrip("+")
        if step and word == "OUT_OF_MEMORY" and job in found:
            found[job] = JobInfo(word, "", found[job].elapsed, found[job].nodes)
        elif not step:
            reason = "" if reason == "None" else reason
            found[job] = JobInfo(word, reason, elapsed, nodes)
    return found


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs.

    Raises:
        SlurmError: SLURM refuses.
    """
    wanted = list(ids)
    if wanted:
        result = call(["scancel", *wanted])
        if result.returncode != 0:
            raise refusal(result, "scancel")
