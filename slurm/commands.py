"""Arguments and bodies of `inherclip submit|status|cancel|logs`, as far as they are SLURM's."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path


def add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `inherclip submit` asks beyond the experiment itself."""
    parser.add_argument(
        "--cluster",
        required=True,
        metavar="NAME",
        help="profile: a name from configs/clusters, or a YAML file",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the graph and the job scripts; submit nothing; needs no SLURM",
    )


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inherclip status`."""
    parser.add_argument("folder", metavar="run", type=Path, help="run folder, e.g. runs/demo")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=10.0,
        metavar="SECONDS",
        help="show it again every SECONDS (10) until everything has ended",
    )
    parser.add_argument("--json", action="store_true", help="for other programs")
    parser.epilog = "exit code: 0 all well so far, 1 something failed or was cancelled"


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.5 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.5 and 86400")
    return value


def run_status(args: argparse.Namespace) -> int:
    """Show the state of a submitted run.

    Raises:
        SlurmError: nothing was submitted from this folder.
    """
    from slurm import status

    reader = status.Reader(args.folder)
    while True:
        ledger, jobs = reader.read()
        if args.json:
            print(status.as_json(str(args.folder), ledger, jobs), flush=True)
        else:
            if args.watch and sys.stdout.isatty():
                print("\x1b[2J\x1b[H", end="")
            width = shutil.get_terminal_size((120, 24)).columns
            print(status.table(str(args.folder), ledger, jobs, width))
            if not reader.reachable:
                print("\nSLURM does not answer here: this is what the run folder knows")
            print(f"\n{status.summary(jobs)}", flush=True)
        moving = any(job.state in ("running", "waiting", "suspended", "held") for job in jobs)
        if not args.watch or not moving:
            bad = ("failed", "cancelled", "preempted", "unknown")
            return 1 if any(job.state in bad for job in jobs) else 0
        time.sleep(args.watch)


def _add_run_and_stage(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("folder", metavar="run", type=Path, help="run folder, e.g. runs/demo")
    parser.add_argument(
        "stage", nargs="?", help=f"stage (train:student) or arm (student) {what}; default: all"
    )


def _chosen(run: Path, name: str | None) -> list[tuple[str, int | None, str, str]]:
    """Return (stage, slice, job, state) of the jobs that a stage or arm name means."""
    from slurm import status
    from slurm.errors import SlurmError

    _, jobs = status.Reader(run).read()
    chosen = [j for j in jobs if name is None or name in (j.stage, *j.stage.split(":")[1:])]
    if not chosen:
        known = ", ".join(dict.fromkeys(job.stage for job in jobs))
        raise SlurmError(f"no stage or arm {name!r}", where=str(run), todo=f"stages: {known}")
    return [(job.stage, job.slice, job.job, job.state) for job in chosen]


def add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inherclip cancel`."""
    _add_run_and_stage(parser, "to cancel")


def run_cancel(args: argparse.Namespace) -> int:
    """Cancel what waits or runs of a run, or of one of its arms.

    Raises:
        SlurmError: no such run or stage, or no SLURM.
    """
    from slurm import client

    jobs = [
        job
        for _, _, job, state in _chosen(args.folder, args.stage)
        if state in ("running", "waiting", "suspended", "held")
    ]
    client.cancel(jobs)
    print(f"cancelled {', '.join(jobs)}" if jobs else "nothing waits or runs")
    return 0


def add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inherclip logs`."""
    _add_run_and_stage(parser, "to show")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as the log grows")
    parser.add_argument("-n", "--lines", type=int, default=40, help="lines per log (default: 40)")


def run_logs(args: argparse.Namespace) -> int:
    """Show the end of the logs of a run, or of one of its arms.

    Raises:
        SlurmError: no such run or stage.
    """
    from slurm import status
    from slurm.ledger import Folder

    folder = Folder(args.folder)
    files = []
    for stage, part, job, state in _chosen(args.folder, args.stage):
        log = folder.log(stage, part, job) if job else None
        if log is None or not log.is_file():
            print(f"==> {stage}: {state}, no log yet", flush=True)
            continue
        files.append(log)
        if not args.follow:
            print(f"==> {stage}{'' if part is None else f' [{part}]'}: {state}, {log}")
            print("\n".join(status.tail(log).splitlines()[-args.lines :]), flush=True)
    if args.follow and files:
        return subprocess.call(["tail", "-n", str(args.lines), "-F", *map(str, files)])
    return 0
