"""`inherclip doctor`: what this machine can do, what is missing, and what to do about it.

In:  installed packages, the operating system, the folder for runs.
Out: findings (OK, warning or missing, each with a remedy) as a table, plain lines or JSON; exit
code 1 when
     something needed is missing, 0 otherwise. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from pipeline import machine
from pipeline.packages import (
    Finding,
    check_extras,
    check_packages,
    check_python,
    check_torchvision_fits,
    read_constraints,
    version,
    wanted,
)

GIGABYTE = 1 << 30
STALE_AFTER = 600.0
"""Seconds after which a build lock that nobody holds is dead; a build takes about a minute."""


def check_cpu(cores: int, limit: float | None) -> Finding:
    """Report cores; one core is a warning."""
    usable = cores if limit is None else min(cores, limit)
    detail = f"{cores} cores" + ("" if limit is None else f", control group allows {limit:g}")
    if usable >= 2:
        return Finding("cpu", "OK", detail)
    return Finding("cpu", "warning", detail, "ask for 2 cores or more; the demo is timed on 2")


def check_gpu(gpus: machine.Gpus) -> Finding:
    """Report CUDA devices; without one everything runs on the CPU."""
    if gpus.error:
        remedy = "run `python -c 'import torch'` and mend what it says"
        return Finding(
            "gpu", "missing", f"torch cannot be asked: {gpus.error}", remedy, needed=True
        )
    if gpus.names:
        sizes = ", ".join(
            f"{name} {size / GIGABYTE:.0f} GB"
            for name, size in zip(gpus.names, gpus.memory, strict=True)
        )
        detail = f"{sizes}; CUDA {gpus.built_for}; bf16 {'yes' if gpus.bf16 else 'no'}"
        remedy = "train in fp32: bf16 would be emulated"
        return Finding("gpu", "OK" if gpus.bf16 else "warning", detail, remedy)
    if shutil.which("nvidia-smi"):
        if gpus.built_for is None:
            detail, remedy = "torch was built without CUDA", "install a CUDA build of torch"
        else:
            detail = f"nvidia-smi is here, but torch (CUDA {gpus.built_for}) sees no device"
            remedy = (
                "check CUDA_VISIBLE_DEVICES, and `nvidia-smi` for a driver older than that CUDA"
            )
        return Finding("gpu", "warning", detail, remedy)
    remedy = "nothing to do for the demo and Flickr8k; CC3M needs GPUs"
    return Finding("gpu", "missing", "none: everything runs on the CPU", remedy)


def check_memory(found: machine.Memory | None) -> Finding:
    """Report memory left; under 4 GB the demo may not fit."""
    if found is None:
        return Finding(
            "memory", "warning", "this system does not say", "have 4 GB free for the demo"
        )
    owner = "control group" if found.limited else "machine"
    available, total = found.available / GIGABYTE, found.total / GIGABYTE
    detail = f"{available:.1f} GB free of {total:.1f} GB ({owner})"
    remedy = "close other programs, or ask for 4 GB or more; smaller train.batch_size needs less"
    enough = found.available >= 4 * GIGABYTE
    return Finding("memory", "OK" if enough else "warning", detail, remedy)


def check_disk(folder: Path) -> Finding:
    """Report free space where runs are written."""
    free = shutil.disk_usage(_existing(folder)).free
    detail = f"{free / GIGABYTE:.1f} GB free for {folder}"
    remedy = "free some space, or choose another disk with --out"
    if free < GIGABYTE:
        return Finding("disk", "missing", detail, remedy, needed=True)
    return Finding("disk", "OK" if free >= 10 * GIGABYTE else "warning", detail, remedy)


def check_write(folder: Path) -> Finding:
    """Try to write where runs go, leaving nothing behind."""
    parent = _existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".inherclip-doctor-"):
            pass
    except OSError as error:
        detail = f"cannot write in {parent}: {error.strerror or error}"
        return Finding("write access", "missing", detail, "choose a folder with --out", needed=True)
    return Finding("write access", "OK", str(folder))


def check_compiler() -> Finding:
    """Look for a C++ compiler; only some options of torch and DeepSpeed use it."""
    named = os.environ.get("CXX", "").split()
    found = next(filter(None, map(shutil.which, [*named[:1], "c++", "g++", "clang++"])), None)
    if found:
        return Finding("compiler", "OK", found)
    why = "no C++ compiler, only needed for torch.compile and for offloading by DeepSpeed"
    return Finding("compiler", "missing", why, "install g++ (Debian: apt install g++)")


def check_locks(locks: list[machine.BuildLock], folder: Path) -> Iterator[Finding]:
    """Report build locks: what needs that extension waits, silently, for one of a killed build."""
    for lock in locks:
        age = f"{lock.age / 60:.0f} min old"
        name = f"build lock {lock.path.parent.name}"
        if lock.holder is not None:
            yield Finding(name, "OK", f"process {lock.holder} is building, {age}")
        elif lock.age < STALE_AFTER:
            remedy = f"wait; if no other machine is building there, rm {lock.path}"
            yield Finding(name, "warning", f"{age}, no process here holds it", remedy)
        else:
            detail = f"stale ({age}, no process holds it): what needs it waits for ever"
            yield Finding(name, "warning", detail, f"rm {lock.path}")
    if not locks:
        yield Finding("build locks", "OK", f"none in {folder}")


def check_slurm() -> Finding:
    """Look for SLURM's commands."""
    found = shutil.which("sinfo") and shutil.which("sbatch")
    if found:
        return Finding("slurm", "OK", found)
    why = "not here, only needed for `inherclip submit`"
    return Finding("slurm", "missing", why, "log in to a submit node, or load its SLURM module")


