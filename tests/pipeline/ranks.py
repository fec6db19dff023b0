"""Run under torchrun or plainly: train a tiny CLIP and write what a test wants to compare.

    python -m tests.pipeline.ranks OUT key=value ...

Keys: steps, batch, accumulate, zero, workers, pause (seconds per step), norm (keep BatchNorm in
training mode or not), poison (step whose images become NaN).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from data_prep.reader import ShardSet
from pipeline.models import Clip, build
from pipeline.objectives.objective import build as build_objective
from pipeline.train import loop
from pipeline.train.loop import Job, train
from pipeline.train.processes import join
from pipeline.train.settings import TrainSettings
from pipeline.train.signals import StopRequested
from tests.pipeline.conftest import tiny_model


def freeze_batchnorm(model: torch.nn.Module) -> None:
    """Make BatchNorm a fixed map, so that equality of batches is exact and not statistical."""
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
            norm.train = lambda mode=True, norm=norm: norm  # type: ignore[method-assign]


def main() -> int:
    out = Path(sys.argv[1])
    options = dict(pair.split("=") for pair in sys.argv[2:])
    processes = join("cpu", timeout_minutes=float(options.get("timeout", 2)))
    architecture = tiny_model()
    student = Clip(build(architecture, seed=7), architecture)
    if options.get("norm") == "frozen":
        freeze_batchnorm(student.model)
    settings = TrainSettings(
        steps=int(options.get("steps", 20)),
        batch_size=int(options.get("batch", 16)),
        accumulate=int(options.get("accumulate", 1)),
        zero_stage=int(options.get("zero", 0)),  # type: ignore[arg-type]
        workers=int(options.get("workers", 0)),
        save_every=int(options.get("save_every", 1000)),
        log_every=1,
        lr=1e-3,
        warmup=2,
    )
    teacher = None
    if options.get("objective", "task") == "clip_kd":
        teacher = Clip(build(architecture, seed=8), architecture)
    objective = build_objective(options.get("objective", "task"), 32, 32 if teacher else None)
    if "pause" in options or "poison" in options:
        _disturb(float(options.get("pause", 0)), int(options.get("poison", -1)))
    shards = ShardSet.find(options["data"], "scenes-train-*.tar")
    job = Job("tiny", student, teacher, objective, shards, settings, 3, out, "same",
              lambda text: print(text, flush=True) if processes.is_main else None)  # fmt: skip
    try:
        train(job, processes)
    except StopRequested as stop:
        return stop.code
    state = {k: v.contiguous() for k, v in student.model.state_dict().items()}
    state |= {f"objective.{k}": v for k, v in objective.state_dict().items()}
    save_file(state, out / f"rank-{processes.rank}.safetensors")
    if processes.is_main:
        lines = (out / "train.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        (out / "losses.json").write_text(json.dumps(losses))
    return 0


def _disturb(pause: float, poison: int) -> None:
    original = loop._Updater.__call__

    def disturbed(self: loop._Updater, step: int, batch: loop.Batch) -> loop.Record:
        time.sleep(pause)
        if step == poison:
            normalise = self.normalise
            self.normalise = lambda images: normalise(images) * float("nan")  # type: ignore
        return original(self, step, batch)

    loop._Updater.__call__ = disturbed  # type: ignore[method-assign]


if __name__ == "__main__":
    from data_prep.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"inherclip: {error}", file=sys.stderr)
        sys.exit(2)
