"""Real experiments through a real SLURM: numbers of the plain run, exact resume on two nodes."""

import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slurm.ledger import Folder
from tests.slurm.conftest import Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("slurm"),  # one cluster for all
]

ROOT = Path(__file__).resolve().parents[2]
SCENES = {"train": 256, "val": 8, "test": 48, "zero_shot": 24}
MEASURED = ("latency", "per_s", "seconds")  # times differ from run to run
SMALL = [
    *(f"data.scenes.{name}={number}" for name, number in SCENES.items()),
    "train.steps=8",
    "train.batch_size=32",
    "train.warmup=2",
    "arms.teacher.train.steps=10",
    "arms.teacher.train.warmup=2",
    "arms.inherited.calibration=64",
]


def profile(folder: Path, nodes: int = 1) -> Path:
    """The `local` profile with room for torch, and as many threads as the plain run has."""
    wanted = {"cpus_per_task": 1, "memory": "3G", "time": "00:20:00"}
    file = folder / f"nodes{nodes}.yaml"
    resources = {"default": wanted, "train": {**wanted, "nodes": nodes}}
    content = {"cpu_bind": "none", "signal_seconds": 20, "resources": resources}
    file.write_text(yaml.safe_dump(content))
    return file


def inherclip(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


def table(run: Path) -> list[dict[str, str]]:
    with (run / "compare.csv").open() as handle:
        return list(csv.DictReader(handle))


def test_submitted_demo_has_the_numbers_of_the_plain_run(cluster: Cluster, folder: Path) -> None:
    sets = [word for item in SMALL for word in ("--set", item)]
    demo = ROOT / "configs" / "demo.yaml"
    inherclip("run", demo, "--out", folder / "plain", *sets)
    run = folder / "submitted"
    cluster_file = profile(folder)
    shown = inherclip("submit", demo, "--cluster", cluster_file, "--out", run, *sets, "--dry-run")
    assert shown.stdout.count("sbatch --test-only: Job") == 11
    assert not run.exists()
    inherclip("submit", demo, "--cluster", cluster_file, "--out", run, *sets)
    jobs = cluster.wait_end(run, 900)
    assert {job.state for job in jobs.values()} == {"done"}, jobs
    plain, submitted = table(folder / "plain"), table(run)
    assert [row["arm"] for row in submitted] == [row["arm"] for row in plain]
    compared = 0
    for ours, theirs in zip(submitted, plain, strict=True):
        for key, value in theirs.items():
            if "/" in key and value and not any(word in key for word in MEASURED):
                assert float(ours[key]) == pytest.approx(float(value), abs=1e-6), (ours["arm"], key)
                compared += 1
    assert compared >= 4 * 8
    assert (run / "report.html").is_file()
    again = inherclip("submit", demo, "--cluster", cluster_file, "--out", run, *sets)
    assert "Nothing to submit" in again.stdout
    assert "11 done" in inherclip("status", run).stdout


def two_node_experiment(folder: Path) -> Path:
    file = folder / "two.yaml"
    content = {
        "name": "two",
        "device": "cpu",
        "data": {"scenes": SCENES, "train": "scenes-train-*.tar"},
        "train": {"steps": 24, "batch_size": 32, "warmup": 4, "save_every": 5, "log_every": 1},
        "arms": {
            "student": {
                "kind": "scratch",
                "model": str(ROOT / "configs" / "models" / "demo_student.json"),
            }
        },
        "eval": {
            "sets": [{"name": "scenes", "kind": "retrieval", "shards": "scenes-test-*.tar"}],
            "batch_size": 32,
        },
    }
    file.write_text(yaml.safe_dump(content))
    return file


def digest(run: Path) -> str:
    weights = run / "arms" / "student" / "checkpoint" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def test_training_on_two_nodes_resumes_exactly(cluster: Cluster, folder: Path) -> None:
    """USR1, as before a time limit, and later `scontrol requeue`: still the same weights."""
    config, cluster_file = two_node_experiment(folder), profile(folder, nodes=2)
    calm, disturbed = folder / "calm", folder / "disturbed"
    for run in (calm, disturbed):
        inherclip("submit", config, "--cluster", cluster_file, "--out", run)

    def reached(step: int) -> str:
        jobs = cluster.wait(disturbed, lambda jobs: jobs["train:student"].step >= step, 600)
        return jobs["train:student"].job

    cluster.call("scancel", "--signal=USR1", reached(4))
    cluster.call("scontrol", "requeue", reached(12))
    for run in (calm, disturbed):
        jobs = cluster.wait_end(run, 900)
        assert {job.state for job in jobs.values()} == {"done"}, jobs
        restarts = 0 if run == calm else 2
        assert jobs["train:student"].restarts == restarts
        log = Folder(run).log("train:student", None, jobs["train:student"].job).read_text()
        assert log.count("WORLD_SIZE=2") == restarts + 1
    assert digest(disturbed) == digest(calm)


def test_a_cancelled_arm_is_a_marked_row_and_the_others_finish(
    cluster: Cluster, folder: Path
) -> None:
    content = yaml.safe_load(two_node_experiment(folder).read_text())
    content["arms"]["other"] = {**content["arms"]["student"], "train": {"steps": 4000}}
    config = folder / "cancelled.yaml"
    config.write_text(yaml.safe_dump(content))
    run = folder / "cancelled"
    inherclip("submit", config, "--cluster", profile(folder), "--out", run)
    cluster.wait(run, lambda jobs: jobs["train:other"].step >= 2, 600)
    inherclip("cancel", run, "other")
    jobs = cluster.wait_end(run, 900)
    assert jobs["train:student"].state == jobs["compare"].state == "done", jobs
    states = {row["arm"]: row["state"] for row in table(run)}
    assert states == {"student": "done", "other": "cancelled"}
