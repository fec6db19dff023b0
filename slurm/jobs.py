"""What a job is: resources, cluster profiles, stages. Values are checked here and nowhere else.

Everything that ends up in a directive of a job script must match a narrow pattern; everything that
ends up in a shell command is quoted by `slurm.render`. No value can therefore become a command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from slurm.errors import SlurmError

PROFILES = Path(__file__).resolve().parent.parent / "configs" / "clusters"
RESUME_ME = 75  # EX_TEMPFAIL: the exit code of a command that has saved and wants to go on

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


def _matching(pattern: str, meaning: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(f"{value!r} is no {meaning}")
        return value

    return AfterValidator(check)


def _one_line(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError(f"{value!r} has a line break or another control character")
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("a NUL character cannot be passed to a program")
    return value


Word = Annotated[
    str, _matching(r"[A-Za-z0-9_][A-Za-z0-9_.+:@=/-]*", "plain word (letters, digits, _.+:@=/-)")
]
StageName = Annotated[
    str,
    _matching(r"[A-Za-z0-9_][A-Za-z0-9_.+:-]{0,99}", "job name (letters, digits, _.+:- , 100)"),
]
Constraint = Annotated[str, _matching(r"[A-Za-z0-9_.&|*\[\],()-]+", "constraint like `a100&ib`")]
Memory = Annotated[str, _matching(r"(0|[1-9][0-9]*[KMGT]?)", "memory size like 64G")]
Duration = Annotated[
    str,
    _matching(
        r"(\d+-\d{1,2}(:[0-5]\d){0,2}|\d{1,4}:[0-5]\d:[0-5]\d|\d{1,5}:[0-5]\d|[1-9]\d{0,6})",
        "duration like 04:00:00, 1-12:00:00 or minutes",
    ),
]
VariableName = Annotated[str, _matching(r"[A-Za-z_][A-Za-z0-9_]*", "name of a variable")]
Line = Annotated[str, AfterValidator(_one_line)]
Argument = Annotated[str, AfterValidator(_no_nul)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Resources(_Strict):
    """What one job asks for; `None` leaves the choice to the cluster.

    Attributes:
        nodes: Number of nodes.
        tasks_per_node: Processes per node; with GPUs usually one per GPU.
        cpus_per_task: Cores per process.
        gpus_per_node: GPUs per node.
        memory: Memory per node, such as `64G`; `0` is all of it.
        time: Time limit; a training may take longer, it is then continued.
        partition: Other partition than the cluster's.
        constraint: Node features asked for, other than the cluster's.
        exclusive: Ask for whole nodes.
    """

    nodes: int = Field(default=1, ge=1, le=10_000)
    tasks_per_node: int = Field(default=1, ge=1, le=1024)
    cpus_per_task: int | None = Field(default=None, ge=1, le=1024)
    gpus_per_node: int = Field(default=0, ge=0, le=64)
    memory: Memory | None = None
    time: Duration = "01:00:00"
    partition: Word | None = None
    constraint: Constraint | None = None
    exclusive: bool = False


class Container(_Strict):
    """A container image to run the tasks in.

    Attributes:
        image: Image file or reference.
        engine: `pyxis` (srun --container-image) or `apptainer`.
        mounts: Folders visible inside, `HOST` or `HOST:INSIDE`.
    """

    image: Line
    engine: Annotated[str, _matching("pyxis|apptainer", "engine: pyxis or apptainer")] = "pyxis"
    mounts: tuple[Annotated[Line, _matching(r"[^,]+", "mount without a comma")], ...] = ()


class ClusterProfile(_Strict):
    """How jobs are written for one cluster; `configs/clusters/NAME.yaml`.

    Attributes:
        name: Name for messages.
        partition: Default partition.
        account: Account to charge.
        qos: Quality of service.
        constraint: Node features asked for by all jobs.
        gpu_type: Type in `--gpus-per-node=TYPE:N`.
        modules: Environment modules to load.
        venv: Virtual environment to activate; not needed where `python` is an absolute path.
        python: Interpreter of job and tasks (default: the one that submits).
        container: Run the tasks in a container.
        environment: Variables exported to every job.
        requeue: Whether the site lets jobs be requeued; if not, a job submits its successor.
        signal_seconds: How long before the time limit a training is told to save.
        max_tries: Starts of a job without progress after which it stops.
        array_limit: Slices of an array that run at once.
        cpu_bind: What tasks are bound to, `none` where the cluster has no binding.
        resources: Resources by kind of stage; `default` where a kind is missing.
    """

    name: Word = "generic"
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Constraint | None = None
    gpu_type: Word | None = None
    modules: tuple[Word, ...] = ()
    venv: Line | None = None
    python: Line | None = None
    container: Container | None = None
    environment: dict[VariableName, Line] = {}
    requeue: bool = True
    signal_seconds: int = Field(default=120, ge=1, le=65_535)
    max_tries: int = Field(default=5, ge=1, le=1000)
    array_limit: int | None = Field(default=None, ge=1)
    cpu_bind: Word = "cores"
    resources: dict[Word, Resources] = {}

    def for_kind(self, kind: str) -> Resources:
        """Return the resources of a kind of stage, such as `train`."""
        return self.resources.get(kind) or self.resources.get("default") or Resources()


class Job(_Strict):
    """Everything that one job script says.

    Attributes:
        name: Name of the stage.
        job_name: Name that SLURM shows.
        command: Program and arguments. Inside an array `{slice}` in an argument stands for the
            number of the slice and `{slices}` for how many there are.
        resources: What it asks for.
        folder: Where the command runs; an absolute path.
        log: Log file, absolute, with SLURM's patterns such as `%j`.
        state: File in which tries are counted (without `.json`), absolute.
        script: Where the script itself lies, for a successor.
        array: The slices to run, or None for a plain job.
        array_size: How many slices there are in all.
        after: Names of the stages it waits for, for the reader.
        dependencies: `afterok:12:13`, `afterany:14`.
        resumable: The command saves on USR1 and then exits with 75; it is continued.
        progress: JSON-lines file whose last `step` tells progress.
        environment: Variables in addition to the cluster's.
    """

    name: StageName
    job_name: StageName
    command: tuple[Argument, ...] = Field(min_length=1)
    resources: Resources = Resources()
    folder: Line
    log: Line
    state: Line
    script: Line
    array: tuple[int, ...] | None = None
    array_size: int = 1
    after: tuple[StageName, ...] = ()
    dependencies: tuple[
        Annotated[str, _matching(r"(afterok|afterany)(:\d+(_\d+)?)+", "dependency")], ...
    ] = ()
    resumable: bool = False
    progress: Line | None = None
    environment: dict[VariableName, Line] = {}


@dataclass(frozen=True)
class Stage:
    """A node of the graph to submit.

    Attributes:
        name: Unique name, for example `train:student`.
        command: Program and arguments (see `Job.command` for arrays).
        resources: What it asks for.
        after: Names of the stages it waits for.
        after_any: Start also when these failed or were cancelled.
        array: Number of slices, or None for a plain job.
        done: Tells whether its result is there already.
        slice_done: The same for one slice; without it the recorded end of the slice's job counts.
        resumable: The command saves on USR1 and exits with 75, then it is continued.
        progress: JSON-lines file with a `step` per line, for progress and the crash-loop guard.
        total: Number of steps in all.
        environment: Variables in addition to the cluster's.
        identity: Changes with what shapes the result; work of another identity counts as not done,
            and jobs of an earlier submission with another identity are replaced.
    """

    name: str
    command: Sequence[str]
    resources: Resources = field(default_factory=Resources)
    after: Sequence[str] = ()
    after_any: bool = False
    array: int | None = None
    done: Callable[[], bool] = lambda: False
    slice_done: Callable[[int], bool] | None = None
    resumable: bool = False
    progress: Path | None = None
    total: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    identity: str = ""


def explain(error: ValidationError, where: str) -> SlurmError:
    """Turn all faults of a pydantic validation into one message."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        text = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            text = "unknown key"
        lines.append(f"{key}: {text}" if key else text)
    what = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} faults", *lines])
    return SlurmError(what, where=where)


def load_cluster(name: str) -> ClusterProfile:
    """Read a cluster profile: a name from `configs/clusters`, or a YAML file.

    Raises:
        SlurmError: no such profile, or a fault in it (all faults at once).
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in PROFILES.glob("*.yaml"))
        raise SlurmError(
            f"no cluster profile {name!r}",
            where=str(path),
            todo=f"take one of {', '.join(known)}, or the path of a YAML file of your own",
        )
    try:
        content = yaml.safe_load(path.read_text()) or {}
        return ClusterProfile.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise explain(error, str(path)) from None
    except (yaml.YAMLError, TypeError) as error:
        raise SlurmError(f"not a YAML mapping: {error}", where=str(path)) from None
