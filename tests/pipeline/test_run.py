"""The whole chain through the command: run, repeat, change, interrupt, break."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from data_prep.files import sha256_file
from tests.conftest import REPOSITORY
from tests.pipeline.conftest import inherclip, tiny_experiment

pytestmark = pytest.mark.xdist_group("run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """An undisturbed tiny run: (configuration, run folder)."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_experiment(), sort_keys=False))
    inherclip("run", config, "--out", folder / "run")
    return config, folder / "run"


def markers(run: Path) -> dict[str, float]:
    return {path.stem: path.stat().st_mtime for path in (run / "stages").glob("*.json")}


def weights(run: Path, arm: str = "inherited") -> str:
    return sha256_file(run / "arms" / arm / "checkpoint" / "model.safetensors")


@pytest.mark.slow
def test_a_run_leaves_everything_that_the_design_promises(finished: tuple[Path, Path]) -> None:
    _, run = finished
    table = pd.read_csv(run / "compare.csv")
    assert list(table["arm"]) == ["teacher", "inherited", "student", "student_clipkd"]
    assert (table["state"] == "done").all()
    assert {"scenes/i2t_r1", "scenes/t2i_r10", "classes/top1"} <= set(table.columns)
    assert "<html" in (run / "report.html").read_text()
    assert (run / "compare.md").read_text().count("student_clipkd") >= 1
    for arm in table["arm"]:
        lines = [json.loads(x) for x in (run / f"arms/{arm}/train.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, *range(3, 61, 3)]
        assert {"samples", "loss", "loss/task", "lr", "scale", "samples_per_s"} <= set(lines[0])
        result = json.loads((run / f"arms/{arm}/eval.json").read_text())
        assert result["checkpoint_sha256"] == weights(run, arm)
        assert (result["steps"], result["seed"]) == (60, 0)
        assert not (run / f"arms/{arm}/resume").exists()
    before = json.loads((run / "arms/inherited/eval_before.json").read_text())
    assert before["stage"] == "before_training"
    plan = json.loads((run / "arms/inherited/plan.json").read_text())
    assert plan["total_after"] <= 0.5 * plan["total_before"]


@pytest.mark.slow
def test_a_second_run_redoes_nothing(finished: tuple[Path, Path]) -> None:
    config, run = finished
    before = markers(run)
    done = inherclip("run", config, "--out", run)
    assert "Nothing to do" in done.stdout
    assert markers(run) == before


@pytest.mark.slow
def test_a_change_redoes_what_depends_on_it_and_nothing_else(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = markers(copy)
    inherclip("run", config, "--out", copy, "--set", "arms.student.train.lr=0.002")
    changed = {name for name, when in markers(copy).items() if when != before[name]}
    assert changed == {"train-student", "evaluate-student", "compare"}
    assert weights(copy, "student") != weights(run, "student")


@pytest.mark.slow
def test_the_resolved_configuration_runs_and_finds_everything_done(
    finished: tuple[Path, Path],
) -> None:
    _, run = finished
    done = inherclip("run", run / "config.yaml", "--out", run)
    assert "Nothing to do" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_interrupted_in_training_the_same_command_ends_with_the_same_weights(
    finished: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    config, run = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "stages" / "train-inherited.json").unlink()
    shutil.rmtree(copy / "arms/inherited/checkpoint")
    (copy / "arms/inherited/train.jsonl").unlink()
    command = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--out", str(copy)]
    child = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    log = copy / "arms/inherited/train.jsonl"
    deadline = time.monotonic() + 300
    while not (log.is_file() and '"step": 3' in log.read_text()):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    output = child.communicate(timeout=300)[0].decode()
    assert child.returncode == (130 if number == signal.SIGINT else 75), output
    assert "Traceback" not in output
    assert list((copy / "arms/inherited/resume").glob("*/step-*/state.json"))
    done = inherclip("run", config, "--out", copy)
    assert "resuming after step" in done.stdout
    assert weights(copy) == weights(run)
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, *range(3, 61, 3)]


@pytest.mark.slow
def test_two_local_processes_save_on_a_signal_and_the_same_command_goes_on(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    log = copy / "arms/student/train.jsonl"
    log.unlink()  # of the finished arm: what is waited for below must be new
    longer = ("--set", "arms.student.train.steps=300", "--set", "processes=2")
    command = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--out", str(copy)]
    child = subprocess.Popen(
        [*command, *longer, "--only", "student"],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 300
    while not (log.is_file() and '"step": 15' in log.read_text()):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    output = child.communicate(timeout=300)[0].decode()
    assert child.returncode == 75, output
    assert list((copy / "arms/student/resume").glob("*/step-*/state.json"))
    done = inherclip("run", config, "--out", copy, *longer, "--only", "student")
    assert "student: trained 300 steps" in done.stdout + output
    description = json.loads((copy / "arms/student/checkpoint/model.json").read_text())
    assert description["provenance"]["world_size"] == 2
    assert description["provenance"]["steps"] == 300


@pytest.mark.slow
def test_an_arm_that_fails_leaves_the_others_and_a_marked_row(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    change = ("--set", "arms.student.train.lr=1.0e+18")
    done = inherclip("run", config, "--out", copy, *change, code=2)
    assert "not finite" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    table = pd.read_csv(copy / "compare.csv").set_index("arm")
    assert table.loc["student", "state"] == "failed"
    assert (table.drop(index="student")["state"] == "done").all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.stepz=3"], "unknown key; did you mean 'steps'?"),
        (["--only", "techer"], "no arm 'techer'"),
        (["--stage", "evaluate:nobody"], "no stage 'evaluate:nobody'"),
        (["--stage", "train:student_clipkd"], "needs data, train:teacher first"),
    ],
)
def test_bad_arguments_end_with_one_message_and_code_2(
    tiny: Callable[..., Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = inherclip("run", tiny(), "--out", tmp_path / "run", *arguments, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_folder_is_named_and_nothing_is_made(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    def elsewhere(content: dict[str, Any]) -> None:
        content["data"] = {"root": str(tmp_path / "nowhere"), "train": "x-*.tar"}

    config = tiny(elsewhere)
    done = inherclip("run", config, "--out", tmp_path / "run", code=2)
    assert str(tmp_path / "nowhere") in done.stderr
    assert not (tmp_path / "run" / "arms").exists()
    dry = inherclip("run", config, "--out", tmp_path / "run", "--dry-run", code=2)
    assert "Missing:" in dry.stdout


def test_the_cc3m_plan_names_what_is_missing() -> None:
    done = inherclip("run", "configs/cc3m_rn101.yaml", "--dry-run", code=2)
    for expected in (
        "train:student_clipkd", "22,704", "92,995,584", "training shards", "imagenet",
        "RN101-quickgelu:openai", "32.0 epochs", "59.43 M parameters",
    ):  # fmt: skip
        assert expected in done.stdout


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, pipeline.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'open_clip', 'deepspeed', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in (
        "prepare", "verify", "run", "inherit", "train", "evaluate", "compare", "report", "export",
        "submit", "status", "cancel", "logs", "doctor",
    ):  # fmt: skip
        assert f"    {command}" in done.stdout
