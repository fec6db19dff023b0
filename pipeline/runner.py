"""Run an experiment's stages on this machine: skip what is done, redo what changed, stop safely."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from data_prep.errors import UserError
from data_prep.files import atomic_write
from pipeline.experiment import Experiment, write_resolved
from pipeline.graph import Graph, Stage
from pipeline.tracking import duration
from pipeline.train.signals import INTERRUPTED, RESUME_ME, StopRequested

FAILED = 2
STOPPED = "stopped.json"  # left by ranks that saved on a signal, for the process that started them


def run_experiment(experiment: Experiment, run: Path, only: list[str] | None, say: Console) -> int:
    """Run all stages that are not done; return the process's exit code.

    An arm that fails does not take the others with it: it becomes a marked row of the table.

    Raises:
        UserError: an arm in `only` does not exist, or the data are missing.
        StopRequested: a signal stopped a training, which is saved.
    """
    check_arms(experiment, only)
    run.mkdir(parents=True, exist_ok=True)
    write_resolved(experiment, run)
    graph = Graph(experiment, run)
    wanted = graph.wanted(only)
    graph.fingerprint("data")
    started, failed, ran = time.time(), {}, 0
    for stage in wanted:
        blocked = [name for name in stage.after if name in failed]
        if blocked and stage.verb != "compare":
            failed[stage.name] = f"{blocked[0]} failed"
            _mark_arm(run, stage, "failed", failed[stage.name])
            continue
        if graph.is_done(stage.name) and not (stage.verb == "compare" and (ran or failed)):
            continue
        try:
            _run_one(experiment, graph, stage, started, say)
            ran += 1
        except UserError as error:
            if stage.arm is None:
                raise
            failed[stage.name] = str(error)
            _mark_arm(run, stage, "failed", str(error))
            say.print(f"[red]{stage.name} failed[/]: {error}", highlight=False)
    if not ran and not failed:
        say.print(f"Nothing to do: every stage of {run} is finished.", highlight=False)
    show_result(run, say)
    return FAILED if failed else 0


def _run_one(
    experiment: Experiment, graph: Graph, stage: Stage, started: float, say: Console
) -> None:
    begun = time.time()
    say.print(f"[bold]{stage.name}[/]", highlight=False)
    graph.forget(stage.name)
    if stage.verb == "compare":
        _write_run_info(graph.run, started)
    if stage.verb == "train" and experiment.processes > 1:
        _launch(graph.run, str(stage.arm), experiment.processes)
    else:
        stage_here(experiment, graph, stage, say)
    seconds = time.time() - begun
    if stage.verb == "compare" and any(not graph.is_done(name) for name in stage.after):
        return  # a table with holes is shown, but not final
    _conclude(graph, stage, seconds)
    say.print(f"  done in {duration(seconds)}", style="dim", highlight=False)


def stage_here(experiment: Experiment, graph: Graph, stage: Stage, say: Console) -> None:
    """Run one stage in this process."""
    from pipeline.stages import Workplace, run_stage

    def line(text: str) -> None:
        say.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    run_stage(Workplace(experiment, graph, line), stage)


def run_single(experiment: Experiment, run: Path, name: str, say: Console) -> int:
    """Run exactly one stage, whose inputs must be there: what a SLURM job or a rank does.

    Raises:
        UserError: no such stage, or an earlier stage is not done.
    """
    graph = Graph(experiment, run)
    if name not in graph.stages:
        raise UserError(f"no stage {name!r}", todo=f"stages of this run: {', '.join(graph.stages)}")
    stage = graph.stages[name]
    main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    if graph.is_done(name) and name != "compare":
        if main:
            say.print(f"{name} is finished already", highlight=False)
        return 0
    missing = [earlier for earlier in stage.after if not graph.is_done(earlier)]
    if missing and stage.verb != "compare":
        raise UserError(
            f"{name} needs {', '.join(missing)} first",
            where=str(run),
            todo="run `inherclip run` on the same configuration, or these stages one by one",
        )
    begun = time.time()
    if main:
        graph.run.mkdir(parents=True, exist_ok=True)
        if not (run / "config.yaml").is_file():
            write_resolved(experiment, run)
        _mark_arm(run, stage, "running", "")
        if stage.verb == "compare":
            _write_run_info(run, begun)
    try:
        stage_here(experiment, graph, stage, say)
    except UserError as error:
        if main:
            _mark_arm(run, stage, "failed", str(error))
        raise
    except StopRequested as stop:
        if main:
            atomic_write(run / "arms" / str(stage.arm) / STOPPED, json.dumps({"step": stop.step}))
        raise
    except Exception as error:
        if main:
            _mark_arm(run, stage, "failed", f"{type(error).__name__}: {error}")
        raise
    if main and not missing:
        _conclude(graph, stage, time.time() - begun)
    return 0


def _conclude(graph: Graph, stage: Stage, seconds: float) -> None:
    """Mark a stage as done, then remove what only an unfinished one needs."""
    graph.mark_done(stage.name, seconds)
    if stage.verb == "prepare":
        graph.look_again()
    if stage.arm:
        folder = graph.run / "arms" / stage.arm
        (folder / "status.json").unlink(missing_ok=True)
        if stage.verb == "train":
            shutil.rmtree(folder / "resume", ignore_errors=True)


def run_slice(experiment: Experiment, run: Path, part: str, say: Console) -> int:
    """Run one slice I/N of the stage `prepare`: what one job of an array does.

    Raises:
        UserError: the experiment prepares no data, or the preparation failed.
    """
    from data_prep.prepare import parse_slice
    from pipeline.stages import Workplace, prepare

    if experiment.data.prepare is None:
        raise UserError("the experiment prepares no data", where="data.prepare")
    graph = Graph(experiment, run)
    begun = time.time()
    if prepare(Workplace(experiment, graph, say.print), *parse_slice(part)):
        graph.mark_done("prepare", time.time() - begun)
    return 0


def _launch(run: Path, arm: str, processes: int) -> None:
    """Train one arm in several processes of this machine through torchrun.

    Raises:
        UserError: the processes failed; their output was shown above.
        StopRequested: they saved and stopped on a signal.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", "-m", "pipeline.cli",
        "train", str(run / "config.yaml"), "--arm", arm, "--out", str(run),
    ]  # fmt: skip
    marker = run / "arms" / arm / STOPPED
    marker.unlink(missing_ok=True)
    child = subprocess.Popen(command, env={"OMP_NUM_THREADS": "1"} | os.environ)
    with _forwarded(child) as received:
        code = child.wait()
    if marker.is_file():
        step = json.loads(marker.read_text())["step"]
        marker.unlink()
        raise StopRequested(INTERRUPTED if signal.SIGINT in received else RESUME_ME, step)
    if code:
        raise UserError(
            f"training {arm} in {processes} processes ended with code {code}",
            where=shlex.join(command[3:]),
            todo="the reason stands above; the same command continues from the last checkpoint",
        )


