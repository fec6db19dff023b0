"""A graph of stages to SLURM jobs: what is not done is submitted, with its dependencies."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from slurm import client
from slurm.errors import SlurmError
from slurm.jobs import ClusterProfile, Job, Stage, explain
from slurm.ledger import Entry, Folder, Ledger, Submitted
from slurm.render import escape_pattern, ranges, render

Say = Callable[[str], None]


@dataclass
class Planned:
    """What happens to a stage.

    Attributes:
        stage: The stage.
        slices: What has to be submitted of an array, None for a plain job.
        action: `done`, `queued` (a job of an earlier submission is kept) or `submit`.
        waits_for: Ids of jobs that dependents have to wait for; filled while submitting.
        cancel: Jobs of an earlier submission that have to go first.
    """

    stage: Stage
    slices: tuple[int, ...] | None
    action: str
    waits_for: list[str]
    cancel: list[str]


def in_order(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages so that everything comes after what it waits for.

    Raises:
        SlurmError: a name comes twice or is unknown, or stages wait for each other.
    """
    byname: dict[str, Stage] = {}
    for stage in stages:
        if stage.name in byname:
            raise SlurmError("two stages have the same name", where=stage.name)
        byname[stage.name] = stage
    ordered: list[Stage] = []
    while len(ordered) < len(byname):
        placed = {stage.name for stage in ordered}
        ready = [s for s in stages if s.name not in placed and placed >= set(s.after)]
        for stage in stages:
            for name in stage.after:
                if name not in byname:
                    raise SlurmError(f"waits for {name!r}, which is no stage", where=stage.name)
        if not ready:
            stuck = ", ".join(s.name for s in stages if s.name not in placed)
            raise SlurmError("these stages wait for each other in a circle", where=stuck)
        ordered += ready
    return ordered


def _is_changed(stage: Stage, ledger: Ledger) -> bool:
    """Whether an earlier submission had another idea of what the stage makes."""
    entry = ledger.stages.get(stage.name)
    return entry is not None and entry.identity != stage.identity


def _open_slices(stage: Stage, folder: Folder, ledger: Ledger) -> tuple[int, ...]:
    """Return the slices of an array that are not done."""
    changed = _is_changed(stage, ledger)

    def is_done(part: int) -> bool:
        if stage.slice_done is not None:
            return stage.slice_done(part)
        state = folder.state(stage.name, part)
        return not changed and state is not None and state.state == "done"

    return tuple(part for part in range(stage.array or 0) if not is_done(part))


def plan(
    stages: Sequence[Stage], folder: Folder, ledger: Ledger, queue: dict[str, client.JobInfo]
) -> list[Planned]:
    """Decide what to do with every stage.

    A stage is submitted when it is not done, or when something it waits for is submitted now. Jobs
    that wait or run since an earlier submission are kept, unless what they wait for changed.
    """
    plans: dict[str, Planned] = {}
    for stage in in_order(stages):
        fresh = any(plans[name].action == "submit" for name in stage.after)
        slices = None if stage.array is None else _open_slices(stage, folder, ledger)
        if not fresh and stage.done():
            plans[stage.name] = Planned(stage, slices, "done", [], [])
            continue
        if stage.array is not None and (fresh or not slices):
            slices = tuple(range(stage.array))  # done but for the stage's own word: all again
        active = _active_jobs(stage, folder, ledger, queue)
        if active and not fresh and not _is_changed(stage, ledger):
            kept = {part for part, _ in active}
            missing = None if slices is None else tuple(s for s in slices if s not in kept)
            action = "submit" if missing else "queued"
            jobs = [job for _, job in active]
            plans[stage.name] = Planned(stage, missing, action, jobs, [])
            continue
        plans[stage.name] = Planned(stage, slices, "submit", [], [job for _, job in active])
    return list(plans.values())


def _active_jobs(
    stage: Stage, folder: Folder, ledger: Ledger, queue: dict[str, client.JobInfo]
) -> list[tuple[int | None, str]]:
    """Return (slice, job id) of what waits or runs; successors of a job count as the job."""
    entry = ledger.stages.get(stage.name, Entry())
    found = []
    for part, job in entry.latest():
        state = folder.state(stage.name, part)
        newest = state.job if state and job in state.chain else job
        for name in (newest, job):
            info = queue.get(name)
            if info is not None and info.is_active and info.reason != "DependencyNeverSatisfied":
                found.append((part, name))
                break
    return found


def make_job(
    planned: Planned, cluster: ClusterProfile, folder: Folder, where: Path, waits: Sequence[str]
) -> Job:
    """Build the checked job of a planned stage.

    Raises:
        SlurmError: a value that cannot be put into a job script (all of them at once).
    """
    stage = planned.stage
    shown = re.sub(r"[^A-Za-z0-9_.+-]", "_", f"{folder.run.name}")[:40].lstrip(".+-") or "run"
    pattern = folder.log(stage.name, None, "%j")
    if planned.slices is not None:
        pattern = folder.log(stage.name, None, "%A").with_name(
            f"{folder.plain(stage.name)}.%a-%A.log"
        )
    try:
        return Job(
            name=stage.name,
            job_name=f"{shown}-{stage.name}",
            command=tuple(stage.command),
            resources=stage.resources,
            folder=str(where),
            log=f"{escape_pattern(str(pattern.parent))}/{pattern.name}",
            state=str(folder.state_file(stage.name, None).with_suffix("")),
            script=str(folder.script(stage.name)),
            array=planned.slices,
            array_size=stage.array or 1,
            after=tuple(stage.after),
            dependencies=tuple(waits),
            resumable=stage.resumable,
            progress=str(stage.progress.absolute()) if stage.progress else None,
            environment=stage.environment,
        )
    except ValidationError as error:
        raise explain(error, f"job of stage {stage.name!r}") from None


