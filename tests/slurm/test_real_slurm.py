"""The promises of the package, tried on a real two-node SLURM started for these tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import client, status
from slurm.jobs import Resources, Stage
from slurm.ledger import Folder
from slurm.submit import submit_graph
from tests.slurm.conftest import Cluster
from tests.slurm.test_injection import ATTACKS

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.xdist_group("slurm")]

PYTHON = sys.executable
TRAINING = str(Path(__file__).with_name("tiny_training.py"))
ONE = Resources(cpus_per_task=1, memory="300M", time="00:10:00")
TWO = ONE.model_copy(update={"nodes": 2})


def python(name: str, code: str, **more: object) -> Stage:
    return Stage(name, [PYTHON, "-c", code], **{"resources": ONE, **more})  # type: ignore[arg-type]


def training(
    run: Path, arm: str, steps: int, *more: str, pause: float = 0.1, **fields: object
) -> Stage:
    folder = run / "arms" / arm
    return Stage(
        f"train:{arm}",
        [PYTHON, TRAINING, str(folder), str(steps), str(pause), *more],
        **{"resources": TWO, **fields},  # type: ignore[arg-type]
        resumable=True,
        progress=folder / "train.jsonl",
        total=steps,
        done=(folder / "weights-0.txt").exists,
    )


def undisturbed(tmp_path: Path, steps: int, ranks: int = 2) -> list[str]:
    found = []
    for rank in range(ranks):
        folder = tmp_path / "undisturbed"
        command = [PYTHON, TRAINING, str(folder), str(steps), "0"]
        subprocess.run(command, env={"RANK": str(rank)}, check=True, timeout=60)
        found.append((folder / f"weights-{rank}.txt").read_text())
    return found


def weights(run: Path, arm: str, ranks: int = 2) -> list[str]:
    return [(run / "arms" / arm / f"weights-{rank}.txt").read_text() for rank in range(ranks)]


def step_of(jobs: dict[str, status.JobStatus], name: str) -> int:
    return jobs[name].step


def test_two_nodes_reduce_over_gloo_with_the_derived_environment(
    cluster: Cluster, run: Path
) -> None:
    code = (
        "import os, torch, torch.distributed as d; d.init_process_group('gloo');"
        "x = torch.ones(1) * (d.get_rank() + 1); d.all_reduce(x);"
        "print('SUM', x.item(), os.environ['SLURMD_NODENAME'], os.environ['LOCAL_RANK'],"
        " os.environ['OMP_NUM_THREADS']);"
        "d.destroy_process_group()"  # else a thread of gloo may abort the process at its exit
    )
    cluster.submit(run, python("reduce", code, resources=TWO.model_copy(update={"memory": "3G"})))
    jobs = cluster.wait_end(run)
    assert jobs["reduce"].state == "done", jobs
    text = Folder(run).log("reduce", None, jobs["reduce"].job).read_text()
    assert "SUM 3.0 n0 0 1" in text
    assert "SUM 3.0 n1 0 1" in text
    assert "MASTER_ADDR=127.0.0.1" in text


def test_requeue_in_mid_training_changes_nothing(
    cluster: Cluster, run: Path, tmp_path: Path
) -> None:
    cluster.submit(run, training(run, "a", 40), python("after", "print(1)", after=["train:a"]))
    jobs = cluster.wait(run, lambda jobs: step_of(jobs, "train:a") >= 7)
    cluster.call("scontrol", "requeue", jobs["train:a"].job)
    jobs = cluster.wait(run, lambda jobs: jobs["train:a"].state == "waiting")
    assert jobs["after"].state == "waiting"
    jobs = cluster.wait_end(run)
    assert {job.state for job in jobs.values()} == {"done"}
    assert jobs["train:a"].restarts == 1
    assert weights(run, "a") == undisturbed(tmp_path, 40)


def test_time_limits_continue_a_training_and_end_other_jobs(
    cluster: Cluster, run: Path, tmp_path: Path
) -> None:
    """SLURM itself sends USR1 before the limit; the job saves, is requeued, and finishes."""
    short = ONE.model_copy(update={"time": "1"})  # SLURM looks at limits about twice a minute
    stage = training(run, "a", 100, pause=0.5, resources=short)
    cluster.submit(
        run,
        stage,
        python("long", "import time; time.sleep(600)", resources=short),
        signal_seconds=50,
    )
    jobs = cluster.wait_end(run, 180)
    assert jobs["train:a"].state == "done"
    assert jobs["train:a"].restarts >= 1
    log = Folder(run).log("train:a", None, jobs["train:a"].job).read_text()
    assert "signal [10], saved" in log
    assert "saved, requeue of job" in log
    assert weights(run, "a", 1) == undisturbed(tmp_path, 100, 1)
    assert jobs["long"].state == "failed"
    assert jobs["long"].reason == "time limit of 1 reached"


def test_where_requeue_is_forbidden_a_successor_goes_on(
    cluster: Cluster, run: Path, tmp_path: Path
) -> None:
    cluster.submit(
        run,
        training(run, "a", 40),
        python("after", "print(1)", after=["train:a"]),
        python("table", "print(2)", after=["train:a"], after_any=True),
        requeue=False,
    )
    jobs = cluster.wait(run, lambda jobs: step_of(jobs, "train:a") >= 7)
    first = jobs["train:a"].job
    cluster.call("scancel", "--signal=USR1", first)
    cluster.wait(run, lambda jobs: jobs["train:a"].job != first)
    jobs = cluster.wait_end(run)
    assert {job.state for job in jobs.values()} == {"done"}, jobs
    assert weights(run, "a") == undisturbed(tmp_path, 40)
    finished = {
        name: json.loads(Folder(run).state_file(name, None).read_text())
        for name in ("train:a", "after", "table")
    }
    assert finished["train:a"]["chain"] == [first]
    assert finished["after"]["started"] >= finished["train:a"]["ended"]
    assert finished["table"]["started"] >= finished["train:a"]["ended"]


def test_node_down_in_mid_run_moves_the_job(cluster: Cluster, run: Path, tmp_path: Path) -> None:
    cluster.submit(run, training(run, "a", 40, resources=ONE))
    jobs = cluster.wait(run, lambda jobs: step_of(jobs, "train:a") >= 7)
    node = jobs["train:a"].nodes
    cluster.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    try:
        jobs = cluster.wait_end(run)
    finally:
        cluster.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert jobs["train:a"].state == "done"
    assert jobs["train:a"].nodes != node
    assert weights(run, "a", 1) == undisturbed(tmp_path, 40, 1)


def test_crash_loop_stops_and_says_why(cluster: Cluster, run: Path) -> None:
    stage = training(run, "a", 40, "crash-at", "7", resources=ONE, pause=0.01)
    cluster.submit(run, stage, python("after", "print(1)", after=["train:a"]), max_tries=1)
    jobs = cluster.wait_end(run)
    assert jobs["train:a"].state == "failed"
    assert "the loss is not finite at step 7" in jobs["train:a"].reason
    assert jobs["train:a"].restarts == 1  # the first crash came after 7 new steps
    assert jobs["after"].state == "cancelled"
    assert jobs["after"].reason == "never started: train:a failed"


def test_failing_slice_is_resubmitted_alone(cluster: Cluster, run: Path) -> None:
    code = (
        "import sys, pathlib; n = sys.argv[1].split('/')[0]; d = pathlib.Path(sys.argv[2]);"
        "open(d / 'ran', 'a').write(n);"
        "sys.exit('slice 2 finds no disk') if n == '2' and not (d / 'mended').exists() else None;"
        "(d / f'out{n}').touch()"
    )
    command = [PYTHON, "-c", code, "{slice}/{slices}", str(run)]
    merged = run / "merged"
    graph = [
        Stage("prepare", command, ONE, array=4, done=lambda: len([*run.glob("out*")]) == 4),
        python("merge", f"open({str(merged)!r}, 'w')", after=["prepare"], done=merged.exists),
    ]
    cluster.submit(run, *graph)
    jobs = cluster.wait_end(run)
    assert [jobs[f"prepare[{i}]"].state for i in range(4)] == ["done", "done", "failed", "done"]
    assert "slice 2 finds no disk" in jobs["prepare[2]"].line
    assert jobs["merge"].state == "cancelled"
    (run / "mended").touch()
    (run / "ran").unlink()
    cluster.submit(run, *graph)
    jobs = cluster.wait_end(run)
    assert {job.state for job in jobs.values()} == {"done"}
    assert (run / "ran").read_text() == "2"
    lines: list[str] = []
    assert submit_graph(graph, cluster.profile, run, say=lines.append) == 0
    assert lines[-1].startswith("Nothing to submit")


def test_cancelled_arm_leaves_the_others_and_the_table(cluster: Cluster, run: Path) -> None:
    table = run / "table.json"
    code = (
        "import json, sys; from slurm.status import stage_states;"
        "json.dump(stage_states(sys.argv[1]), open(sys.argv[2], 'w'))"
    )
    graph = [
        training(run, "a", 300, resources=ONE),
        training(run, "b", 20, resources=ONE),
        python("evaluate:a", "print(1)", after=["train:a"]),
        python("evaluate:b", "print(1)", after=["train:b"]),
        Stage(
            "compare",
            [PYTHON, "-c", code, str(run), str(table)],
            ONE,
            after=["evaluate:a", "evaluate:b"],
            after_any=True,
        ),
    ]
    cluster.submit(run, *graph)
    jobs = cluster.wait(run, lambda jobs: step_of(jobs, "train:a") >= 3)
    # Submitting again while it runs keeps everything as it is.
    cluster.submit(run, *graph)
    again = cluster.jobs(run)
    assert {k: v.job for k, v in again.items()} == {k: v.job for k, v in jobs.items()}
    client.cancel([jobs["train:a"].job])
    jobs = cluster.wait_end(run)
    assert {name: job.state for name, job in jobs.items()} == {
        "train:a": "cancelled",
        "train:b": "done",
        "evaluate:a": "cancelled",
        "evaluate:b": "done",
        "compare": "done",
    }
    seen = json.loads(table.read_text())
    assert seen["train:a"] == ["cancelled", "cancelled"]
    assert seen["evaluate:b"] == ["done", ""]


def test_out_of_memory_is_named(cluster: Cluster, run: Path) -> None:
    code = "import time; x = bytearray(10**9); x[::4096] = b'1' * len(x[::4096]); time.sleep(30)"
    cluster.submit(run, python("hog", code))
    jobs = cluster.wait_end(run)
    assert jobs["hog"].state == "failed"
    assert jobs["hog"].reason.startswith("out of memory (asked for 300M)"), jobs["hog"]


def test_no_string_becomes_a_command(cluster: Cluster, run: Path) -> None:
    """Every attack as an argument and as a variable of one real job each: it arrives as it is."""
    target = run / "pwned"
    attacks = [attack.format(target=target) for attack in ATTACKS if "\0" not in attack]
    code = (
        "import json, os, sys;"
        "json.dump([sys.argv[2], os.environ.get('EVIL')], open(sys.argv[1], 'w'))"
    )
    stages = [
        Stage(
            f"try{number}",
            [PYTHON, "-c", code, str(run / f"{number}.json"), attack],
            ONE,
            environment={"EVIL": attack.replace("\n", " ").replace("\r", " ")},
        )
        for number, attack in enumerate(attacks)
    ]
    cluster.submit(run, *stages)
    jobs = cluster.wait_end(run, 120)
    assert {job.state for job in jobs.values()} == {"done"}
    for number, attack in enumerate(attacks):
        seen = json.loads((run / f"{number}.json").read_text())
        assert seen == [attack, attack.replace("\n", " ").replace("\r", " ")]
    assert not target.exists()


def test_dry_run_is_accepted_by_sbatch(cluster: Cluster, run: Path) -> None:
    lines: list[str] = []
    graph = [training(run, "a", 5), python("after", "print(1)", after=["train:a"])]
    assert submit_graph(graph, cluster.profile, run, dry_run=True, say=lines.append) == 0
    accepted = [line for line in lines if "--test-only: Job" in line]
    assert len(accepted) == 2
    assert not (run / "slurm").exists()
