"""What one arm's training is given, and the refusal of what cannot be trained together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from data_prep.reader import ShardSet
from pipeline.models import Clip, refuse_other_input
from pipeline.objectives.objective import Objective
from pipeline.train.best import Validate
from pipeline.train.settings import TrainSettings


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
        validate: Measures a model on the suite's quick set, on all ranks; None where there is none.
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
    validate: Validate | None = None


def check_models(job: Job) -> None:
    """Refuse a teacher that would be trained, or that sees other inputs than the student.

    Raises:
        UserError: naming the two values that differ.
    """
    if job.teacher is None:
        if job.objective.needs_teacher:
            raise UserError(f"the objective of {job.arm} needs a teacher", where=f"arms.{job.arm}")
        return
    student, teacher = job.student, job.teacher
    own = {id(parameter) for parameter in student.model.parameters()}
    if any(id(parameter) in own for parameter in teacher.model.parameters()):
        raise UserError(
            "the teacher is the model being trained, or shares parameters with it",
            where=f"arms.{job.arm}.teacher",
            todo="load the teacher from a checkpoint of its own",
        )
    refuse_other_input(student.architecture, teacher.architecture, f"arms.{job.arm}")
