"""Tries of a job: what is counted, what is continued, what is given up."""

import json
from pathlib import Path

import pytest

from slurm import attempt
from slurm.attempt import State, begin, dependents, judge, last_record, progress
from tests.slurm.conftest import Fake


@pytest.mark.parametrize(
    ("code", "saved", "resumable", "outcome"),
    [
        (0, False, True, "done"),
        (0, True, True, "saved"),
        (143, True, True, "saved"),  # srun ended ranks that were a moment later than rank 0
        (1, False, True, "crashed"),
        (2, False, True, "failed"),  # an explained fault of the input: no retry mends it
        (1, False, False, "failed"),
    ],
)
def test_judge(code: int, saved: bool, resumable: bool, outcome: str) -> None:
    assert judge(code, saved, resumable) == outcome


def tries(steps: list[int], limit: int) -> list[str]:
    state: State | None = None
    found = []
    for number, step in enumerate(steps):
        state = begin(state, "7", step, limit, float(number), "n0")
        found.append(state.state)
    return found


def test_tries_with_progress_go_on_for_ever() -> None:
    assert set(tries(list(range(0, 1000, 10)), 2)) == {"running"}


def test_tries_without_progress_stop() -> None:
    assert tries([-1, -1, -1, -1], 3) == ["running", "running", "running", "crash_loop"]
    assert tries([-1, 50, 50, 50], 2) == ["running", "running", "running", "crash_loop"]


def test_progress_forgives_idle_tries() -> None:
    assert tries([-1, 10, 10, 20, 20, 30, 30], 2) == ["running"] * 7


def test_crash_loop_says_where() -> None:
    state = begin(begin(None, "7", 12, 1, 0.0, "n0"), "7", 12, 1, 1.0, "n1")
    assert state.note == "stopped after 1 tries without progress (at step 12)"


def test_a_successor_remembers_its_predecessors() -> None:
    state = begin(begin(None, "7", 0, 3, 0.0, "n0"), "9", 5, 3, 1.0, "n1")
    assert (state.job, state.chain, state.starts) == ("9", ["7"], 2)


def test_progress_is_the_last_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    assert progress(str(log)) == -1
    assert progress(None) == -1
    log.write_text('{"step": 10}\n{"step": 20}\n{"ste')
    assert progress(str(log)) == 20
    log.write_text('{"epoch": 1}\n')
    assert progress(str(log)) == -1
    log.write_text('{"step": 3, "text": "' + "x" * 200_000 + '"}\n{"step": 4}\n')
    assert last_record(log) == {"step": 4}


def test_dependents() -> None:
    ledger = {
        "stages": {
            "a": {"after": [], "after_any": False, "jobs": [{"id": "1"}]},
            "b": {"after": ["a"], "after_any": False, "jobs": [{"id": "2"}, {"id": "4"}]},
            "c": {"after": ["b", "a"], "after_any": True, "jobs": [{"id": "3"}]},
        }
    }
    found = dependents(ledger, "a")
    assert found == [("2", "afterok"), ("4", "afterok"), ("3", "afterany")]
    assert dependents({}, "a") == []


@pytest.fixture
def job(tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The surroundings of `attempt` in job 101, which job 102 waits for."""
    monkeypatch.setattr(attempt.time, "sleep", lambda _: None)
    script = tmp_path / "a.sbatch"
    script.write_text("#!/bin/bash\n")
    (fake.home / "jobs.json").write_text(
        json.dumps(
            {
                "101": {"state": "RUNNING", "dependency": "", "array": None, "slices": {}},
                "102": {"state": "PENDING", "dependency": "afterok:101(unfulfilled)"},
            }
        )
    )
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "jobs.json").write_text(
        json.dumps({"stages": {"b": {"after": ["a"], "after_any": False, "jobs": [{"id": "102"}]}}})
    )
    return {
        "INHERCLIP_STATE": str(folder / "state" / "a"),
        "INHERCLIP_STAGE": "a",
        "INHERCLIP_SCRIPT": str(script),
        "INHERCLIP_RESUMABLE": "1",
        "INHERCLIP_REQUEUE": "1",
        "INHERCLIP_MAX_TRIES": "2",
        "SLURM_JOB_ID": "101",
    }


def state_of(job: dict[str, str]) -> dict:
    return json.loads(Path(job["INHERCLIP_STATE"] + ".json").read_text())


def finish(job: dict[str, str], code: int, saved: bool = False) -> int:
    assert attempt.run_begin(job) == 0
    if saved:
        Path(job["INHERCLIP_STATE"] + ".saved").write_text("101\n")
    return attempt.run_end(code, job)


def test_success_is_written_down(job: dict[str, str], fake: Fake) -> None:
    assert finish(job, 0) == 0
    assert state_of(job)["state"] == "done"
    assert not (fake.home / "calls").exists(), "nothing to ask SLURM"


def test_forbidden_requeue_is_said_and_a_successor_submitted(
    job: dict[str, str], fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finish(job, 0, saved=True) == 0
    assert "scontrol requeue 101" in fake.calls
    assert "sbatch --parsable --dependency=afterany:101 " + job["INHERCLIP_SCRIPT"] in fake.calls
    assert fake.jobs["102"]["dependency"] == "afterok:101,afterok:103"
    state = state_of(job)
    assert (state["job"], state["chain"], state["state"]) == ("103", ["101"], "saved")
    assert "no requeue: " in capsys.readouterr().out


def test_refused_successor_fails_the_job_with_advice(job: dict[str, str], fake: Fake) -> None:
    (fake.home / "refuse").write_text(".")
    assert finish({**job, "INHERCLIP_REQUEUE": "0"}, 0, saved=True) == 75
    assert state_of(job)["state"] == "failed"
    assert "Invalid account" in state_of(job)["note"]
    assert "submit the run again" in state_of(job)["note"]


def test_a_job_that_is_being_cancelled_does_not_come_back(job: dict[str, str], fake: Fake) -> None:
    fake.set("101", state="CANCELLED")
    assert finish(job, 0, saved=True) == 75
    assert not any("requeue" in call or "sbatch" in call for call in fake.calls)


def test_explained_fault_is_final(job: dict[str, str], fake: Fake) -> None:
    assert finish(job, 2) == 2
    assert state_of(job)["state"] == "failed"
    assert not (fake.home / "calls").exists()


def test_crashes_are_tried_again_until_the_limit(job: dict[str, str], fake: Fake) -> None:
    job = {**job, "INHERCLIP_REQUEUE": "0"}
    assert finish(job, 1) == 0  # a successor was submitted
    assert finish({**job, "SLURM_JOB_ID": "103"}, 1) == 1
    assert state_of(job)["state"] == "failed"
    assert state_of(job)["starts"] == 2


def test_array_elements_have_their_own_ids(job: dict[str, str], fake: Fake) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "101", "SLURM_JOB_ID": "105"}
    assert finish({**job, **array, "INHERCLIP_REQUEUE": "0"}, 0, saved=True) == 0
    command = "sbatch --parsable --dependency=afterany:101_3 --array=3 "
    assert any(call.startswith(command) for call in fake.calls)
    assert state_of(job)["job"] == "103_3"


@pytest.mark.parametrize("arguments", [[], ["end"], ["end", "x"], ["begin", "1"]])
def test_usage(arguments: list[str]) -> None:
    assert attempt.main(arguments) == 2