def check_limits(shared_memory: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Report the limits that loader workers run into."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        plenty = soft == resource.RLIM_INFINITY or soft >= 4096
        upper = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        remedy = "" if plenty else f"ulimit -n {upper}, if many loader workers run"
        yield Finding("open files", "OK" if plenty else "warning", f"limit {soft}", remedy)
    if shared_memory.is_dir():
        usage = shutil.disk_usage(shared_memory)
        detail = f"{usage.free / GIGABYTE:.1f} GB free in {shared_memory}"
        remedy = "start the container with --shm-size=8g, or set the loader's workers to 0"
        enough = usage.free >= GIGABYTE
        yield Finding(
            "shared memory", "OK" if enough else "warning", detail, "" if enough else remedy
        )


def examine(out: Path) -> list[Finding]:
    """Run every check; takes about as long as importing torch in a process of its own."""
    probe = machine.start_gpu_probe() if version("torch") else None
    project, folder = wanted(), machine.extensions_folder()
    findings = [check_python(project.python)]
    findings += check_packages(project.packages, read_constraints())
    findings += filter(None, [check_torchvision_fits()])
    findings += check_extras(project.extras)
    findings += [check_cpu(machine.cores(), machine.cpu_limit()), check_memory(machine.memory())]
    findings += [check_disk(out), check_write(out), check_slurm()]
    findings += check_locks(machine.build_locks(folder), folder)
    findings += check_limits()
    gpus = (
        machine.finish_gpu_probe(probe) if probe else machine.Gpus(error="torch is not installed")
    )
    return [*findings, check_gpu(gpus), check_compiler()]


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `inherclip doctor`."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), help="folder that runs will be written to"
    )
    parser.add_argument(
        "--cluster", metavar="NAME", help="also ask SLURM whether this cluster profile fits"
    )
    parser.add_argument(
        "--probe", action="store_true", help="with --cluster: submit a job of at most a minute"
    )


def examine_cluster(name: str, probe_job: bool, out: Path) -> list[Finding]:
    """Ask SLURM whether a cluster profile fits; with `probe_job` also from a compute node.

    Raises:
        SlurmError: no SLURM here, or no such profile.
    """
    from slurm import probe
    from slurm.jobs import load_cluster

    cluster = load_cluster(name)
    found = probe.probe(cluster, out, [Path.cwd()]) if probe_job else probe.controller(cluster)
    return [Finding(f"{name}: {f.name}", f.state, f.text, f.remedy) for f in found]  # type: ignore[arg-type]


def run_doctor(args: argparse.Namespace) -> int:
    """Print the findings; return 1 when something needed is missing, else 0."""
    found = examine(args.out)
    if args.cluster:
        found += examine_cluster(args.cluster, args.probe, args.out)
    findings = [replace(f, remedy="") if f.status == "OK" else f for f in found]
    faults = [finding for finding in findings if finding.fatal]
    if args.json:
        print(json.dumps({"ok": not faults, "findings": list(map(asdict, findings))}, indent=2))
    else:
        _print_table(findings) if sys.stdout.isatty() else _print_lines(findings)
        names = ", ".join(finding.name for finding in faults)
        print(f"missing and needed: {names}" if faults else "everything needed is here")
    return 1 if faults else 0


def _print_lines(findings: list[Finding]) -> None:
    for finding in findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        print(f"{_label(finding):<18} {finding.name}: {finding.detail}{remedy}")


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"OK": "green", "warning": "yellow", "missing": "dim"}
    table = Table("", "what", "found", "remedy", box=None, header_style="dim")
    for finding in findings:
        style = "bold red" if finding.fatal else colours[finding.status]
        texts = (finding.name, finding.detail, finding.remedy)
        cells = (Text(text, overflow="fold") for text in texts)
        table.add_row(Text(_label(finding), style=style), *cells)
    Console().print(table)


def _label(finding: Finding) -> str:
    optional = finding.status == "missing" and not finding.needed
    return "missing (optional)" if optional else finding.status


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())
