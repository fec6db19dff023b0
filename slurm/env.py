"""SLURM's variables to those of torch.distributed; then the task's command.

`srun python -m slurm.env -- COMMAND ...` is what every task of a job runs. Standard library only:
it may run in a container or with another interpreter than the command.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

RESUME_ME = 75
_PORTS = range(20_000, 32_000)  # below Linux's range of ports for outgoing connections
_SHOWN = re.compile(r"(RANK|WORLD_SIZE|LOCAL_\w+|MASTER_\w+|OMP_\w+|NCCL_\w+|TORCH_NCCL_\w+)\Z")


def first_host(nodelist: str) -> str:
    """Return the first name of a SLURM node list, such as `gpu[007-009,12],login1`.

    Raises:
        ValueError: the list is empty or its brackets do not match.
    """
    name, depth = "", 0
    for character in nodelist:
        if character == "," and depth == 0:
            break
        depth += {"[": 1, "]": -1}.get(character, 0)
        name += character
    if not name or depth != 0:
        raise ValueError(f"{nodelist!r} is no SLURM node list")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name)


def master_port(environ: Mapping[str, str]) -> int:
    """Return a port that differs between jobs and between the starts of one job."""
    number = int(environ["SLURM_JOB_ID"]) + 7919 * int(environ.get("SLURM_RESTART_COUNT", "0"))
    return _PORTS[number % len(_PORTS)]


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def distributed_environment(
    environ: Mapping[str, str], resolves: Callable[[str], bool] = _resolves
) -> dict[str, str]:
    """Derive the variables of torch.distributed from those of a SLURM task.

    What is set already (in the cluster profile) is kept, apart from the ranks.

    Args:
        environ: The task's environment.
        resolves: Whether a host name has an address.

    Raises:
        KeyError: this is no task of a SLURM job.
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    host = first_host(nodes)
    if not resolves(host) and "SLURM_LAUNCH_NODE_IPADDR" in environ:
        # Nodes without a name of their own, as in a cluster on one machine: srun runs on the first.
        host = environ["SLURM_LAUNCH_NODE_IPADDR"]
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")
    derived = {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": per_node.split("(")[0].split(",")[0],
    }
    defaults = {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(master_port(environ)),
        "OMP_NUM_THREADS": environ.get("SLURM_CPUS_PER_TASK", "1"),
    }
    return derived | {name: environ.get(name, value) for name, value in defaults.items()}


def _run(command: Sequence[str], environ: dict[str, str]) -> int:
    """Run the command; return its code, or 0 with a mark left behind when it wants to go on.

    srun ends all tasks when one of them exits with another code than 0. Tasks that have saved
    leave at slightly different times, so a 75 must not look like a failure to srun.
    """
    # SLURM signals every process of a task. This one stays, and the command starts out ignoring
    # USR1 until it has its own handler, so that a signal during its imports does not kill it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        child = subprocess.Popen(command, env=environ)
    except OSError as error:
        print(f"slurm.env: cannot start {command[0]!r}: {error.strerror}", file=sys.stderr)
        return 127
    code = child.wait()
    if code == RESUME_ME:
        if environ["RANK"] == "0" and "INHERCLIP_STATE" in environ:
            Path(environ["INHERCLIP_STATE"] + ".saved").write_text(environ["SLURM_JOB_ID"] + "\n")
        return 0
    return 128 - code if code < 0 else code


def main(argv: Sequence[str] | None = None) -> int:
    """Set up the environment of a task and run its command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--"]:
        arguments = arguments[1:]
    if not arguments:
        print("usage: srun python -m slurm.env -- COMMAND [ARGUMENT ...]", file=sys.stderr)
        return 2
    if "SLURM_PROCID" not in os.environ:
        print("slurm.env: not a task of a SLURM job (start it with srun)", file=sys.stderr)
        return 2
    environ = {**os.environ, **distributed_environment(os.environ)}
    if environ["RANK"] == "0":
        shown = " ".join(f"{k}={v}" for k, v in sorted(environ.items()) if _SHOWN.match(k))
        print(f"slurm.env: {shown}", file=sys.stderr, flush=True)
    return _run(arguments, environ)


if __name__ == "__main__":
    sys.exit(main())
