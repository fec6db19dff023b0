"""What became of a submitted run: each stage's state, progress, and the reason of a failure.

Sources, the first that knows wins: the state that the job itself wrote (done), the queue, the
accounting, the state that the job wrote (failed, saved). So it also works long after SLURM has
forgotten the jobs, and where there is no accounting.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from slurm import client
from slurm.attempt import State, last_record
from slurm.errors import SlurmError
from slurm.ledger import Entry, Folder, Ledger

NOT_STARTED = "cancelled before it started"
_TAIL = 32_768
_OUT_OF_MEMORY = re.compile(
    r"oom[-_ ]kill|out of memory|OutOfMemoryError|exceeded (job )?memory limit"
    r"|Cannot allocate memory|DefaultCPUAllocator: can't allocate|std::bad_alloc|\bMemoryError\b",
    re.IGNORECASE,
)
_EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Fault|Stop\w*))(:.*)?$")
_EXPLAINED = re.compile(r"^(inherclip|error|slurm\.env): .+", re.IGNORECASE)
_NOISE = re.compile(r"^(slurm\.(attempt|env):|srun: |slurmstepd|\s*$)")
_WORDS = {
    "PENDING": "waiting",
    "CONFIGURING": "waiting",
    "REQUEUED": "waiting",
    "REQUEUE_HOLD": "held",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SUSPENDED": "suspended",
    "COMPLETED": "done",
    "CANCELLED": "cancelled",
    "PREEMPTED": "preempted",
}


@dataclass(frozen=True)
class JobStatus:
    """One job, or one slice of an array.

    Attributes:
        stage: Name of the stage.
        slice: Number of the slice, None for a plain job.
        job: Id of its newest job, empty when none was submitted.
        state: `done`, `running`, `waiting`, `failed`, `cancelled`, `not submitted`, `unknown`, ...
        reason: Why it failed or waits; empty where there is nothing to say.
        elapsed: Run time as SLURM prints it.
        nodes: Where it runs or ran.
        restarts: Starts after the first one.
        step: Last logged step, -1 where there is none.
        total: Steps in all, where known.
        steps_per_s: Rate over the last logged steps, 0 where unknown.
        line: Last line of its log.
    """

    stage: str
    slice: int | None
    job: str
    state: str
    reason: str = ""
    elapsed: str = ""
    nodes: str = ""
    restarts: int = 0
    step: int = -1
    total: int | None = None
    steps_per_s: float = 0.0
    line: str = ""

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last step at the present rate; None where unknown."""
        if self.state != "running" or self.total is None or self.steps_per_s <= 0:
            return None
        return max(0, self.total - self.step) / self.steps_per_s