def _dependencies(planned: Planned, plans: dict[str, Planned]) -> list[str]:
    ids = [job for name in planned.stage.after for job in plans[name].waits_for]
    if not ids:
        return []
    return [":".join(["afterany" if planned.stage.after_any else "afterok", *ids])]


def submit_graph(
    stages: Sequence[Stage],
    cluster: ClusterProfile,
    run: str | Path,
    dry_run: bool = False,
    say: Say = print,
    python: str = sys.executable,
    where: str | Path | None = None,
) -> int:
    """Submit what is not done of a graph; what is done, waiting or running is left alone.

    Args:
        stages: The graph.
        cluster: Profile of the cluster.
        run: Run folder; ids, scripts, logs and states go to `RUN/slurm`.
        dry_run: Only print the graph and the scripts; needs no SLURM and writes nothing.
        say: Where the lines of the report go.
        python: Interpreter of the jobs where the profile names none.
        where: Folder in which the commands run (default: the present one).

    Returns:
        0, also when there was nothing to do.

    Raises:
        SlurmError: a faulty graph or value, no SLURM, or a job that SLURM refuses. Jobs submitted
            until then are recorded and stay; the same command submits the rest.
    """
    folder = Folder(run)
    place = Path(where or Path.cwd()).absolute()
    if dry_run:
        return _dry_run(stages, cluster, folder, place, say, python)
    client.require()
    with folder.locked():
        ledger = folder.load()
        plans = plan(stages, folder, ledger, client.queue())
        for planned in plans:  # nothing is submitted when any job is faulty
            make_job(planned, cluster, folder, place, [])
        client.cancel(job for planned in plans for job in planned.cancel)
        ledger.cluster, ledger.submitted = cluster.name, _now()
        ledger.stages = {p.stage.name: _entry(p, ledger) for p in plans}
        folder.save(ledger)
        byname = {planned.stage.name: planned for planned in plans}
        for planned in plans:
            if planned.action == "submit":
                waits = _dependencies(planned, byname)
                job = make_job(planned, cluster, folder, place, waits)
                _submit_one(planned, job, render(job, cluster, python), folder, ledger)
            say(_line(planned, byname))
    if all(planned.action == "done" for planned in plans):
        say("Nothing to submit: every stage is done.")
    else:
        shown = min(os.path.relpath(folder.run), str(folder.run), key=len)
        say(f"\nFollow it with: inherclip status {shlex.quote(shown)} --watch")
    return 0


def _entry(planned: Planned, ledger: Ledger) -> Entry:
    stage = planned.stage
    return Entry(
        after=list(stage.after),
        after_any=stage.after_any,
        array=stage.array,
        nodes=stage.resources.nodes,
        time=stage.resources.time,
        memory=stage.resources.memory,
        progress=str(stage.progress.absolute()) if stage.progress else None,
        total=stage.total,
        done=planned.action == "done",
        identity=stage.identity,
        jobs=ledger.stages.get(stage.name, Entry()).jobs,
    )


def _submit_one(planned: Planned, job: Job, text: str, folder: Folder, ledger: Ledger) -> None:
    """Write the script, submit it and record the id before anything else happens."""
    name = planned.stage.name
    folder.write(folder.script(name), text)
    (folder.root / "logs").mkdir(exist_ok=True)
    for part in planned.slices or [None]:
        folder.state_file(name, part).unlink(missing_ok=True)  # tries are counted from here
    number = client.sbatch(str(folder.script(name)))
    record = Submitted(
        id=number,
        slices=None if planned.slices is None else list(planned.slices),
        submitted=_now(),
        dependencies=list(job.dependencies),
    )
    ledger.stages[name].jobs.append(record)
    folder.save(ledger)
    planned.waits_for.append(number)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _line(planned: Planned, plans: dict[str, Planned]) -> str:
    stage = planned.stage
    text = f"{planned.action:<7} {stage.name}"
    if planned.action == "submit" and planned.slices is not None:
        text += f" [slices {ranges(planned.slices)} of {stage.array}]"
    if planned.waits_for:
        text += f"  job {', '.join(planned.waits_for)}"
    waits = [name for name in stage.after if plans[name].action != "done"]
    if planned.action != "done" and waits:
        text += f"  after {'any end of ' if stage.after_any else ''}{', '.join(waits)}"
    return text


def _dry_run(
    stages: Sequence[Stage],
    cluster: ClusterProfile,
    folder: Folder,
    place: Path,
    say: Say,
    python: str,
) -> int:
    plans = plan(stages, folder, folder.load(), {})
    byname = {planned.stage.name: planned for planned in plans}
    faults: list[str] = []
    reachable = client.is_reachable()
    for planned in plans:
        if planned.action != "submit":
            continue
        try:
            text = render(make_job(planned, cluster, folder, place, []), cluster, python)
        except SlurmError as error:
            faults.append(str(error))
            continue
        say(f"# ---- {folder.script(planned.stage.name)}\n{text}")
        if reachable:
            try:
                say(f"# sbatch --test-only: {client.test_only(text)}\n")
            except SlurmError as error:
                say(f"# sbatch --test-only: {error}\n")
                faults.append(f"{planned.stage.name}: {error.what}")
    say(f"{folder.run} on {cluster.name}:")
    for planned in plans:
        say("  " + _line(planned, byname))
    if not reachable:
        say("(no SLURM controller answers here: the scripts were not shown to sbatch)")
    if faults:
        raise SlurmError("\n  ".join([f"{len(faults)} of the jobs would fail", *faults]))
    return 0
