"""What each stage of an experiment does, from its inputs in the run folder to its outputs there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from data_prep.files import atomic_write
from data_prep.reader import ShardSet
from data_prep.shards import manifest_path
from eval.suite import Suite
from pipeline.experiment import Arm, Experiment, InheritedArm, PretrainedArm, ScratchArm
from pipeline.graph import Graph, Stage
from pipeline.models import Clip, build, load_checkpoint, parameters, save_checkpoint
from pipeline.tracking import duration
from pipeline.train.processes import Processes, choose_device, join

Say = Callable[[str], None]


@dataclass
class Workplace:
    """An experiment in its run folder, as the stages see it."""

    experiment: Experiment
    graph: Graph
    say: Say

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.graph.run

    def folder(self, arm: str) -> Path:
        """Return `runs/NAME/arms/ARM`."""
        return self.run / "arms" / arm

    def checkpoint(self, arm: str) -> Clip:
        """Load an arm's finished checkpoint."""
        return load_checkpoint(self.folder(arm) / "checkpoint")

    def training_shards(self) -> ShardSet:
        """Find the training shards, and name a shortfall against the official number."""
        data = self.experiment.data
        shards = ShardSet.find(self.graph.data_root, data.train)
        if data.expected_samples and shards.num_samples < data.expected_samples:
            share = shards.num_samples / data.expected_samples
            self.say(
                f"data: {shards.num_samples:,} of {data.expected_samples:,} official training "
                f"pairs are here ({share:.1%})"
            )
        return shards


def run_stage(place: Workplace, stage: Stage) -> None:
    """Run one stage in this process, or in this rank of a launched training.

    Raises:
        UserError: an input is missing or wrong.
        StopRequested: a signal stopped a training, which is saved.
    """
    arm = place.experiment.arms[stage.arm] if stage.arm else None
    bodies: dict[str, Callable[[Workplace, str, Any], None]] = {
        "obtain": _obtain,
        "inherit": _inherit,
        "train": _train,
        "evaluate": _evaluate,
    }
    if stage.verb == "prepare":
        prepare(place, 0, 1)
    elif stage.verb == "data":
        _data(place)
    elif stage.verb == "compare":
        compare(place.run)
    else:
        bodies[stage.verb](place, str(stage.arm), arm)


def prepare(place: Workplace, part: int, parts: int) -> bool:
    """Make the training shards, or one slice of them; return whether all slices are done.

    Raises:
        UserError: the preparation ended with a fault; the finished shards are kept.
    """
    import argparse

    from data_prep.commands import add_prepare_arguments, run_prepare

    settings = place.experiment.data.prepare
    assert settings is not None
    arguments = [*settings.arguments, "--out", str(place.graph.data_root)]
    if parts > 1:
        arguments += ["--slice", f"{part}/{parts}"]
    parser = argparse.ArgumentParser(prog="data.prepare.arguments")
    add_prepare_arguments(parser)
    args = parser.parse_args(arguments)
    code = run_prepare(args)
    if code:
        raise UserError(
            f"preparing the data ended with code {code}",
            where="inherclip prepare " + " ".join(arguments),
            todo="the reason stands above; finished shards are kept, the same command continues",
        )
    # the slice that ends last writes the manifest of all
    return parts == 1 or manifest_path(place.graph.data_root, args.prefix).is_file()


def _data(place: Workplace) -> None:
    scenes = place.experiment.data.scenes
    if scenes is not None:
        from data_prep.scenes import build_scenes

        build_scenes(scenes, place.graph.data_root)
    for item in suite(place).everything:
        item.open()
    shards = place.training_shards()
    if place.experiment.data.prepare is not None:
        _verify(place)
    place.say(f"data: {shards.num_samples:,} training pairs in {len(shards.shards)} shards")


