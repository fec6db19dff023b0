"""From a graph to jobs: order, dependencies, resubmission; with a pretended scheduler on PATH."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.attempt import State, write_state
from slurm.errors import SlurmError
from slurm.jobs import ClusterProfile, Resources, Stage
from slurm.ledger import Folder
from slurm.submit import in_order, submit_graph
from tests.slurm.conftest import Fake

CLUSTER = ClusterProfile(name="cpu")


def graph(done: set[str]) -> list[Stage]:
    def check(name: str) -> Callable[[], bool]:
        return lambda: name in done

    arms = []
    for arm in ("a", "b"):
        arms.append(Stage(f"train:{arm}", ["t"], after=["verify"], done=check(f"train:{arm}")))
        arms.append(
            Stage(f"evaluate:{arm}", ["e"], after=[f"train:{arm}"], done=check(f"evaluate:{arm}"))
        )
    return [
        Stage("prepare", ["p", "{slice}"], array=4, done=check("prepare")),
        Stage("verify", ["v"], after=["prepare"], done=check("verify")),
        *arms,
        Stage(
            "compare",
            ["c"],
            after=["evaluate:a", "evaluate:b"],
            after_any=True,
            done=check("compare"),
        ),
    ]


def submit(run: Path, stages: list[Stage], **options: object) -> list[str]:
    lines: list[str] = []
    assert submit_graph(stages, CLUSTER, run, say=lines.append, **options) == 0  # type: ignore[arg-type]
    return lines


def newest(run: Path) -> dict[str, str]:
    stages = Folder(run).load().stages
    return {name: entry.jobs[-1].id for name, entry in stages.items() if entry.jobs}


def finish(run: Path, stage: str, part: int | None = None, state: str = "done") -> None:
    write_state(Folder(run).state_file(stage, part), State(state=state, job="101"))


def test_whole_graph_with_its_dependencies(tmp_path: Path, fake: Fake) -> None:
    submit(tmp_path, graph(set()))
    ids = newest(tmp_path)
    waits = {name: fake.jobs[number]["dependency"] for name, number in ids.items()}
    assert waits == {
        "prepare": "",
        "verify": f"afterok:{ids['prepare']}",
        "train:a": f"afterok:{ids['verify']}",
        "train:b": f"afterok:{ids['verify']}",
        "evaluate:a": f"afterok:{ids['train:a']}",
        "evaluate:b": f"afterok:{ids['train:b']}",
        "compare": f"afterany:{ids['evaluate:a']}:{ids['evaluate:b']}",
    }
    assert fake.jobs[ids["prepare"]]["array"] == [0, 1, 2, 3]
    script = Folder(tmp_path).script("verify").read_text()
    assert "--kill-on-invalid-dep=yes" in script
    assert "--kill-on-invalid-dep" not in Folder(tmp_path).script("prepare").read_text()


def test_ledger_records_what_one_asks_in_the_morning(tmp_path: Path, fake: Fake) -> None:
    wanted = Resources(nodes=2, time="10:00:00", memory="4G")
    log = tmp_path / "train.jsonl"
    submit(tmp_path, [Stage("train:a", ["t"], wanted, progress=log, total=500, resumable=True)])
    record = json.loads((tmp_path / "slurm" / "jobs.json").read_text())
    entry = record["stages"]["train:a"]
    assert record["cluster"] == "cpu"
    assert (entry["nodes"], entry["time"], entry["memory"]) == (2, "10:00:00", "4G")
    assert (entry["progress"], entry["total"]) == (str(log), 500)
    assert entry["jobs"][0]["id"] == "101"
    assert entry["jobs"][0]["submitted"].startswith("20")


def test_finished_stages_are_left_alone(tmp_path: Path, fake: Fake) -> None:
    done = {"prepare", "verify", "train:a", "evaluate:a", "train:b"}
    lines = submit(tmp_path, graph(done))
    ids = newest(tmp_path)
    assert set(ids) == {"evaluate:b", "compare"}
    assert fake.jobs[ids["evaluate:b"]]["dependency"] == ""
    assert fake.jobs[ids["compare"]]["dependency"] == f"afterany:{ids['evaluate:b']}"
    assert "done    train:a" in lines


def test_everything_done_submits_nothing(tmp_path: Path, fake: Fake) -> None:
    names = {stage.name for stage in graph(set())}
    assert submit(tmp_path, graph(names))[-1].startswith("Nothing to submit")
    assert fake.jobs == {}


def test_what_depends_on_resubmitted_work_is_done_again(tmp_path: Path, fake: Fake) -> None:
    names = {stage.name for stage in graph(set())} - {"train:b"}
    submit(tmp_path, graph(names))
    assert set(newest(tmp_path)) == {"train:b", "evaluate:b", "compare"}


def test_second_submission_keeps_waiting_and_running_jobs(tmp_path: Path, fake: Fake) -> None:
    submit(tmp_path, graph(set()))
    before = newest(tmp_path)
    fake.set(before["prepare"], state="RUNNING")
    lines = submit(tmp_path, graph(set()))
    assert newest(tmp_path) == before
    assert sum(line.startswith("queued") for line in lines) == 7


def test_failed_slice_is_resubmitted_alone_and_the_rest_waits_for_it(
    tmp_path: Path, fake: Fake
) -> None:
    submit(tmp_path, graph(set()))
    first = newest(tmp_path)
    for part in (0, 1, 3):
        finish(tmp_path, "prepare", part)
    finish(tmp_path, "prepare", 2, "failed")
    for number in fake.jobs:
        fake.set(number, state="GONE")
    lines = submit(tmp_path, graph(set()))
    assert any(line.startswith("submit  prepare [slices 2 of 4]") for line in lines)
    second = newest(tmp_path)
    assert fake.jobs[second["prepare"]]["array"] == [2]
    assert fake.jobs[second["verify"]]["dependency"] == f"afterok:{second['prepare']}"
    assert Folder(tmp_path).load().stages["prepare"].latest() == [
        (0, f"{first['prepare']}_0"),
        (1, f"{first['prepare']}_1"),
        (2, f"{second['prepare']}_2"),
        (3, f"{first['prepare']}_3"),
    ]


def test_failed_slice_beside_running_ones(tmp_path: Path, fake: Fake) -> None:
    """Dependents wait for the slices that still run and for the one submitted anew."""
    submit(tmp_path, graph(set()))
    first = newest(tmp_path)
    finish(tmp_path, "prepare", 0)
    finish(tmp_path, "prepare", 2, "failed")
    slices = {"0": "COMPLETED", "1": "RUNNING", "2": "FAILED", "3": "RUNNING"}
    fake.set(first["prepare"], slices=slices)
    submit(tmp_path, graph(set()))
    second = newest(tmp_path)
    assert fake.jobs[second["prepare"]]["array"] == [2]
    old = first["prepare"]
    expected = f"afterok:{old}_1:{old}_3:{second['prepare']}"
    assert fake.jobs[second["verify"]]["dependency"] == expected
    assert fake.jobs[first["verify"]]["state"] == "CANCELLED"


def test_slices_by_their_own_predicate(tmp_path: Path, fake: Fake) -> None:
    stage = Stage("prepare", ["p"], array=5, slice_done=lambda part: part % 2 == 0)
    submit(tmp_path, [stage])
    assert fake.jobs["101"]["array"] == [1, 3]


def test_changed_identity_replaces_jobs_and_forgets_slices(tmp_path: Path, fake: Fake) -> None:
    def stages(identity: str) -> list[Stage]:
        return [
            Stage("prepare", ["p"], array=3, identity=identity),
            Stage("train:a", ["t"], after=["prepare"], identity=identity),
        ]

    submit(tmp_path, stages("old"))
    finish(tmp_path, "prepare", 0)
    submit(tmp_path, stages("new"))
    assert fake.jobs["103"]["array"] == [0, 1, 2]
    assert fake.jobs["101"]["slices"] == dict.fromkeys("012", "CANCELLED")
    assert fake.jobs["102"]["state"] == "CANCELLED"
    assert newest(tmp_path) == {"prepare": "103", "train:a": "104"}


def test_successor_of_a_job_counts_as_the_job(tmp_path: Path, fake: Fake) -> None:
    submit(tmp_path, [Stage("train:a", ["t"])])
    fake.set("101", state="GONE")
    submit(tmp_path / "other", [Stage("x", ["t"])])
    write_state(
        Folder(tmp_path).state_file("train:a", None), State(state="saved", job="102", chain=["101"])
    )
    lines = submit(tmp_path, [Stage("train:a", ["t"])])
    assert lines[0].startswith("queued  train:a")


def test_refused_job_keeps_the_record_of_the_others(tmp_path: Path, fake: Fake) -> None:
    (fake.home / "refuse").write_text("train:b")
    with pytest.raises(SlurmError, match="Invalid account or partition"):
        submit(tmp_path, graph(set()))
    before = newest(tmp_path)
    assert "train:a" in before
    (fake.home / "refuse").unlink()
    submit(tmp_path, graph(set()))
    after = newest(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) == {stage.name for stage in graph(set())}


def test_one_faulty_job_and_nothing_is_submitted(tmp_path: Path, fake: Fake) -> None:
    stages = [Stage("a", ["x"]), Stage("b", ["x\0"], after=["a"])]
    with pytest.raises(SlurmError, match=r"job of stage 'b'(.|\n)*NUL"):
        submit(tmp_path, stages)
    assert fake.jobs == {}


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([Stage("a", ["x"], after=["b"]), Stage("b", ["x"], after=["a"])], "circle"),
        ([Stage("a", ["x"], after=["z"])], "waits for 'z', which is no stage"),
        ([Stage("a", ["x"]), Stage("a", ["y"])], "same name"),
    ],
)
def test_faulty_graphs(stages: list[Stage], text: str) -> None:
    with pytest.raises(SlurmError, match=text):
        in_order(stages)


def test_order_does_not_matter() -> None:
    names = [stage.name for stage in in_order(list(reversed(graph(set()))))]
    assert names.index("prepare") < names.index("verify") < names.index("train:a")
    assert names[-1] == "compare"


def test_two_submissions_at_once(tmp_path: Path, fake: Fake) -> None:
    with Folder(tmp_path).locked(), pytest.raises(SlurmError, match="under way"):
        submit(tmp_path, graph(set()))


def test_without_slurm_there_is_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError) as caught:
        submit(tmp_path / "run", graph(set()))
    assert "there is no SLURM here (sbatch not found)" in str(caught.value)
    assert "local_cluster.sh" in caught.value.todo
    assert not (tmp_path / "run").exists()


def test_without_a_controller_there_is_one_clear_message(tmp_path: Path, fake: Fake) -> None:
    (fake.home / "scontrol").write_text("#!/bin/sh\necho 'Slurmctld(primary) at here is DOWN'\n")
    with pytest.raises(SlurmError, match="no controller answers"):
        submit(tmp_path / "run", graph(set()))
    assert not (tmp_path / "run").exists()


def test_dry_run_needs_no_slurm_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = tmp_path / "run"
    text = "\n".join(submit(run, graph({"prepare", "verify"}), dry_run=True))
    assert text.count("#!/bin/bash") == 5
    assert "submit  compare  after any end of evaluate:a, evaluate:b" in text
    assert "done    verify" in text
    assert "were not shown to sbatch" in text
    assert not run.exists()


def test_dry_run_names_all_faulty_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    stages = [Stage("a b", ["x"]), Stage("c", []), Stage("d", ["x"])]
    with pytest.raises(SlurmError) as caught:
        submit(tmp_path / "run", stages, dry_run=True)
    assert "2 of the jobs would fail" in str(caught.value)
    assert "'a b' is no job name" in str(caught.value)


def test_damaged_ledger_is_explained(tmp_path: Path, fake: Fake) -> None:
    folder = Folder(tmp_path)
    folder.write(folder.ledger_file, "{")
    with pytest.raises(SlurmError, match="cannot read the record of jobs"):
        submit(tmp_path, graph(set()))


def test_percent_in_a_folder_is_no_pattern(tmp_path: Path, fake: Fake) -> None:
    run = tmp_path / "50%j"
    submit(run, [Stage("a", ["x"])])
    assert "50%%j/slurm/logs/a-%j.log" in Folder(run).script("a").read_text()
