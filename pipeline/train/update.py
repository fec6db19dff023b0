"""One optimizer update: batch in; new weights and the record of the step out."""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.models import preprocessing
from pipeline.tracking import Record
from pipeline.train.engine import resolved_precision
from pipeline.train.job import Job
from pipeline.train.loader import Batch, Normalise
from pipeline.train.parameters import Thaw
from pipeline.train.processes import Processes
from pipeline.train.settings import TrainSettings
from pipeline.train.step import (
    Lesson,
    Trainee,
    cached_step,
    gradient_norm,
    lesson,
    plain_step,
    refuse_non_finite,
)
from pipeline.train.taps import Taps, shared_layers


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """Return the factor of the peak learning rate in update `step` (0 is the first)."""
    assert settings.steps is not None
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


class Updater:
    """Updates a student, with what that needs held between steps.

    Args:
        job: The arm's training; its settings have their length in steps.
        processes: This rank among all.
        engine: DeepSpeed's engine around a `Trainee`.
        optimizer: What the engine steps.
    """

    def __init__(
        self, job: Job, processes: Processes, engine: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        self.job, self.processes, self.engine = job, processes, engine
        self.trainee: Trainee = engine.module
        self.optimizer = optimizer if hasattr(optimizer, "param_groups") else engine.optimizer
        self.thaw = Thaw(self.trainee, job.settings.freeze)
        shape = preprocessing(job.student.architecture)
        self.normalise = Normalise(
            shape["mean"], shape["std"], processes.device, job.settings.channels_last
        )
        self.bf16 = resolved_precision(job.settings, processes) == "bf16"
        self._open_taps()

    def _open_taps(self) -> None:
        """Let the objective look inside student and teacher, where it asks for that."""
        objective, teacher = self.job.objective, self.job.teacher
        globs = objective.layer_globs
        layers: tuple[str, ...] = ()
        if globs and teacher is not None:
            layers = shared_layers(self.job.student.model, teacher.model, globs)
        if layers or objective.wants_gates:
            self.trainee.taps = Taps(self.job.student.model, layers, objective.wants_gates)
        self.teacher_taps = None if teacher is None else Taps(teacher.model, layers)

    def __call__(self, step: int, batch: Batch) -> Record:
        """Update once; return loss, terms, learning rate, scale and gradient norm.

        Raises:
            UserError: on all ranks, before anything is updated: a loss or gradient is not finite.
        """
        job, settings = self.job, self.job.settings
        rate = settings.lr * learning_rate_factor(step, settings)
        for group in self.optimizer.param_groups:  # restoring a checkpoint replaces the groups
            group["lr"] = rate * group["factor"]
        self.thaw(step)
        images = self.normalise(batch.images)
        tokens = batch.tokens.to(self.processes.device, non_blocking=True)
        taught = self._lesson(images, tokens)
        views = torch.Generator().manual_seed((job.seed * 1_000_003 + step) * 4096 + 1)
        if settings.accumulate > 1:
            terms = cached_step(self.engine, images, tokens, taught, views, settings.accumulate)
        else:
            terms = plain_step(self.engine, images, tokens, taught, views)
        means = self.processes.mean(torch.stack(list(terms.values()))).tolist()
        values = {f"loss/{name}": value for name, value in zip(terms, means, strict=True)}
        values["loss"] = math.fsum(values.values())
        norm = gradient_norm(self.engine, self.processes)
        finite = values if norm is None else {**values, "gradient norm": norm}
        refuse_non_finite(finite, step + 1, batch.keys, self.processes)
        self.engine.step()
        scale = self.trainee.student.logit_scale
        with torch.no_grad():
            scale.clamp_(max=math.log(settings.max_logit_scale))
        return {"loss": values.pop("loss"), **values, "lr": rate, "grad_norm": norm,
                "scale": float(scale.detach().exp())}  # fmt: skip

    def _lesson(self, images: torch.Tensor, tokens: torch.Tensor) -> Lesson:
        if self.job.teacher is None or self.teacher_taps is None:
            return Lesson()
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.bf16):
            return lesson(self.job.teacher.model, images, tokens, self.teacher_taps)
