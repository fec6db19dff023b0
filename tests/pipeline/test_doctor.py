"""Each thing that `inherclip doctor` looks at: found, poor, absent, with the remedy it names."""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from pipeline import doctor, machine, packages

GB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def only(findings: Any) -> doctor.Finding:
    (finding,) = findings
    return finding


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    versions: dict[str, str] = {}
    monkeypatch.setattr(packages, "version", versions.get)
    return versions


@pytest.fixture
def no_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)


# --- the command
# ------------------------------------------------------------------------------------


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_doctor_arguments(parser)
    return doctor.run_doctor(parser.parse_args(arguments))


def test_the_whole_examination_of_this_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = run(["--json", "--out", str(tmp_path / "runs")])
    report = json.loads(capsys.readouterr().out)
    names = {finding["name"] for finding in report["findings"]}
    expected = {"python", "torch", "deepspeed", "cpu", "gpu", "memory", "disk", "write access"}
    assert expected | {"compiler", "slurm", "shared memory", "open files"} <= names
    assert code == (0 if report["ok"] else 1)
    assert not (tmp_path / "runs").exists()


def test_it_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, pipeline.doctor; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("needed", "code"), [(True, 1), (False, 0)])
@pytest.mark.parametrize("terminal", [True, False])
def test_exit_code_and_both_layouts(
    needed: bool,
    code: int,
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    findings = [
        doctor.Finding("fine", "OK", "here", "never shown"),
        doctor.Finding("poor", "warning", "[b]little[/b]", "get more"),
        doctor.Finding("gone", "missing", "absent", "fetch it", needed),
    ]
    monkeypatch.setattr(doctor, "examine", lambda out: findings)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    assert run([]) == code
    out = capsys.readouterr().out
    for text in ("OK", "[b]little[/b]", "get more", "fetch it"):
        assert text in out
    assert "never shown" not in out
    assert ("missing (optional)" in out) is not needed
    assert ("missing and needed: gone" in out) is needed


# --- Python and packages
# ----------------------------------------------------------------------------


def test_python_out_of_range_is_fatal() -> None:
    assert packages.check_python(">=3.11").status == "OK"
    finding = packages.check_python(">=3.99")
    assert finding.fatal
    assert "Python >=3.99" in finding.remedy


@pytest.mark.parametrize(
    ("version", "status", "remedy"),
    [
        ("1.2.3", "OK", None),
        ("1.2.3+cu130", "OK", None),
        ("1.4.0", "warning", 'pip install "Some.Thing==1.2.3"'),
        ("2.0", "missing", 'pip install "Some.Thing==1.2.3"'),
        (None, "missing", 'pip install "Some.Thing==1.2.3"'),
    ],
)
def test_packages_against_range_and_tested_version(
    version: str | None, status: str, remedy: str | None, installed: dict[str, str], tmp_path: Path
) -> None:
    if version:
        installed["Some.Thing"] = version
    write(tmp_path, {"constraints.txt": "# pins\n\nsome-thing==1.2.3  # why\nother==4; extra\n"})
    tested = packages.read_constraints(tmp_path)
    assert tested == {"some-thing": "1.2.3", "other": "4"}
    finding = only(packages.check_packages([Requirement("Some.Thing>=1,<2")], tested))
    assert finding.status == status
    assert finding.fatal == (status == "missing")
    if remedy:
        assert finding.remedy == remedy


def test_without_constraints_the_ranges_still_count(
    installed: dict[str, str], tmp_path: Path
) -> None:
    assert packages.read_constraints(tmp_path) is None
    first, second = packages.check_packages([Requirement("thing>=1")], None)
    assert (first.name, first.status) == ("constraints.txt", "warning")
    assert second.remedy == 'pip install "thing>=1"'


@pytest.mark.parametrize(
    ("torch", "torchvision", "fits"),
    [
        ("2.14.1", "0.29.1", True),
        ("2.14.1+cpu", "0.29.1", False),
        ("2.14.1+cpu", "0.29.1+cpu", True),
        ("2.12.0", "0.29.1", False),
    ],
)
def test_torch_and_torchvision_must_be_a_pair(
    torch: str,
    torchvision: str,
    fits: bool,
    installed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed |= {"torch": torch, "torchvision": torchvision}
    monkeypatch.setattr(packages.metadata, "requires", lambda name: ["numpy", "torch>=2.14"])
    finding = packages.check_torchvision_fits()
    assert (finding is None) == fits
    assert finding is None or (finding.fatal and "one command" in finding.remedy)


def test_extras_are_optional(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    extras = {"wandb": [Requirement("wandb>=0.17")]}
    absent = only(packages.check_extras(extras))
    assert (absent.status, absent.fatal) == ("missing", False)
    assert absent.remedy == 'pip install "wandb>=0.17"'
    installed["wandb"] = "0.20"
    assert "WANDB_MODE=offline" in only(packages.check_extras(extras)).remedy
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert only(packages.check_extras(extras)).status == "OK"


def test_ranges_come_from_pyproject_or_from_the_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = packages.wanted()
    assert "torch" in {package.name for package in project.packages}
    assert {"wandb", "tensorboard", "export"} <= project.extras.keys()

    class About(dict[str, str]):
        def get_all(self, key: str) -> list[str]:
            return ["wandb"]

    lines = ["torch>=2.8", 'wandb>=0.17; extra == "wandb"', 'pywin32; sys_platform == "never"']
    monkeypatch.setattr(packages.metadata, "metadata", lambda n: About({"Requires-Python": ">=3"}))
    monkeypatch.setattr(packages.metadata, "requires", lambda n: lines)
    bare = packages.wanted(tmp_path)
    assert [package.name for package in bare.packages] == ["torch"]
    assert [package.name for package in bare.extras["wandb"]] == ["wandb"]


# --- processor, memory, disk
# ------------------------------------------------------------------------


def test_few_cores_warn() -> None:
    assert doctor.check_cpu(4, None).status == "OK"
    assert doctor.check_cpu(4, 1.5).status == "warning"
    assert doctor.check_cpu(1, None).remedy


def test_little_memory_warns() -> None:
    assert doctor.check_memory(machine.Memory(5 * GB, 8 * GB, False)).status == "OK"
    poor = doctor.check_memory(machine.Memory(3 * GB, 8 * GB, True))
    assert poor.status == "warning"
    assert "control group" in poor.detail
    assert doctor.check_memory(None).status == "warning"


Usage = collections.namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "status"), [(20, "OK"), (5, "warning"), (0.5, "missing")])
def test_disk(free: float, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = Usage(100 * GB, 0, int(free * GB))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    finding = doctor.check_disk(tmp_path / "not" / "yet")
    assert finding.status == status
    assert finding.fatal == (status == "missing")
    assert "--out" in finding.remedy


def test_write_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_write(tmp_path / "runs").status == "OK"
    assert list(tmp_path.iterdir()) == []

    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    finding = doctor.check_write(tmp_path / "runs")
    assert finding.fatal
    assert "Permission denied" in finding.detail


def test_limits_of_the_loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 9000))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(0, 0, 64 << 20))
    files, shared = doctor.check_limits(tmp_path)
    assert (files.status, files.remedy) == (
        "warning",
        "ulimit -n 9000, if many loader workers run",
    )
    assert shared.status == "warning"
    assert "--shm-size" in shared.remedy
    only(doctor.check_limits(tmp_path / "no such folder"))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert next(iter(doctor.check_limits(tmp_path))).status == "OK"


