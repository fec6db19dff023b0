"""A job in, the text of its sbatch script out: pure, readable, and everything quoted."""

from __future__ import annotations

import re
import shlex
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from slurm.jobs import ClusterProfile, Job

_TEMPLATES = Path(__file__).resolve().parent / "templates"
CHECKOUT = Path(__file__).resolve().parent.parent
_SLICE = re.compile(r"(\{slices?\})")
_CONTROL = re.compile(r"[\x01-\x1f\x7f]")
_PLAIN = re.compile(r"[A-Za-z0-9_.+:@=/,%&|*\[\]()-]*")


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    return environment.from_string((_TEMPLATES / "job.sbatch.j2").read_text())


def directive(name: str, value: object) -> str:
    """Write an option for an `#SBATCH` line by the rules of sbatch's own parser.

    That parser is no shell: it knows quotes, a backslash, and `#` for a comment.
    """
    text = str(value)
    if not _PLAIN.fullmatch(text):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"--{name}={text}"


def quote(text: str) -> str:
    """Quote for bash; control characters are spelled out, as sbatch refuses carriage returns."""
    if not _CONTROL.search(text):
        return shlex.quote(text)
    spelled = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\\", "\\\\"))
    return "$'" + spelled.replace("'", "\\'") + "'"


def argument(text: str, job: Job) -> str:
    """Quote one argument for bash; in an array, `{slice}` and `{slices}` are filled in."""
    if job.array is None or not _SLICE.search(text):
        return quote(text)
    parts = {"{slice}": '"$SLURM_ARRAY_TASK_ID"', "{slices}": str(job.array_size)}
    return "".join(parts.get(piece) or quote(piece) for piece in _SLICE.split(text) if piece)


def ranges(numbers: tuple[int, ...]) -> str:
    """Write slice numbers the way `--array` wants them: `0-3,7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def escape_pattern(path: str) -> str:
    """Protect `%` in a path from SLURM's replacement of `%j` and its like."""
    return path.replace("%", "%%")


def directives(job: Job, cluster: ClusterProfile) -> list[str]:
    """Return the options of a job for its `#SBATCH` lines, in a fixed order."""
    wanted = job.resources
    gpus = (
        f"{cluster.gpu_type}:{wanted.gpus_per_node}" if cluster.gpu_type else wanted.gpus_per_node
    )
    array = None
    if job.array is not None:
        array = ranges(job.array) + (f"%{cluster.array_limit}" if cluster.array_limit else "")
    options: list[tuple[str, object | None]] = [
        ("job-name", job.job_name),
        ("partition", wanted.partition or cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("constraint", wanted.constraint or cluster.constraint),
        ("nodes", wanted.nodes),
        ("ntasks-per-node", wanted.tasks_per_node),
        ("cpus-per-task", wanted.cpus_per_task),
        ("gpus-per-node", gpus if wanted.gpus_per_node else None),
        ("mem", wanted.memory),
        ("time", wanted.time),
        ("output", job.log),
        ("open-mode", "append"),
        # USR1 reaches the tasks, not this script, that long before the time limit.
        ("signal", f"USR1@{cluster.signal_seconds}" if job.resumable else None),
        ("array", array),
        ("dependency", ",".join(job.dependencies) or None),
        ("kill-on-invalid-dep", "yes" if job.dependencies else None),
    ]
    flags = ["--requeue" if cluster.requeue else "--no-requeue"]
    if wanted.exclusive:
        flags.append("--exclusive")
    return [directive(name, value) for name, value in options if value is not None] + flags


def _launch(job: Job, cluster: ClusterProfile) -> str:
    """Return the options of srun: a failing task ends the others, cores are bound."""
    options = ["--kill-on-bad-exit=1"]
    if job.resources.cpus_per_task:
        # Since SLURM 22.05 srun no longer takes this over from the job.
        options.append(f"--cpus-per-task={job.resources.cpus_per_task}")
    if cluster.cpu_bind != "none":
        options.append(f"--cpu-bind={cluster.cpu_bind}")
    if cluster.container and cluster.container.engine == "pyxis":
        options.append(shlex.quote(f"--container-image={cluster.container.image}"))
        if cluster.container.mounts:
            mounts = [m if ":" in m else f"{m}:{m}" for m in cluster.container.mounts]
            options.append(shlex.quote("--container-mounts=" + ",".join(mounts)))
    return " ".join(options)


def _command(job: Job, cluster: ClusterProfile, python: str) -> str:
    words = []
    if cluster.container and cluster.container.engine == "apptainer":
        words = ["apptainer", "exec"] + (["--nv"] if job.resources.gpus_per_node else [])
        for mount in cluster.container.mounts:
            words += ["--bind", mount]
        words.append(cluster.container.image)
    words += [python, "-m", "slurm.env", "--"]
    return " ".join([shlex.join(words), *(argument(word, job) for word in job.command)])


def _exports(job: Job, cluster: ClusterProfile) -> dict[str, str]:
    state = shlex.quote(job.state)
    if job.array is not None:
        state += '."$SLURM_ARRAY_TASK_ID"'
    values = {
        "PYTHONUNBUFFERED": "1",
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **cluster.environment,
        **job.environment,
    }
    exports = {name: shlex.quote(value) for name, value in values.items()}
    # A checkout need not be installed where the job runs.
    exports["PYTHONPATH"] = shlex.quote(str(CHECKOUT)) + '"${PYTHONPATH:+:$PYTHONPATH}"'
    if job.resources.cpus_per_task and "OMP_NUM_THREADS" not in values:
        exports["OMP_NUM_THREADS"] = str(job.resources.cpus_per_task)
    exports["INHERCLIP_STATE"] = state
    exports["INHERCLIP_STAGE"] = shlex.quote(job.name)
    exports["INHERCLIP_SCRIPT"] = shlex.quote(job.script)
    exports["INHERCLIP_RESUMABLE"] = "1" if job.resumable else "0"
    exports["INHERCLIP_REQUEUE"] = "1" if cluster.requeue else "0"
    exports["INHERCLIP_MAX_TRIES"] = str(cluster.max_tries)
    if job.progress:
        exports["INHERCLIP_PROGRESS"] = shlex.quote(job.progress)
    return exports


def render(job: Job, cluster: ClusterProfile, python: str) -> str:
    """Return the sbatch script of a job.

    Args:
        job: What to run.
        cluster: Where to run it.
        python: Interpreter to use where the profile names none.
    """
    interpreter = cluster.python or python
    title = (
        f"{job.name} on {cluster.name}" + (" after " if job.after else "") + ", ".join(job.after)
    )
    return _template().render(
        title=f"{title}; submit by hand: sbatch {shlex.quote(job.script)}",
        directives=directives(job, cluster),
        modules=[shlex.quote(module) for module in cluster.modules],
        venv=shlex.quote(f"{cluster.venv}/bin/activate") if cluster.venv else None,
        folder=shlex.quote(job.folder),
        exports=_exports(job, cluster),
        python=shlex.quote(interpreter),
        srun=_launch(job, cluster),
        command=_command(job, cluster, interpreter),
    )
