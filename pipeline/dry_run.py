"""What a run would do, stage by stage, and what it would find missing; nothing is run."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from data_prep.errors import UserError
from data_prep.reader import ShardSet
from pipeline.experiment import Experiment, InheritedArm, PretrainedArm
from pipeline.graph import Graph, Stage
from pipeline.runner import FAILED, check_arms


def dry_run(experiment: Experiment, run: Path, only: list[str] | None, say: Console) -> int:
    """Print stage by stage what would run and what is missing; return 2 if anything is."""
    check_arms(experiment, only)
    graph = Graph(experiment, run)
    missing = find_missing(experiment, graph)
    samples = known_samples(experiment, graph)
    table = Table(box=box.SIMPLE_HEAD, title=f"{experiment.name} in {run}", title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for column in ("samples", "steps", "processes"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in graph.wanted(only):
        state = "to do"
        if not missing:
            state = "done" if graph.is_done(stage.name) else "to do"
        elif stage.verb in ("data", "obtain"):
            state = "missing" if _concerns(stage, missing) else "to do"
        table.add_row(stage.name, state, *_size(experiment, stage, samples))
    say.print(table)
    for line in _facts(experiment, samples):
        say.print(line, highlight=False, markup=False, soft_wrap=True)
    if missing:
        say.print("\nMissing:", style="bold red")
        for what, todo in missing.values():
            say.print(f"  {what}\n    -> {todo}", highlight=False, markup=False, soft_wrap=True)
        return FAILED
    say.print("\nNothing is missing.", highlight=False)
    return 0


def _concerns(stage: Stage, missing: dict[str, tuple[str, str]]) -> bool:
    if stage.verb == "data":
        return any(key.startswith(("train", "set:")) for key in missing)
    return f"arm:{stage.arm}" in missing


def find_missing(experiment: Experiment, graph: Graph) -> dict[str, tuple[str, str]]:
    """Return what is not here, as {place: (what, what to do)}: shards, evaluation sets, weights."""
    missing: dict[str, tuple[str, str]] = {}
    if experiment.data.scenes is None and experiment.data.prepare is None:
        try:
            ShardSet.find(graph.data_root, experiment.data.train)
        except UserError as error:
            missing["train"] = (f"training shards: {error.where or ''} {error.what}", error.todo)
    if experiment.data.scenes is None:
        for item in experiment.eval.with_root(graph.data_root).everything:
            try:
                item.open()
            except UserError as error:
                what = f"evaluation set {item.name}: {error.where or ''} {error.what}"
                missing[f"set:{item.name}"] = (what, error.todo)
    for name, arm in experiment.arms.items():
        if isinstance(arm, PretrainedArm):
            from pipeline.teachers import missing_weights

            lacking = missing_weights(arm.weights)
            if lacking:
                todo = "they are downloaded on the first run where there is internet access"
                missing[f"arm:{name}"] = (f"arm {name}: {lacking}", todo)
    if experiment.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            missing["device"] = (
                "a GPU (device: cuda)", "run on a GPU node, or submit with `inherclip submit`"
            )  # fmt: skip
    return missing


def known_samples(experiment: Experiment, graph: Graph) -> int | None:
    """Return the training pairs that are here, else the official number, else None."""
    data = experiment.data
    if data.scenes is not None:
        return data.scenes.train
    try:
        return ShardSet.find(graph.data_root, data.train).num_samples
    except UserError:
        return data.expected_samples


def _size(experiment: Experiment, stage: Stage, samples: int | None) -> tuple[str, str, str]:
    known = f"{samples:,}" if samples else "?"
    if stage.verb == "data":
        return known, "-", "1"
    if stage.verb == "train":
        train = experiment.arms[str(stage.arm)].train  # type: ignore[union-attr]
        steps = train.length(samples)
        if steps is None:
            return "?", f"{train.epochs:g} epochs", str(experiment.processes)
        return f"{steps * train.batch_size:,}", f"{steps:,}", str(experiment.processes)
    if stage.verb == "inherit":
        arm = experiment.arms[str(stage.arm)]
        assert isinstance(arm, InheritedArm)
        return f"{arm.calibration:,}", "-", "1"
    return "-", "-", "1"


def _facts(experiment: Experiment, samples: int | None) -> list[str]:
    """Return what a reader would otherwise work out by hand: epochs and sizes per arm."""
    lines = []
    for name, arm in experiment.arms.items():
        if isinstance(arm, PretrainedArm):
            lines.append(f"{name}: {arm.weights}, not trained")
            continue
        train = arm.train
        steps = train.length(samples)
        length = f"{train.epochs:g} epochs" if steps is None else f"{steps:,} steps"
        passes = steps * train.batch_size / samples if steps and samples else None
        epochs = "" if passes is None else f", {passes:.1f} epochs"
        what = (
            f"budget {arm.budget}, {arm.heads} heads, init {arm.init}"
            if isinstance(arm, InheritedArm)
            else f"{_count(arm.model) / 1e6:.2f} M parameters"
        )
        losses = " + ".join(
            f"{term.weight:g} {loss}" if term.weight != 1 else loss
            for loss, term in arm.objective.terms.items()
        )
        lines.append(f"{name}: {what}; {losses}; {length} of {train.batch_size:,} pairs{epochs}")
    return lines


def _count(architecture: object) -> int:
    """Return the parameters of an architecture without allocating them."""
    import torch

    from pipeline.models import build, parameters

    assert isinstance(architecture, dict)
    with torch.device("meta"):
        return parameters(build(architecture))