# --- GPU, compiler, locks, SLURM
# --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "driver", "status", "says"),
    [
        (machine.Gpus(["H200"], [139 * GB], True, "13.0"), True, "OK", "H200 139 GB"),
        (machine.Gpus(["V100"], [16 * GB], False, "12.6"), True, "warning", "fp32"),
        (machine.Gpus(built_for=None), True, "warning", "CUDA build"),
        (machine.Gpus(built_for="13.0"), True, "warning", "CUDA_VISIBLE_DEVICES"),
        (machine.Gpus(built_for="13.0"), False, "missing", "CC3M needs GPUs"),
        (machine.Gpus(error="libgomp.so: gone"), False, "missing", "libgomp.so: gone"),
    ],
)
def test_gpu(
    gpus: machine.Gpus, driver: bool, status: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/x" if driver else None)
    finding = doctor.check_gpu(gpus)
    assert finding.status == status
    assert says in finding.detail + finding.remedy
    assert finding.fatal == bool(gpus.error)


@pytest.mark.usefixtures("no_commands")
def test_absent_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = doctor.check_slurm()
    assert (slurm.status, slurm.fatal) == ("missing", False)
    assert "only needed for `inherclip submit`" in slurm.detail
    compiler = doctor.check_compiler()
    assert (compiler.status, compiler.fatal) == ("missing", False)
    assert "g++" in compiler.remedy


def test_the_named_compiler_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "my-cc -O2")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    assert doctor.check_compiler().detail == "/bin/my-cc"
    assert doctor.check_slurm().status == "OK"


def test_stale_young_and_held_build_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = machine.extensions_folder()
    assert folder == tmp_path
    assert only(doctor.check_locks(machine.build_locks(folder), folder)).status == "OK"
    names = ["py311_cpu/deepspeed_shm_comm/lock", "fused/lock", "young/lock"]
    write(tmp_path, dict.fromkeys(names, ""))
    long_ago = time.time() - 3600
    for name in names[:2]:
        os.utime(tmp_path / name, (long_ago, long_ago))
    with (tmp_path / "fused/lock").open():
        held, stale, young = doctor.check_locks(machine.build_locks(folder), folder)
    assert held.status == "OK"
    assert f"process {os.getpid()}" in held.detail
    assert stale.status == "warning"
    assert "for ever" in stale.detail
    assert stale.remedy == f"rm {tmp_path / names[0]}"
    assert "60 min old" in stale.detail
    assert young.status == "warning"
    assert young.remedy.startswith("wait")
