"""The training loop: shards, student and objective in; trained student and `train.jsonl` out.

One loop serves one process and many nodes. What a step does depends on the step number, the seed
and the restored state alone, so an interrupted run ends with the same weights as an undisturbed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from data_prep.reader import BatchSchedule, CorruptionBudget, ShardSet
from pipeline.models import Clip, preprocessing
from pipeline.objectives.objective import Objective
from pipeline.tracking import Rates, Record, TrainLog, console_line
from pipeline.train.checkpoint import Position, ResumeFolder, average_batchnorm
from pipeline.train.engine import start_engine
from pipeline.train.loader import Batch, Normalise, TrainingPairs, training_batches
from pipeline.train.processes import Processes
from pipeline.train.settings import TrainSettings
from pipeline.train.signals import StopRequested, StopSignals
from pipeline.train.step import (
    Trainee,
    cached_step,
    gradient_norm,
    plain_step,
    refuse_non_finite,
    teacher_features,
)


@dataclass
class Job:
    """All that one arm's training needs.

    Attributes:
        arm: The arm's name, for messages.
        student: Trained in place.
        teacher: Frozen; None where the objective needs none.
        objective: The loss, with its own parameters.
        shards: Training pairs.
        settings: Steps, batch, learning rate and so on.
        seed: Of order, augmentation and views.
        folder: `runs/NAME/arms/ARM`.
        fingerprint: Hash of everything that shapes this training.
        say: Where console lines go (rank 0 only).
    """

    arm: str
    student: Clip
    teacher: Clip | None
    objective: Objective
    shards: ShardSet
    settings: TrainSettings
    seed: int
    folder: Path
    fingerprint: str
    say: Callable[[str], None]


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """Return the factor of the peak learning rate in update `step` (0 is the first)."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def train(job: Job, processes: Processes) -> Position:
    """Train `job.student` in place for the steps that are still to do.

    Raises:
        UserError: the batch does not divide over the processes, too many corrupt samples, a loss
            that is not finite, no space for a checkpoint.
        StopRequested: a signal asked to stop; the state is saved.
    """
    check_models(job)
    torch.manual_seed(job.seed * 1_000_003 + processes.rank)
    settings = job.settings
    trainee = Trainee(job.student.model.train(), job.objective, settings.max_logit_scale)
    engine, optimizer = start_engine(trainee, settings, processes)
    if job.teacher is not None:
        job.teacher.model.to(processes.device).eval().requires_grad_(False)
        if settings.channels_last:
            job.teacher.model.to(memory_format=torch.channels_last)
    resume = ResumeFolder(job.folder / "resume", job.fingerprint, settings.keep, job.say)
    position = resume.restore(engine, processes) or Position(0, 0)
    log = TrainLog(job.folder / "train.jsonl", position.step) if processes.is_main else None
    if position.step:
        job.say(f"{job.arm}: resuming after step {position.step} of {settings.steps}")
    with StopSignals() as signals:
        position = _run(job, processes, engine, optimizer, resume, position, log, signals)
    average_batchnorm(trainee, processes)
    job.student.model.eval()
    return position


def _run(
    job: Job,
    processes: Processes,
    engine: Any,
    optimizer: torch.optim.Optimizer,
    resume: ResumeFolder,
    position: Position,
    log: TrainLog | None,
    signals: StopSignals,
) -> Position:
    settings = job.settings
    update = _Updater(job, processes, engine, optimizer)
    first, earlier = position.step, position.seconds
    budget = CorruptionBudget(settings.max_corrupt_share)
    budget.seen, budget.corrupt = position.samples, position.corrupt
    started = last_save = time.perf_counter()
    rates = Rates()
    for step, batch, waited in _batches(job, processes, first):
        record = update(step, batch)
        elsewhere = int(processes.total(len(batch.corrupt))) - len(batch.corrupt)
        messages = [*batch.corrupt, *["one read by another rank"] * elsewhere]
        budget.count(settings.batch_size, messages)  # on all ranks alike: none is left waiting
        seen = (step + 1) * settings.batch_size
        rates.add(settings.batch_size, waited)
        done = step + 1
        position = Position(done, seen, budget.corrupt, earlier + time.perf_counter() - started)
        if log and (done % settings.log_every == 0 or done in (1, settings.steps)):
            record = {"step": done, "samples": seen, **record, **rates.read()}
            record |= {"corrupt": budget.corrupt, "seconds": round(position.seconds, 3)}
            log.write(record)
            job.say(console_line(job.arm, record, settings.steps, started, first))
        late = time.perf_counter() - last_save > settings.save_every_minutes * 60
        code = int(processes.maximum(signals.code))
        due = done % settings.save_every == 0 or processes.any(late) or code
        if due and done < settings.steps:
            resume.save(engine, position, processes)
            last_save = time.perf_counter()
            rates.reset()
        if code and done < settings.steps:
            raise StopRequested(code, done)
    return position


