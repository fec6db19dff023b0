"""What is said about a submitted run: states, progress, reasons; with and without SLURM."""

import argparse
import json
from pathlib import Path

import pytest

from slurm import client, commands, status
from slurm.attempt import State, write_state
from slurm.errors import SlurmError
from slurm.jobs import ClusterProfile, Resources, Stage
from slurm.ledger import Entry, Folder
from slurm.status import (
    JobStatus,
    Reader,
    broken_arms,
    exception_in,
    explain,
    last_line,
    stage_states,
    table,
)
from slurm.submit import submit_graph
from tests.slurm.conftest import Fake

BEGIN = "slurm.attempt: 2026-11-22 14:08:45 train:a, job 28, try {}, node n0\n"
TRACEBACK = """Traceback (most recent call last):
  File "x.py", line 3, in <module>
    raise ValueError("the loss is nan")
ValueError: the loss is nan
srun: error: n0: task 0: Exited with exit code 1
slurm.attempt: crashed with code 1
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BEGIN.format(1) + TRACEBACK, "ValueError: the loss is nan"),
        (
            BEGIN.format(1) + TRACEBACK + BEGIN.format(2) + "step 3\n",
            "",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried\n", "torch.OutOfMemoryError: CUDA"),
        ("inherclip: data: no shards\n  -> prepare them\n", "inherclip: data: no shards"),
        ("KeyboardInterrupt\n", "KeyboardInterrupt"),
        ("slurm.env: RANK=0 MASTER_PORT=1\n", ""),
        ("slurm.env: cannot start 'x': No such file\n", "slurm.env: cannot start 'x'"),
        ("all is well\nError rates fell\n", ""),
        ("", ""),
    ],
)
def test_exception_in_a_log(text: str, found: str) -> None:
    assert exception_in(text)[: len(found) or None] == found


def test_last_line_is_the_programs_own() -> None:
    text = "step 10\rstep 20\rstep 30\nslurmstepd: error: x\nsrun: y\n\nslurm.attempt: z\n"
    assert last_line(text) == "step 30"
    assert last_line("srun: only noise\n") == ""


ENTRY = Entry(memory="16G", time="04:00:00")
STARTED = State(state="running", starts=1, job="1")


@pytest.mark.parametrize(
    ("word", "reason", "state", "text", "said"),
    [
        ("OUT_OF_MEMORY", "", STARTED, "", "out of memory (asked for 16G)"),
        ("FAILED", "", STARTED, "slurmstepd: error: Detected 1 oom_kill event", "out of memory"),
        ("FAILED", "", STARTED, "RuntimeError: DefaultCPUAllocator: can't allocate", "out of mem"),
        ("TIMEOUT", "TimeLimit", STARTED, "", "time limit of 04:00:00 reached"),
        ("NODE_FAIL", "", STARTED, "", "a node failed (n0)"),
        ("CANCELLED", "", STARTED, "", "cancelled"),
        ("CANCELLED", "", None, "", "cancelled before it started"),
        ("FAILED", "", STARTED, TRACEBACK, "ValueError: the loss is nan"),
        ("FAILED", "", State(code=7, starts=1), "hm\n", "exit code 7"),
        (
            "FAILED",
            "",
            State(state="crash_loop", note="stopped after 3 tries without progress", starts=4),
            TRACEBACK,
            "stopped after 3 tries without progress; ValueError: the loss is nan",
        ),
    ],
)
def test_reasons(word: str, reason: str, state: State | None, text: str, said: str) -> None:
    info = client.JobInfo(word, reason, "1:00", "n0")
    assert explain(word, info, state, text, ENTRY).startswith(said)


def a_run(run: Path) -> Path:
    wanted = Resources(time="02:00:00", memory="1G")
    progress = run / "arms" / "a" / "train.jsonl"
    stages = [
        Stage("prepare", ["p"], wanted, array=2),
        Stage("train:a", ["t"], wanted, after=["prepare"], progress=progress, total=100),
        Stage("train:b", ["t"], wanted, after=["prepare"]),
        Stage("compare", ["c"], wanted, after=["train:a", "train:b"], after_any=True),
    ]
    submit_graph(stages, ClusterProfile(name="cpu"), run, say=lambda _: None)
    return run


def log(run: Path, stage: str, job: str, text: str) -> None:
    Folder(run).write(Folder(run).log(stage, None, job), text)


def states(run: Path) -> dict[str, str]:
    found = Reader(run).read()[1]
    return {j.stage + ("" if j.slice is None else f"[{j.slice}]"): j.state for j in found}


def test_states_from_the_queue(tmp_path: Path, fake: Fake) -> None:
    run = a_run(tmp_path)
    fake.set("101", slices={"0": "COMPLETED", "1": "RUNNING"})
    fake.set("103", state="FAILED")
    assert states(run) == {
        "prepare[0]": "done",
        "prepare[1]": "running",
        "train:a": "waiting",
        "train:b": "failed",
        "compare": "waiting",
    }


def test_progress_rate_and_eta(tmp_path: Path, fake: Fake) -> None:
    run = a_run(tmp_path)
    fake.set("102", state="RUNNING")
    lines = [{"step": s, "seconds": s / 4} for s in range(10, 50, 10)]
    lines += [{"step": s, "seconds": (s - 40) / 2} for s in range(50, 70, 10)]  # resumed
    file = run / "arms" / "a" / "train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_state(
        Folder(run).state_file("train:a", None), State(state="running", job="102", starts=3)
    )
    (job,) = (job for job in Reader(run).read()[1] if job.stage == "train:a")
    assert (job.step, job.total, job.restarts) == (60, 100, 2)
    assert 2.0 <= job.steps_per_s <= 4.0
    assert job.eta_seconds == pytest.approx(40 / job.steps_per_s)


@pytest.mark.parametrize("gone", [False, True])
def test_long_after_slurm_forgot_the_run_folder_still_knows(
    gone: bool, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    folder = Folder(run)
    for part in (0, 1):
        write_state(folder.state_file("prepare", part), State(state="done", job=f"101_{part}"))
    write_state(
        folder.state_file("train:a", None), State(state="failed", job="102", code=1, starts=2)
    )
    log(run, "train:a", "102", BEGIN.format(2) + TRACEBACK)
    for number in fake.jobs:
        fake.set(number, state="GONE")
    if gone:
        monkeypatch.setenv("PATH", "/nowhere")
    jobs = {job.stage: job for job in Reader(run).read()[1]}
    assert jobs["prepare"].state == "done"
    assert (jobs["train:a"].state, jobs["train:a"].restarts) == ("failed", 1)
    assert jobs["train:a"].reason == "ValueError: the loss is nan"
    assert jobs["train:b"].state == "unknown"


def test_state_of_an_earlier_submission_is_not_believed(tmp_path: Path, fake: Fake) -> None:
    run = a_run(tmp_path)
    write_state(Folder(run).state_file("train:b", None), State(state="done", job="55"))
    assert states(run)["train:b"] == "waiting"


def test_successor_is_shown_in_place_of_its_predecessor(tmp_path: Path, fake: Fake) -> None:
    run = a_run(tmp_path)
    fake.set("102", state="COMPLETED")
    write_state(
        Folder(run).state_file("train:a", None),
        State(state="saved", job="104", chain=["102"], starts=1),
    )
    fake.set("104", state="RUNNING")
    jobs = {job.stage: job for job in Reader(run).read()[1]}
    assert (jobs["train:a"].job, jobs["train:a"].state) == ("104", "running")


def test_worst_slice_counts_for_the_stage(tmp_path: Path, fake: Fake) -> None:
    run = a_run(tmp_path)
    fake.set("101", slices={"0": "COMPLETED", "1": "CANCELLED"})
    assert stage_states(run)["prepare"] == ("cancelled", "cancelled before it started")
    assert stage_states(tmp_path / "elsewhere") == {}


def test_what_never_started_names_its_cause(tmp_path: Path, fake: Fake) -> None:
    stages = [
        Stage("train:a", ["t"]),
        Stage("evaluate:a", ["e"], after=["train:a"]),
        Stage("publish:a", ["p"], after=["evaluate:a"]),
    ]
    submit_graph(stages, ClusterProfile(), tmp_path, say=lambda _: None)
    fake.set("101", state="FAILED")
    fake.set("102", state="CANCELLED")
    fake.set("103", state="CANCELLED")
    reasons = {job.stage: job.reason for job in Reader(tmp_path).read()[1]}
    assert reasons["evaluate:a"] == "never started: train:a failed"
    assert reasons["publish:a"] == "never started: evaluate:a was cancelled"


def test_broken_arms_for_the_table(tmp_path: Path, fake: Fake) -> None:
    run = a_run(tmp_path)
    assert broken_arms(run) == {}
    fake.set("102", state="CANCELLED")
    fake.set("103", state="TIMEOUT")
    assert broken_arms(run) == {
        "a": ("cancelled", "train:a: cancelled before it started"),
        "b": ("failed", "train:b: time limit of 02:00:00 reached"),
    }
    assert broken_arms(tmp_path / "elsewhere") == {}


def test_table_is_narrow_where_there_is_nothing_to_say() -> None:
    ledger = Folder("/nowhere").load()
    ledger.cluster = "cpu"
    jobs = [
        JobStatus("prepare", 0, "1_0", "done", elapsed="1:00"),
        JobStatus("train:a", None, "2", "running", step=30, total=90, steps_per_s=2.0, line="hi"),
        JobStatus("train:b", None, "3", "failed", "ValueError: no", restarts=2),
    ]
    lines = table("runs/x", ledger, jobs).splitlines()
    assert lines[2:6] == [
        "stage        job  state    progress  steps/s  ETA      restarts  time",
        "prepare [0]  1_0  done                                           1:00",
        "train:a      2    running  30/90     2.00     0:00:30",
        "train:b      3    failed                               2",
    ]
    assert lines[-2:] == ["train:a: hi", "train:b: ValueError: no"]
    assert status.summary(jobs) == "1 done, 1 running, 1 failed"


def call(name: str, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    getattr(commands, f"add_{name}_arguments")(parser)
    return int(getattr(commands, f"run_{name}")(parser.parse_args(arguments)))


def test_status_command(tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path)
    assert call("status", str(run)) == 0
    assert "5 waiting" in capsys.readouterr().out
    fake.set("103", state="FAILED")
    assert call("status", str(run), "--json") == 1
    assert json.loads(capsys.readouterr().out)["jobs"][3]["state"] == "failed"


def test_watch_ends_when_everything_has_ended(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path)
    for number in fake.jobs:
        fake.set(number, state="COMPLETED")
    assert call("status", str(run), "--watch", "1") == 0
    assert "5 done" in capsys.readouterr().out


def test_cancel_one_arm_or_all(
    tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path)
    assert call("cancel", str(run), "a") == 0
    assert fake.calls[-1] == "scancel 102"
    assert call("cancel", str(run)) == 0
    assert fake.calls[-1] == "scancel 101_0 101_1 103 104"
    assert call("cancel", str(run)) == 0
    assert capsys.readouterr().out.endswith("nothing waits or runs\n")


def test_logs_of_an_arm(tmp_path: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path)
    log(run, "train:a", "102", "".join(f"line {i}\n" for i in range(100)))
    assert call("logs", str(run), "train:a", "-n", "3") == 0
    out = capsys.readouterr().out
    assert out.endswith("line 97\nline 98\nline 99\n")
    assert call("logs", str(run), "b") == 0
    assert "no log yet" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["status", "cancel", "logs"])
def test_what_was_never_submitted(name: str, tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match="nothing was submitted"):
        call(name, str(tmp_path))


@pytest.mark.parametrize("name", ["cancel", "logs"])
def test_unknown_arm_names_the_stages(name: str, tmp_path: Path, fake: Fake) -> None:
    with pytest.raises(SlurmError, match=r"no stage or arm 'z'(.|\n)*train:a"):
        call(name, str(a_run(tmp_path)), "z")


def test_help_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, slurm.commands; heavy = {'torch', 'pydantic', 'yaml', 'jinja2', 'rich'};"
        "assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
