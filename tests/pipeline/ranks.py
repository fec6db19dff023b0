"""Run under torchrun or plainly: train a tiny CLIP and write what a test wants to compare.

    python -m tests.pipeline.ranks OUT key=value ...

Keys: those of TrainSettings; data; objective; inherit (an inherited student with three heads);
dropout; pause (seconds per step); poison (step whose images become NaN); hang (step whose data rank
1 waits for, for ever); full (step from which the disk is full).
"""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file

from data_prep.reader import ShardSet
from pipeline.inherit import inherit
from pipeline.models import Clip, build
from pipeline.objectives import ObjectiveConfig
from pipeline.objectives.objective import build as build_objective
from pipeline.tracking import Record
from pipeline.train.job import Job
from pipeline.train.liveness import LostRank
from pipeline.train.loader import Batch, Encoded, TrainingPairs
from pipeline.train.loop import train
from pipeline.train.processes import join
from pipeline.train.settings import TrainSettings
from pipeline.train.signals import StopRequested
from pipeline.train.update import Updater
from tests.pipeline.conftest import tiny_model


def main() -> int:
    out = Path(sys.argv[1])
    options = dict(pair.split("=") for pair in sys.argv[2:])
    processes = join("cpu", timeout_minutes=float(options.get("timeout", 2)))
    architecture = tiny_model()
    student = Clip(build(architecture, seed=7), architecture)
    if "inherit" in options:
        student.model, plan = inherit(student.model, "weights=0.5", None, 3, "svd")
        student.structure = plan.structure
    if "dropout" in options:
        student.model.visual.register_forward_hook(
            lambda module, _, output: F.dropout(output, float(options["dropout"]), module.training)
        )
    known = {key: yaml.safe_load(options[key]) for key in TrainSettings.model_fields
             if key in options}  # fmt: skip
    known = {"steps": 20, "batch_size": 16, "save_every": 1000, "warmup": 2, **known}
    settings = TrainSettings(log_every=1, **known)
    teacher = None
    wanted = yaml.safe_load(options.get("objective", "task"))
    if ObjectiveConfig.model_validate(wanted).needs_teacher:
        teacher = Clip(build(architecture, seed=8), architecture)
    objective = build_objective(wanted, 32, 32 if teacher else None)
    _disturb(options, processes.rank)
    shards = ShardSet.find(options["data"], "scenes-train-*.tar")
    job = Job("tiny", student, teacher, objective, shards, settings, 3, out, "same",
              lambda text: print(text, flush=True) if processes.is_main else None)  # fmt: skip
    try:
        train(job, processes)
    except (StopRequested, LostRank) as stop:
        print(stop, file=sys.stderr, flush=True)
        return stop.code
    state = {k: v.contiguous() for k, v in student.model.state_dict().items()}
    state |= {f"objective.{k}": v for k, v in objective.state_dict().items()}
    save_file(state, out / f"rank-{processes.rank}.safetensors")
    if processes.is_main:
        lines = (out / "train.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        (out / "losses.json").write_text(json.dumps(losses))
    return 0


def _disturb(options: dict[str, str], rank: int) -> None:
    """Make the things happen that a test asks for."""
    pause, poison = float(options.get("pause", 0)), int(options.get("poison", -1))
    hang, full = int(options.get("hang", -1)), int(options.get("full", -1))
    original, save = Updater.__call__, torch.save

    def disturbed(self: Updater, step: int, batch: Batch) -> Record:
        time.sleep(pause)
        if step == full:
            torch.save = full_disk  # type: ignore[assignment]
        if step == poison:
            normalise = self.normalise
            self.normalise = lambda images: normalise(images) * float("nan")  # type: ignore
        return original(self, step, batch)

    def full_disk(content: object, path: Path) -> None:
        save("the first bytes", path)
        raise OSError(errno.ENOSPC, "No space left on device")

    getitems = TrainingPairs.__getitems__

    def stuck(self: TrainingPairs, items: Sequence[tuple[int, int]]) -> Batch | Encoded:
        if items[0][0] == hang and rank == 1:  # as on a file system that does not answer
            time.sleep(1000)
        return getitems(self, items)

    TrainingPairs.__getitems__ = stuck  # type: ignore[method-assign]
    Updater.__call__ = disturbed  # type: ignore[method-assign]


if __name__ == "__main__":
    from data_prep.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"inherclip: {error}", file=sys.stderr)
        sys.exit(2)
