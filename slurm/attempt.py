"""The begin and the end of every try of a job: counting, crash loops, requeue or successor.

Called by the job script: `python -m slurm.attempt begin`, then the command, then
`python -m slurm.attempt end CODE`. Standard library only; what it needs comes in INHERCLIP_*
variables that the script exports. The state of a job lies in `RUN/slurm/state/STAGE[.SLICE].json`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

RESUME_ME = 75
USER_FAULT = 2
_TAIL = 65_536


@dataclass
class State:
    """What is remembered of a job (or slice) from try to try.

    Attributes:
        state: `running`, `done`, `saved` (goes on later), `failed` or `crash_loop`.
        job: Id of the latest SLURM job.
        chain: Ids of earlier jobs that this one continues.
        starts: Tries in all.
        idle: Tries in a row that began where the one before had begun.
        step: Progress at the begin of the latest try.
        code: Exit code of the latest try.
        started: When the latest try began, seconds since 1970.
        ended: When it ended, 0 while it runs.
        node: Node of the job script.
        note: One sentence for the reader.
    """

    state: str = "running"
    job: str = ""
    chain: list[str] = field(default_factory=list)
    starts: int = 0
    idle: int = 0
    step: int = -1
    code: int | None = None
    started: float = 0.0
    ended: float = 0.0
    node: str = ""
    note: str = ""


def read_state(path: Path) -> State | None:
    """Read a state file; None where there is none."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return State(**{k: v for k, v in record.items() if k in State.__dataclass_fields__})


def write_state(path: Path, state: State) -> None:
    """Write a state file so that no reader sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(state), indent=1) + "\n")
    temporary.replace(path)


def last_record(path: Path) -> dict[str, object]:
    """Return the last whole JSON line of a log, {} where there is none."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, path.stat().st_size - _TAIL))
            lines = handle.read().split(b"\n")
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line being written, or cut at the begin of the tail
        if isinstance(record, dict):
            return record
    return {}


def progress(path: str | None) -> int:
    """Return the last logged step, -1 where nothing is known."""
    step = last_record(Path(path)).get("step", -1) if path else -1
    return step if isinstance(step, int) else -1


def begin(state: State | None, job: str, step: int, limit: int, now: float, node: str) -> State:
    """Count a try; in the result, `state` is `crash_loop` when it must not run.

    A try is idle when it starts no further than the one before it did.
    """
    state = state or State()
    if state.job and state.job != job:
        state.chain = [*state.chain, state.job]
    state.idle = state.idle + 1 if state.starts and step <= state.step else 0
    state.starts += 1
    state.job, state.step, state.started, state.node = job, step, now, node
    state.ended, state.code, state.note, state.state = 0.0, None, "", "running"
    if state.idle >= limit:
        state.state, state.ended = "crash_loop", now
        where = f"at step {step}" if step >= 0 else "before the first logged step"
        state.note = f"stopped after {state.idle} tries without progress ({where})"
    return state


def judge(code: int, saved: bool, resumable: bool) -> str:
    """Return what became of a try: `done`, `saved`, `failed` for good, or `crashed`."""
    if saved:
        return "saved"
    if code == 0:
        return "done"
    return "crashed" if resumable and code != USER_FAULT else "failed"


def own_id(environ: Mapping[str, str]) -> str:
    """Return the id of the job that this process belongs to: `12`, or `12_3` in an array."""
    if "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def _call(*command: str) -> tuple[int, str]:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return result.returncode, (result.stdout if result.returncode == 0 else result.stderr).strip()


def _is_running(job: str) -> bool:
    """Whether SLURM means this job to go on: one that is being cancelled must not come back."""
    code, text = _call("scontrol", "show", "job", "-o", job)
    return code == 0 and "JobState=RUNNING" in text


def _requeue(job: str) -> str:
    """Ask SLURM to start this job again; returns why not, or does not return."""
    code, text = _call("scontrol", "requeue", job)
    if code != 0:
        return text
    time.sleep(120)  # SLURM ends this script within seconds
    return "requeued, but still running after two minutes"


def dependents(ledger: Mapping[str, object], stage: str) -> list[tuple[str, str]]:
    """Return (job id, `afterok` or `afterany`) of the jobs that wait for a stage."""
    found: list[tuple[str, str]] = []
    stages = ledger.get("stages")
    for entry in stages.values() if isinstance(stages, dict) else []:
        if stage in entry["after"]:
            kind = "afterany" if entry["after_any"] else "afterok"
            found += [(job["id"], kind) for job in entry["jobs"]]
    return found


