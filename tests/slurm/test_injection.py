"""No value of a configuration becomes a command: a table of tries, run through bash for real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from slurm.errors import SlurmError
from slurm.jobs import ClusterProfile, Container, Job, Resources, Stage, load_cluster
from slurm.render import render
from slurm.submit import submit_graph

ATTACKS = (
    "x; touch {target}",
    "x\ntouch {target}",
    "x\n#SBATCH --wrap=touch",
    "$(touch {target})",
    "`touch {target}`",
    "x && touch {target}",
    "x | touch {target}",
    "'; touch {target}; '",
    '"; touch {target}; "',
    "\\'; touch {target} #",
    "${{IFS}}touch${{IFS}}{target}",
    "> {target}",
    "x\r\ntouch {target}",
    "--wrap=touch {target}",
    "$'\\n'touch {target}",
    "x\0touch {target}",
    "{{slice}}; touch {target}",
)
# Every string of a profile, of resources and of a job that ends up in a script.
PROFILE_KEYS = ("name", "partition", "account", "qos", "constraint", "gpu_type", "cpu_bind")
RESOURCE_KEYS = ("memory", "time", "partition", "constraint")
FREE_KEYS = ("venv", "python")


@pytest.fixture
def fake_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`srun` that runs what stands behind `--`; the surroundings of one task."""
    folder = tmp_path / "bin"
    folder.mkdir()
    srun = folder / "srun"
    srun.write_text('#!/bin/bash\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    module = folder / "module"
    module.write_text("#!/bin/bash\nexit 0\n")
    for program in (srun, module):
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, value in {
        "SLURM_JOB_ID": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NODELIST": "localhost",
    }.items():
        monkeypatch.setenv(name, value)
    return folder


def a_job(run: Path, command: list[str], **fields: object) -> Job:
    return Job(
        name="train:a",
        job_name="run-train:a",
        command=tuple(command),
        folder=str(run),
        log=str(run / "log"),
        state=str(run / "state"),
        script=str(run / "job.sbatch"),
        **fields,  # type: ignore[arg-type]
    )


def execute(text: str, folder: Path) -> None:
    script = folder / "job.sbatch"
    script.write_text(text)
    subprocess.run(["bash", str(script)], timeout=60, check=False, capture_output=True, cwd=folder)


def possible(target: Path) -> list[str]:
    """The attacks that a program can be given at all: none with a NUL."""
    return [text for attack in ATTACKS if "\0" not in (text := attack.format(target=target))]


def test_arguments_and_variables_arrive_as_they_are(tmp_path: Path, fake_srun: Path) -> None:
    target, seen = tmp_path / "pwned", tmp_path / "seen.json"
    texts = possible(target)
    lines = {f"EVIL{i}": text for i, text in enumerate(texts) if not set(text) & set("\n\r")}
    code = (
        "import json, os, sys;"
        "evil = {k: v for k, v in os.environ.items() if k.startswith('EVIL')};"
        "json.dump([sys.argv[2:], evil], open(sys.argv[1], 'w'))"
    )
    job = a_job(tmp_path, [sys.executable, "-c", code, str(seen), *texts], environment=lines)
    execute(render(job, ClusterProfile(), sys.executable), tmp_path)
    assert json.loads(seen.read_text()) == [texts, lines]
    assert len(lines) > 8
    assert not target.exists()


def test_array_arguments_are_quoted_around_the_slice(
    tmp_path: Path, fake_srun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "1")
    target, seen = tmp_path / "pwned", tmp_path / "seen.json"
    texts = [text + " {slice}/{slices}" for text in possible(target)]
    code = "import json, sys; json.dump(sys.argv[2:], open(sys.argv[1], 'w'))"
    command = [sys.executable, "-c", code, str(seen), *texts]
    job = a_job(tmp_path, command, array=(3,), array_size=9)
    execute(render(job, ClusterProfile(), sys.executable), tmp_path)
    filled = [text.replace("{slice}", "3").replace("{slices}", "9") for text in texts]
    assert json.loads(seen.read_text()) == filled
    assert not target.exists()


@pytest.mark.parametrize("text", ["x\0y", "\0"])
def test_a_nul_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="NUL"):
        a_job(tmp_path, ["echo", text])


@pytest.mark.parametrize("text", ["x\ny", "x\r", "x\u2028y", "\x1b[2J"])
def test_line_breaks_in_variables_and_paths_are_refused(text: str, tmp_path: Path) -> None:
    for wrong in ({"environment": {"A": text}}, {"log": text}, {"folder": text}):
        with pytest.raises(ValidationError):
            Job.model_validate({**a_job(tmp_path, ["true"]).model_dump(), **wrong})


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("key", [*PROFILE_KEYS, *FREE_KEYS, "modules", "image", "mounts"])
def test_strings_of_a_profile_are_refused_or_inert(
    key: str, attack: str, tmp_path: Path, fake_srun: Path
) -> None:
    target = tmp_path / "pwned"
    text = attack.format(target=target)
    try:
        if key in ("image", "mounts"):
            value = text if key == "image" else (text,)
            fields = {"image": "i", key: value, "engine": "apptainer"}
            profile = ClusterProfile(container=Container.model_validate(fields))
        else:
            profile = ClusterProfile.model_validate({key: (text,) if key == "modules" else text})
    except ValidationError:
        return  # refused
    assert key in (*FREE_KEYS, "image", "mounts"), "only paths may hold unusual characters"
    execute(render(a_job(tmp_path, ["true"]), profile, "true"), tmp_path)
    assert not target.exists()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("key", RESOURCE_KEYS)
def test_strings_of_resources_are_refused(key: str, attack: str) -> None:
    with pytest.raises(ValidationError):
        Resources.model_validate({key: attack.format(target="/tmp/x")})


@pytest.mark.parametrize("attack", ATTACKS)
def test_stage_names_are_refused_with_their_name(attack: str, tmp_path: Path) -> None:
    stage = Stage(attack.format(target="/tmp/x"), ["true"])
    with pytest.raises(SlurmError, match="job name"):
        submit_graph([stage], ClusterProfile(), tmp_path, dry_run=True, say=lambda _: None)


@pytest.mark.parametrize("attack", [a for a in ATTACKS if not set(a) & set("\0\n\r>/")])
def test_run_folder_with_a_wild_name_is_inert(attack: str, tmp_path: Path, fake_srun: Path) -> None:
    target = Path("pwned")
    run = tmp_path / attack.format(target=target)
    run.mkdir()
    text = render(a_job(run, ["touch", "ran"]), load_cluster("cpu"), "true")
    assert text.count("#SBATCH --output=") == 1
    execute(text, tmp_path)
    assert (run / "ran").exists()
    assert not any(tmp_path.rglob("pwned"))


def test_environment_names_are_refused() -> None:
    for name in ("A;touch x", "A B", "1A", "", "A=", "$(x)"):
        with pytest.raises(ValidationError):
            ClusterProfile(environment={name: "1"})