def _batches(job: Job, processes: Processes, first: int) -> Iterator[tuple[int, Batch, float]]:
    """Yield (step, this rank's batch, seconds waited for it) from step `first` on."""
    settings = job.settings
    schedule = BatchSchedule(
        job.shards,
        settings.batch_size // processes.world_size,
        processes.rank,
        processes.world_size,
        job.seed,
    )
    pairs = TrainingPairs(
        job.shards,
        job.student.tokenizer(),
        job.student.image_size,
        settings.augment,
        job.seed,
        settings.cache_decoded,
    )
    loader = training_batches(
        pairs,
        schedule,
        start=first,
        end=settings.steps,
        workers=settings.workers,
        pin=processes.device.type == "cuda",
    )
    asked = time.perf_counter()
    for step, batch in enumerate(loader, first):
        yield step, batch, time.perf_counter() - asked
        asked = time.perf_counter()


class _Updater:
    """One optimizer update, with what it needs held between updates."""

    def __init__(
        self, job: Job, processes: Processes, engine: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        self.job, self.processes, self.engine = job, processes, engine
        self.groups = getattr(optimizer, "param_groups", None) or engine.optimizer.param_groups
        shape = preprocessing(job.student.architecture)
        self.normalise = Normalise(
            shape["mean"], shape["std"], processes.device, job.settings.channels_last
        )

    def __call__(self, step: int, batch: Batch) -> Record:
        """Update once; return loss, terms, learning rate, scale and gradient norm."""
        job, settings = self.job, self.job.settings
        rate = settings.lr * learning_rate_factor(step, settings)
        for group in self.groups:
            group["lr"] = rate
        images = self.normalise(batch.images)
        tokens = batch.tokens.to(self.processes.device, non_blocking=True)
        teacher = None
        if job.teacher is not None:
            with torch.autocast(
                self.processes.device.type, torch.bfloat16, enabled=self._autocast()
            ):
                teacher = teacher_features(job.teacher.model, images, tokens)
        views = torch.Generator().manual_seed((job.seed * 1_000_003 + step) * 4096 + 1)
        if settings.accumulate > 1:
            terms = cached_step(self.engine, images, tokens, teacher, views, settings.accumulate)
        else:
            terms = plain_step(self.engine, images, tokens, teacher, views)
        means = self.processes.mean(torch.stack(list(terms.values()))).tolist()
        values = {f"loss/{name}": value for name, value in zip(terms, means, strict=True)}
        values["loss"] = math.fsum(values.values())
        norm = gradient_norm(self.engine)
        finite = values if norm is None else {**values, "gradient norm": norm}
        refuse_non_finite(finite, step + 1, batch.keys, self.processes)
        self.engine.step()
        scale = self.engine.module.student.logit_scale
        with torch.no_grad():
            scale.clamp_(max=math.log(settings.max_logit_scale))
        return {"loss": values.pop("loss"), **values, "lr": rate, "grad_norm": norm,
                "scale": float(scale.detach().exp())}  # fmt: skip

    def _autocast(self) -> bool:
        from pipeline.train.engine import resolved_precision

        return resolved_precision(self.job.settings, self.processes) == "bf16"


def check_models(job: Job) -> None:
    """Refuse a teacher that would be trained, or that sees other inputs than the student.

    Raises:
        UserError: naming the two values that differ.
    """
    if job.teacher is None:
        if job.objective.needs_teacher:
            raise UserError(f"the objective of {job.arm} needs a teacher", where=f"arms.{job.arm}")
        return
    if job.teacher.model is job.student.model:
        raise UserError("the teacher is the model being trained", where=f"arms.{job.arm}.teacher")
    student, teacher = job.student, job.teacher
    pairs = {
        "image size": (student.image_size, teacher.image_size),
        "context length": (student.context_length, teacher.context_length),
        "vocabulary": tuple(
            (c.architecture["text_cfg"].get("vocab_size", 49408),
             c.architecture["text_cfg"].get("hf_tokenizer_name"))
            for c in (student, teacher)
        ),
        "normalisation": tuple(
            {k: preprocessing(c.architecture)[k] for k in ("mean", "std")}
            for c in (student, teacher)
        ),
    }  # fmt: skip
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise UserError(
                f"student and teacher differ in {what}: {ours} and {theirs}",
                where=f"arms.{job.arm}",
                todo="both read the same batch; give them the same input",
            )