@contextmanager
def _forwarded(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass signals on to torchrun, which tells its ranks to save; yield what was received."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        if number != signal.SIGINT or not sys.stdin.isatty():  # a terminal tells its whole group
            child.send_signal(signal.SIGTERM)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_arms(experiment: Experiment, only: list[str] | None) -> None:
    """Refuse names that are no arms of the experiment."""
    unknown = [name for name in only or [] if name not in experiment.arms]
    if unknown:
        raise UserError(f"no arm {unknown[0]!r}", todo=f"arms: {', '.join(experiment.arms)}")


def _mark_arm(run: Path, stage: Stage, state: str, reason: str) -> None:
    if stage.arm:
        status = {"stage": stage.name, "state": state, "reason": reason}
        atomic_write(run / "arms" / stage.arm / "status.json", json.dumps(status) + "\n")


def _write_run_info(run: Path, started: float) -> None:
    """Write `run.json`: what the report says about where and how long the run took."""
    stages = {}
    for path in sorted((run / "stages").glob("*.json")):
        marker = json.loads(path.read_text())
        stages[marker["stage"]] = marker["seconds"]
    info = {
        "command": "inherclip " + shlex.join(sys.argv[1:]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "seconds": round(sum(stages.values()), 1),
        "stages": stages,
        "hardware": _hardware(),
    }
    atomic_write(run / "run.json", json.dumps(info, indent=1) + "\n")


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()}), no GPU"


def show_result(run: Path, say: Console) -> None:
    """Print the comparison table and where the report lies."""
    table = run / "compare.md"
    if table.is_file():
        say.print()
        say.print(table.read_text().rstrip(), markup=False, highlight=False, soft_wrap=True)
        say.print(f"\nreport: {run / 'report.html'}", highlight=False)