def _verify(place: Workplace) -> None:
    """Check freshly made shards against their manifest before days of training depend on them."""
    from data_prep.verify import verify

    found = verify(place.graph.data_root, place.experiment.data.train, decode=False).findings
    if found:
        raise UserError(
            f"{len(found)} things are wrong with the prepared shards, e.g. {found[0]}",
            where=str(place.graph.data_root),
            todo="see all with `inherclip verify`; `--repair` drops what is broken",
        )


def suite(place: Workplace) -> Suite:
    """Return the evaluation suite with the run's data folder where a set names none."""
    return place.experiment.eval.with_root(place.graph.data_root)


def _obtain(place: Workplace, name: str, arm: PretrainedArm) -> None:
    from pipeline.teachers import load_teacher

    save_checkpoint(load_teacher(arm.weights), place.folder(name) / "checkpoint")


def _inherit(place: Workplace, name: str, arm: InheritedArm) -> None:
    import json

    from pipeline.inherit import inherit

    teacher = place.checkpoint(arm.teacher)
    torch.manual_seed(place.experiment.seed)
    batches = calibration_pairs(
        place.training_shards(), teacher, arm.calibration, place.experiment.seed
    )
    model, plan = inherit(
        teacher.model,
        budget=arm.budget,
        calibration=batches or None,
        heads=arm.heads,
        arm=arm.init,
        seed=place.experiment.seed,
        **arm.options,
    )
    clip = Clip(
        model.eval(),
        teacher.architecture,
        plan.structure,
        {"arm": name, "teacher_sha256": teacher.sha256, "budget": arm.budget, "init": arm.init,
         "heads": arm.heads, "calibration": arm.calibration, "seed": place.experiment.seed},
    )  # fmt: skip
    save_checkpoint(clip, place.folder(name) / "inherited")
    atomic_write(place.folder(name) / "plan.json", json.dumps(plan.to_dict(), indent=1) + "\n")
    before, after = parameters(teacher.model), parameters(model)
    place.say(f"{name}: {before:,} parameters -> {after:,} ({after / before:.3f} of the teacher)")


