"""Job scripts: golden texts, directives by sbatch's rules, bash accepts what is written."""

import os
import subprocess
from pathlib import Path

import pytest

from slurm.jobs import ClusterProfile, Container, Job, Resources
from slurm.render import argument, directive, directives, quote, ranges, render

GOLDEN = Path(__file__).with_name("golden")


def job(**fields: object) -> Job:
    base: dict[str, object] = {
        "name": "train:inherited",
        "job_name": "cc3m-train:inherited",
        "command": ("python", "-m", "pipeline.cli", "train", "runs/cc3m/config.yaml"),
        "folder": "/home/me/inherclip",
        "log": "/data/runs/cc3m/slurm/logs/train-inherited-%j.log",
        "state": "/data/runs/cc3m/slurm/state/train-inherited",
        "script": "/data/runs/cc3m/slurm/scripts/train-inherited.sbatch",
    }
    return Job.model_validate({**base, **fields})


EIGHT = Resources(
    nodes=2,
    tasks_per_node=8,
    gpus_per_node=8,
    cpus_per_task=12,
    memory="0",
    time="1-00:00:00",
    exclusive=True,
)
CASES: dict[str, tuple[Job, ClusterProfile]] = {
    "training_on_16_gpus": (
        job(
            resources=EIGHT,
            after=("inherit:inherited",),
            dependencies=("afterok:41",),
            resumable=True,
            progress="/data/runs/cc3m/arms/inherited/train.jsonl",
        ),
        ClusterProfile(
            name="h100x8",
            partition="gpu",
            account="vision",
            qos="long",
            constraint="h100&ib",
            gpu_type="h100",
            modules=("cuda/12.8", "gcc"),
            venv="/home/me/my venv",
            environment={"NCCL_SOCKET_IFNAME": "ib0"},
            signal_seconds=300,
        ),
    ),
    "array_of_slices": (
        job(
            name="prepare",
            job_name="cc3m-prepare",
            command=("inherclip", "prepare", "--slice={slice}/{slices}", "it's", "a b"),
            array=(0, 1, 2, 5),
            array_size=6,
            resources=Resources(cpus_per_task=4, memory="8G", time="90"),
            state="/data/runs/cc3m/slurm/state/prepare",
        ),
        ClusterProfile(name="cpu", array_limit=2, requeue=False),
    ),
    "container_pyxis": (
        job(resources=EIGHT),
        ClusterProfile(
            container=Container(image="nvcr.io#nvidia/pytorch:25.10", mounts=("/data", "/a:/b")),
            python="python3",
        ),
    ),
    "container_apptainer": (
        job(resources=EIGHT, environment={"NOTE": "two words"}),
        ClusterProfile(
            container=Container(
                image="/images/my torch.sif", engine="apptainer", mounts=("/data",)
            ),
            python="python3",
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_script_is_as_agreed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with UPDATE_GOLDEN=1 to accept a change, then read the difference."""
    monkeypatch.setattr("slurm.render.CHECKOUT", Path("/home/me/inherclip"))
    text = render(*CASES[name], python="/opt/py/bin/python")
    golden = GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", CASES)
def test_bash_can_read_it(name: str) -> None:
    text = render(*CASES[name], python="python")
    result = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    head = text.split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in head), "directives stand before the first command"


def parse_like_sbatch(line: str) -> str:
    """Follow sbatch's own parser of `#SBATCH` lines: quotes, backslashes, `#` for a comment."""
    found, quoted, escaped = "", "", False
    for character in line:
        if escaped:
            found, escaped = found + character, False
        elif character == "\\":
            escaped = True
        elif quoted and character == quoted:
            quoted = ""
        elif not quoted and character in "\"'":
            quoted = character
        elif not quoted and (character == "#" or character.isspace()):
            break
        else:
            found += character
    return found


@pytest.mark.parametrize("path", ["/a b/%j", "/a'b", '/a"b', "/a\\b", "/a#b", "/a$b;c", "/ü"])
def test_paths_in_directives_survive_sbatch(path: str) -> None:
    assert parse_like_sbatch(directive("output", path)) == f"--output={path}"


@pytest.mark.parametrize(
    ("numbers", "text"), [((0,), "0"), ((0, 1, 2, 7, 9, 10), "0-2,7,9-10"), ((3, 1, 2), "1-3")]
)
def test_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text


@pytest.mark.parametrize("text", ["a\r\nb'c\\d$(x)`", "\x1b\\n", "\t'", "", "plain", "a\x7f0"])
def test_quoting_gives_bash_the_same_text(text: str) -> None:
    result = subprocess.run(["bash", "-c", f"printf %s {quote(text)}"], capture_output=True)
    assert result.stdout.decode() == text
    assert "\r" not in quote(text)


def test_slices_are_filled_in_only_in_arrays() -> None:
    assert argument("{slice}/{slices}", job()) == "'{slice}/{slices}'"
    array = job(array=(2,), array_size=8)
    assert argument("--part={slice}/{slices}", array) == '--part="$SLURM_ARRAY_TASK_ID"/8'


def test_nothing_is_asked_that_was_not_said() -> None:
    lines = directives(job(), ClusterProfile())
    names = [line.split("=")[0] for line in lines]
    assert names == [
        "--job-name",
        "--nodes",
        "--ntasks-per-node",
        "--time",
        "--output",
        "--open-mode",
        "--requeue",
    ]


def test_signal_only_for_what_can_save() -> None:
    """USR1 would kill an evaluation before its time."""
    assert not any("signal" in line for line in directives(job(), ClusterProfile()))
    lines = directives(job(resumable=True), ClusterProfile(signal_seconds=77))
    assert "--signal=USR1@77" in lines