def _succeed(job: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """Submit a successor and make the jobs that wait for this one wait for it too.

    Returns:
        (id of the successor, "") or ("", why not).
    """
    command = ["sbatch", "--parsable", f"--dependency=afterany:{job}"]
    if "SLURM_ARRAY_TASK_ID" in environ:
        command.append(f"--array={environ['SLURM_ARRAY_TASK_ID']}")
    code, text = _call(*command, environ["INHERCLIP_SCRIPT"])
    if code != 0:
        return "", text
    successor = text.split(";")[0]
    if "SLURM_ARRAY_TASK_ID" in environ:
        successor += f"_{environ['SLURM_ARRAY_TASK_ID']}"
    ledger = Path(environ["INHERCLIP_STATE"]).parent.parent / "jobs.json"
    record = json.loads(ledger.read_text()) if ledger.is_file() else {}
    for waiting, kind in dependents(record, environ["INHERCLIP_STAGE"]):
        code, text = _call("scontrol", "show", "job", "-o", waiting)
        match = re.search(r"JobState=PENDING .*?Dependency=(\S+)", text)
        if code != 0 or match is None:
            continue  # it is no longer waiting
        present = re.sub(r"\(\w+\)", "", match[1])
        earlier = "" if present == "(null)" or not present else present + ","
        change = f"Dependency={earlier}{kind}:{successor}"
        code, text = _call("scontrol", "update", f"JobId={waiting}", change)
        if code != 0:
            _call("scancel", successor)
            return "", f"job {waiting} cannot be made to wait for the successor: {text}"
    return successor, ""


def _go_on(state: State, path: Path, job: str, environ: Mapping[str, str]) -> int:
    """Have this job continued; the exit code says whether that worked."""
    if not _is_running(job):
        state.note = "not continued: SLURM is ending the job"
        write_state(path, state)
        return RESUME_ME
    why = "the cluster profile says that this site forbids requeue"
    if environ["INHERCLIP_REQUEUE"] == "1":
        state.note = "requeued"
        write_state(path, state)
        print(f"slurm.attempt: {state.state}, requeue of job {job}", flush=True)
        why = _requeue(job)
    print(f"slurm.attempt: no requeue: {why}; submitting a successor", flush=True)
    successor, refusal = _succeed(job, environ)
    if not successor:
        state.state, state.note = "failed", f"cannot be continued: {refusal}; submit the run again"
        write_state(path, state)
        print(f"slurm.attempt: {state.note}", flush=True)
        return RESUME_ME
    state.chain, state.job = [*state.chain, job], successor
    state.note = f"continued by job {successor}"
    write_state(path, state)
    print(f"slurm.attempt: {state.note}", flush=True)
    return 0  # with another code, jobs that wait for success would be cancelled


def run_begin(environ: Mapping[str, str]) -> int:
    """Count this try; exit code 1 when it must not run."""
    path = Path(environ["INHERCLIP_STATE"] + ".json")
    Path(environ["INHERCLIP_STATE"] + ".saved").unlink(missing_ok=True)
    limit, step = int(environ["INHERCLIP_MAX_TRIES"]), progress(environ.get("INHERCLIP_PROGRESS"))
    node = environ.get("SLURMD_NODENAME", "")
    state = begin(read_state(path), own_id(environ), step, limit, time.time(), node)
    write_state(path, state)
    stamp, stage = time.strftime("%Y-%m-%d %H:%M:%S"), environ["INHERCLIP_STAGE"]
    text = f"slurm.attempt: {stamp} {stage}, job {state.job}, try {state.starts}, node {node}"
    print(text + (f", last logged step {step}" if step >= 0 else ""), flush=True)
    if state.state == "crash_loop":
        print(f"slurm.attempt: {state.note}", flush=True)
        return 1
    return 0


def run_end(code: int, environ: Mapping[str, str]) -> int:
    """Write down how a try ended and have it continued where that makes sense."""
    path = Path(environ["INHERCLIP_STATE"] + ".json")
    mark = Path(environ["INHERCLIP_STATE"] + ".saved")
    state = read_state(path) or State()
    job = own_id(environ)
    outcome = judge(code, mark.exists(), environ["INHERCLIP_RESUMABLE"] == "1")
    mark.unlink(missing_ok=True)
    state.code, state.ended = RESUME_ME if outcome == "saved" else code, time.time()
    state.state = "failed" if outcome == "crashed" else outcome
    write_state(path, state)
    print(f"slurm.attempt: {outcome} with code {state.code}", flush=True)
    if outcome == "saved" or (outcome == "crashed" and _worth_a_retry(state, environ)):
        return _go_on(state, path, job, environ)
    return code


def _worth_a_retry(state: State, environ: Mapping[str, str]) -> bool:
    """A crash is tried again unless the next try would be one too many without progress."""
    step = progress(environ.get("INHERCLIP_PROGRESS"))
    idle = state.idle + 1 if step <= state.step else 0
    if idle < int(environ["INHERCLIP_MAX_TRIES"]):
        return True
    print(f"slurm.attempt: crashed {idle} times without progress; giving up", flush=True)
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run `begin` or `end CODE`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["begin"]:
        return run_begin(os.environ)
    if len(arguments) == 2 and arguments[0] == "end" and arguments[1].isdigit():
        return run_end(int(arguments[1]), os.environ)
    print("usage: python -m slurm.attempt begin | end CODE", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