def calibration_pairs(
    shards: ShardSet, clip: Clip, count: int, seed: int, batch_size: int = 64
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return `count` training pairs as evaluation-time batches (images [b,3,S,S], tokens [b,L]).

    Raises:
        UserError: fewer readable pairs than asked for.
    """
    import io

    from PIL import Image

    transform, tokenizer = clip.transform(), clip.tokenizer()
    images: list[torch.Tensor] = []
    captions: list[str] = []
    for index in shards.epoch_order(seed, 0):
        if len(images) == count:
            break
        raw = shards.read(int(index))
        try:
            with Image.open(io.BytesIO(raw.image_bytes)) as image:
                images.append(transform(image.convert("RGB")))
        except (OSError, ValueError):
            continue
        captions.append(raw.captions[0])
    if len(images) < count:
        raise UserError(
            f"calibration asks for {count} pairs, the shards hold {len(images)} readable ones",
            where="calibration",
            todo="lower the arm's `calibration`, or give more shards",
        )
    tokens = tokenizer(captions) if captions else None
    return [
        (torch.stack(images[at : at + batch_size]), tokens[at : at + batch_size])
        for at in range(0, count, batch_size)
        if tokens is not None
    ]


def _train(place: Workplace, name: str, arm: ScratchArm | InheritedArm) -> None:
    device = place.experiment.device
    processes = join(device, arm.train.timeout_minutes)
    clip, position = _trained(place, name, arm, processes)
    if processes.is_main:
        clip.provenance |= {
            "arm": name,
            "steps": position.step,
            "samples": position.samples,
            "corrupt_samples": position.corrupt,
            "batch_size": arm.train.batch_size,
            "seed": place.experiment.seed,
            "data": place.graph.fingerprint("data"),
            "training": place.graph.fingerprint(f"train:{name}"),
            "world_size": processes.world_size,
        }
        save_checkpoint(clip, place.folder(name) / "checkpoint")
        place.say(f"{name}: trained {position.step} steps in {duration(position.seconds)}")
    processes.barrier()


def _trained(
    place: Workplace, name: str, arm: ScratchArm | InheritedArm, processes: Processes
) -> tuple[Clip, Any]:
    from pipeline.objectives.objective import build as build_objective
    from pipeline.train.loop import Job, train

    experiment = place.experiment
    if isinstance(arm, InheritedArm):
        student = load_checkpoint(place.folder(name) / "inherited")
    else:
        architecture = arm.model
        assert isinstance(architecture, dict)  # resolved when the experiment was loaded
        student = Clip(build(architecture, experiment.seed), architecture)
    needs_teacher = arm.objective.needs_teacher
    teacher = place.checkpoint(str(arm.teacher)) if needs_teacher else None
    job = Job(
        arm=name,
        student=student,
        teacher=teacher,
        objective=build_objective(
            arm.objective, student.embed_dim, teacher.embed_dim if teacher else None,
            experiment.seed,
        ),
        shards=place.training_shards(),
        settings=arm.train,
        seed=experiment.seed,
        folder=place.folder(name),
        fingerprint=place.graph.fingerprint(f"train:{name}"),
        say=place.say if processes.is_main else lambda _: None,
        validate=_look(place, processes) if arm.train.validate_every else None,
    )  # fmt: skip
    return student, train(job, processes)


def _look(place: Workplace, processes: Processes) -> Callable[[Clip], dict[str, float]]:
    """Return how a model under training is measured: on the suite's quick set."""
    from eval.suite import evaluate

    settings = suite(place)
    assert settings.quick is not None  # refused when the experiment was loaded
    quick = settings.quick

    def look(clip: Clip) -> dict[str, float]:
        return evaluate(
            clip.model,
            clip.transform(),
            clip.tokenizer(),
            [quick],
            batch_size=settings.batch_size,
            device=processes.device,
            workers=settings.workers,
            efficiency=False,
        )

    return look


def _evaluate(place: Workplace, name: str, arm: Arm) -> None:
    folder = place.folder(name)
    if isinstance(arm, InheritedArm):
        _measure(place, name, load_checkpoint(folder / "inherited"), before=True)
    _measure(place, name, load_checkpoint(folder / "checkpoint"))


def _measure(place: Workplace, name: str, clip: Clip, *, before: bool = False) -> None:
    from eval.examples import write_examples
    from eval.results import write_result
    from pipeline.evaluate import measure

    settings = suite(place)
    device = choose_device(place.experiment.device)
    result = measure(clip, settings, device)
    folder = place.folder(name)
    stage = "before_training" if before else "final"
    if not before:
        result.write_queries(folder / "queries.npz")
        shown_set = next((item for item in settings.sets if item.kind == "retrieval"), None)
        if shown_set is not None and settings.examples:
            write_examples(
                clip.model,
                clip.transform(),
                clip.tokenizer(),
                shown_set,
                folder,
                embedded=result.embedded[shown_set.name],
                count=settings.examples,
            )
    write_result(
        folder / ("eval_before.json" if before else "eval.json"),
        arm=name,
        checkpoint_sha256=str(clip.sha256),
        metrics=result.metrics,
        stage=stage,
        seed=place.experiment.seed,
        steps=0 if before else clip.provenance.get("steps"),
        data=place.graph.fingerprint("data"),
        conditions=result.conditions,
    )
    shown = [
        f"{metric} {value:.3f}"
        for metric, value in result.metrics.items()
        if metric.endswith(("i2t_r1", "t2i_r10", "top1"))
    ]
    place.say(f"{name}{' before training' if before else ''}: {', '.join(shown)}")


def compare(run: Path) -> None:
    """Write `compare.csv`, `compare.md` and `report.html` from what the arms left behind."""
    import json

    from eval.compare import write_comparison
    from eval.report import write_report
    from slurm.status import broken_arms

    for arm, (state, reason) in broken_arms(run).items():
        status = {"state": state, "reason": reason}
        atomic_write(run / "arms" / arm / "status.json", json.dumps(status) + "\n")
    write_comparison(run)
    write_report(run)
