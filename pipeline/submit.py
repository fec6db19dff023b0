"""An experiment's graph as SLURM jobs: which command each stage is, and when it is done."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.dry_run import known_samples
from pipeline.experiment import Experiment, PretrainedArm, load_experiment, write_resolved
from pipeline.graph import Graph, Stage
from slurm import jobs


def run_submit(args: argparse.Namespace) -> int:
    """Submit what is not done of an experiment; `--dry-run` prints the scripts instead.

    Raises:
        UserError: a fault of the configuration, or missing data.
        SlurmError: no SLURM here, an unknown cluster, or a job that SLURM refuses.
    """
    from slurm.submit import submit_graph

    experiment = load_experiment(args.config, args.set)
    run = (args.out or Path("runs") / experiment.name).absolute()
    cluster = jobs.load_cluster(args.cluster)
    graph = Graph(experiment, run)
    if not args.dry_run:
        run.mkdir(parents=True, exist_ok=True)
        graph.fingerprint("data")  # names missing shards now and not in the night
        write_resolved(experiment, run)
    stages = [
        slurm_stage(experiment, graph, stage, cluster, args.dry_run)
        for stage in graph.stages.values()
    ]
    return submit_graph(stages, cluster, run, dry_run=args.dry_run)


def slurm_stage(
    experiment: Experiment,
    graph: Graph,
    stage: Stage,
    cluster: jobs.ClusterProfile,
    dry_run: bool = False,
) -> jobs.Stage:
    """Return one stage as SLURM sees it.

    The training command is the one that torchrun starts on a single machine; the comparison runs
    whatever became of the arms, so that a failed arm is a marked row and not a lost table.
    """
    python = cluster.python or sys.executable
    config = str(graph.run / "config.yaml")
    command = [python, "-m", "pipeline.cli", "run", config, "--out", str(graph.run)]
    command += ["--stage", stage.name]
    # Where the data are still to be made, their fingerprint is not known yet.
    known = not dry_run and experiment.data.prepare is None
    identity = graph.fingerprint(stage.name) if known else ""
    slices = None
    if stage.verb == "prepare" and experiment.data.prepare is not None:
        slices = experiment.data.prepare.slices
        command += ["--slice", "{slice}/{slices}"]
    progress = total = None
    arm = experiment.arms[stage.arm] if stage.arm else None
    if stage.verb == "train" and arm is not None and not isinstance(arm, PretrainedArm):
        command = [python, "-m", "pipeline.cli", "train", config]
        command += ["--arm", str(stage.arm), "--out", str(graph.run)]
        progress = graph.run / "arms" / str(stage.arm) / "train.jsonl"
        total = arm.train.length(known_samples(experiment, graph))
    return jobs.Stage(
        name=stage.name,
        command=command,
        resources=cluster.for_kind(stage.verb),
        after=stage.after,
        after_any=stage.verb == "compare",
        array=slices,
        done=_done(graph, stage.name),
        resumable=stage.verb == "train",
        progress=progress,
        total=total,
        identity=identity,
    )


def _done(graph: Graph, name: str) -> Callable[[], bool]:
    def check() -> bool:
        # a table is final only with all its rows
        return graph.is_done(name) and all(graph.is_done(n) for n in graph.stages[name].after)

    return check