def tail(path: Path) -> str:
    """Return the end of a log, empty where there is none."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, path.stat().st_size - _TAIL))
            return handle.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def last_line(text: str) -> str:
    """Return the last line that the command itself wrote."""
    lines = [line for part in text.splitlines() if (line := part.split("\r")[-1].rstrip())]
    own = [line for line in lines if not _NOISE.match(line)]
    return (own or [""])[-1].strip()


def exception_in(text: str) -> str:
    """Return the message of the last try's failure: an exception's line or an explained fault."""
    # Only what the last try wrote: the log holds all of them.
    text = re.split(r"^slurm\.attempt: .*, try \d+, .*$", text, flags=re.MULTILINE)[-1]
    found = ""
    for line in text.splitlines():
        if (_EXCEPTION.match(line) and not line.startswith("torch.distributed")) or (
            _EXPLAINED.match(line) and not line.startswith("slurm.env: MASTER")
        ):
            found = line
    if "slurm.env: " in found and "cannot start" not in found:
        found = ""
    return found[:300]


def explain(
    word: str, info: client.JobInfo | None, state: State | None, text: str, e: Entry
) -> str:
    """Say in one sentence why a job ended badly."""
    message = exception_in(text)
    if word == "OUT_OF_MEMORY" or _OUT_OF_MEMORY.search(text.rsplit(", try ", 1)[-1]):
        asked = f" (asked for {e.memory})" if e.memory else ""
        return f"out of memory{asked}" + (f": {message}" if message else "")
    if word == "TIMEOUT":
        return f"time limit of {e.time} reached"
    if word == "NODE_FAIL":
        return "a node failed" + (f" ({info.nodes})" if info and info.nodes else "")
    if word == "CANCELLED":
        started = state is not None and state.starts > 0
        return "cancelled" if started else NOT_STARTED
    if state is not None and state.note and state.state in ("crash_loop", "failed"):
        return state.note + (f"; {message}" if message else "")
    if message:
        return message
    if state is not None and state.code not in (None, 0):
        return f"exit code {state.code}"
    return ""


def _rate(path: Path) -> float:
    """Steps per second over the last logged records of the present try."""
    records = []
    for line in tail(path).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record and "seconds" in record:
            records.append((float(record["seconds"]), int(record["step"])))
    rate = 0.0
    for (t0, s0), (t1, s1) in pairwise(records[-10:]):
        if t1 > t0 and s1 > s0:  # a resumed training begins its clock anew
            fresh = (s1 - s0) / (t1 - t0)
            rate = fresh if rate == 0 else 0.7 * rate + 0.3 * fresh
    return rate


class Reader:
    """Reads the status of a run.

    Args:
        run: Run folder.

    Raises:
        SlurmError: nothing was submitted from it.
    """

    def __init__(self, run: str | Path) -> None:
        self.folder = Folder(run)
        self.reachable = True
        if not self.folder.ledger_file.is_file():
            raise SlurmError(
                "nothing was submitted from this run folder",
                where=str(run),
                todo="submit it with `inherclip submit CONFIG --cluster NAME`",
            )

    def read(self) -> tuple[Ledger, list[JobStatus]]:
        """Return the ledger and the status of every job, in the order of the graph."""
        ledger = self.folder.load()
        queue: dict[str, client.JobInfo] = {}
        # An unreachable SLURM is no fault here: the run folder knows most of it.
        self.reachable = client.is_reachable()
        books: dict[str, client.JobInfo] | None = {}
        if self.reachable:
            queue = client.queue()
            books = client.accounting({name.split("_")[0] for name in self._ids(ledger)})
        found: list[JobStatus] = []
        broken: dict[str, str] = {}
        for stage, entry in ledger.stages.items():
            for part, job in entry.latest() or [(None, "")]:
                one = self._one(stage, entry, part, job, queue, books or {})
                blocked = next((name for name in entry.after if name in broken), None)
                if one.reason == NOT_STARTED and blocked and not entry.after_any:
                    one = replace(one, reason=f"never started: {blocked} {broken[blocked]}")
                if one.state in ("failed", "cancelled", "preempted"):
                    was = "was " if one.state == "cancelled" else ""
                    broken[stage] = f"{was}{one.state}"
                found.append(one)
        return ledger, found

    def _ids(self, ledger: Ledger) -> set[str]:
        names = {job for entry in ledger.stages.values() for _, job in entry.latest()}
        for stage, entry in ledger.stages.items():
            for part, _ in entry.latest():
                state = self.folder.state(stage, part)
                if state is not None:
                    names.add(state.job)
        return names

    def _one(
        self,
        stage: str,
        entry: Entry,
        part: int | None,
        job: str,
        queue: dict[str, client.JobInfo],
        books: dict[str, client.JobInfo],
    ) -> JobStatus:
        state = self.folder.state(stage, part)
        if state is not None and job not in (state.job, *state.chain):
            state = None  # of an earlier submission
        name = state.job if state is not None else job  # a successor may have taken over
        log = self.folder.log(stage, part, name)
        text = tail(log if log.is_file() else self.folder.log(stage, part, job))
        info = queue.get(name)
        if info is None or not info.is_active:
            info = books.get(name) or info
        word = self._word(entry, job, info, state)
        reason = ""
        if word == "waiting" and info is not None:
            reason = "" if info.reason in ("Dependency", "Priority") else info.reason
            if state is not None and state.starts:
                reason = "requeued, starts again soon" if not reason else f"requeued; {reason}"
        elif word not in ("done", "running", "waiting", "not submitted"):
            reason = explain(info.state if info else "", info, state, text, entry)
        step, rate = -1, 0.0
        if entry.progress:
            last = last_record(Path(entry.progress)).get("step", -1)
            step = last if isinstance(last, int) else -1
            rate = _rate(Path(entry.progress))
        return JobStatus(
            stage=stage,
            slice=part,
            job=name,
            state=word,
            reason=reason,
            elapsed=info.elapsed if info else "",
            nodes=info.nodes if info else (state.node if state else ""),
            restarts=max(0, state.starts - 1) if state else 0,
            step=step,
            total=entry.total,
            steps_per_s=rate,
            line=last_line(text),
        )

    @staticmethod
    def _word(entry: Entry, job: str, info: client.JobInfo | None, state: State | None) -> str:
        if state is not None and state.state == "done":
            return "done"
        if not job:
            return "done" if entry.done else "not submitted"
        if info is not None and (info.is_active or state is None or info.state != "COMPLETED"):
            return _WORDS.get(info.state, "failed")
        if entry.done:
            return "done"
        if state is not None:
            return {"running": "unknown", "crash_loop": "failed"}.get(state.state, state.state)
        return "unknown"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def table(run: str, ledger: Ledger, jobs: list[JobStatus], width: int = 120) -> str:
    """Lay the status out as text: a line per job, what failed and why below."""
    head = ("stage", "job", "state", "progress", "steps/s", "ETA", "restarts", "time", "nodes")
    rows = [head]
    for job in jobs:
        done = f"{max(job.step, 0)}/{job.total}" if job.total and job.step >= 0 else ""
        rows.append(
            (
                job.stage + ("" if job.slice is None else f" [{job.slice}]"),
                job.job or "-",
                job.state,
                done,
                f"{job.steps_per_s:.2f}" if job.state == "running" and job.steps_per_s else "",
                _clock(job.eta_seconds),
                str(job.restarts) if job.restarts else "",
                job.elapsed,
                job.nodes if job.nodes != "None assigned" else "",
            )
        )
    used = [i for i in range(len(head)) if i < 3 or any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in used]
    lines = [f"{run} on {ledger.cluster}, submitted {ledger.submitted}", ""]
    lines += [
        "  ".join(row[i].ljust(w) for i, w in zip(used, widths, strict=True)).rstrip()
        for row in rows
    ]
    remarks = [(j, j.reason or (j.line if j.state == "running" else "")) for j in jobs]
    remarks = [(job, text) for job, text in remarks if text]
    if remarks:
        lines.append("")
    for job, text in remarks:
        name = job.stage + ("" if job.slice is None else f" [{job.slice}]")
        lines.append(f"{name}: {text}"[:width])
    return "\n".join(lines)


def summary(jobs: list[JobStatus]) -> str:
    """Count the jobs by state, in one line."""
    counts: dict[str, int] = {}
    for job in jobs:
        counts[job.state] = counts.get(job.state, 0) + 1
    return ", ".join(f"{number} {state}" for state, number in counts.items())


def stage_states(run: str | Path) -> dict[str, tuple[str, str]]:
    """Return {stage: (state, reason)} of a submitted run, {} where nothing was submitted.

    For an array the worst slice counts. This is how a table can say that an arm was cancelled.
    """
    if not Folder(run).ledger_file.is_file():
        return {}
    worst = ("failed", "cancelled", "preempted", "unknown", "held", "not submitted", "waiting")
    found: dict[str, tuple[str, str]] = {}
    for job in Reader(run).read()[1]:
        present = found.get(job.stage)
        order = {state: rank for rank, state in enumerate(reversed(worst), 1)}
        if present is None or order.get(job.state, 0) > order.get(present[0], 0):
            found[job.stage] = (job.state, job.reason)
    return found


def broken_arms(run: str | Path) -> dict[str, tuple[str, str]]:
    """Return {arm: (`failed` or `cancelled`, reason)}, by the stages `VERB:ARM` of a run.

    The first stage of an arm that went wrong counts; what never started because of it does not.
    """
    found: dict[str, tuple[str, str]] = {}
    for stage, (state, reason) in stage_states(run).items():
        arm = stage.partition(":")[2]
        if arm and arm not in found and state in ("failed", "cancelled", "preempted"):
            word = "cancelled" if state == "cancelled" else "failed"
            found[arm] = (word, f"{stage}: {reason}" if reason else stage)
    return found


def as_json(run: str, ledger: Ledger, jobs: list[JobStatus]) -> str:
    """Return the status as JSON for other programs."""
    record = {
        "run": run,
        "cluster": ledger.cluster,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "jobs": [{**asdict(job), "eta_seconds": job.eta_seconds} for job in jobs],
    }
    return json.dumps(record, indent=1)
