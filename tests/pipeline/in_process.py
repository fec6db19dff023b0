"""A tiny training in this process, for tests of the options and of resuming."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.reader import ShardSet
from pipeline.models import Clip, build
from pipeline.objectives import ObjectiveConfig
from pipeline.objectives.objective import build as build_objective
from pipeline.train.job import Job
from pipeline.train.loop import train
from pipeline.train.processes import join
from pipeline.train.settings import TrainSettings
from tests.pipeline.conftest import tiny_model


@dataclass
class Trained:
    before: dict[str, torch.Tensor]
    student: Clip
    lines: list[dict[str, Any]]
    said: list[str]
    folder: Path

    @property
    def losses(self) -> torch.Tensor:
        return torch.tensor([line["loss"] for line in self.lines])

    def moved(self) -> set[str]:
        after = self.student.model.state_dict()
        return {name for name, value in self.before.items() if not torch.equal(value, after[name])}


def train_here(
    folder: Path,
    scenes: Path,
    objective: Any = "task",
    student: nn.Module | None = None,
    validate: Any = None,
    **settings: Any,
) -> Trained:
    """Train as `tests.pipeline.ranks` does, with the same seeds."""
    torch.set_num_threads(1)
    architecture = tiny_model()
    model = student or build(architecture, seed=7)
    clip = Clip(model, architecture)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher = None
    if ObjectiveConfig.model_validate(objective).needs_teacher:
        teacher = Clip(build(architecture, seed=8), architecture)
    known: dict[str, Any] = {"batch_size": 16, "log_every": 1, **settings}
    if not {"epochs", "samples"} & set(settings):
        known = {"steps": 4, **known}
    said: list[str] = []
    job = Job(
        "tiny", clip, teacher, build_objective(objective, 32, 32 if teacher else None),
        ShardSet.find(scenes, "scenes-train-*.tar"), TrainSettings(**known), 3, folder, "same",
        said.append, validate,
    )  # fmt: skip
    train(job, join("cpu"))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return Trained(before, clip, lines, said, folder)
