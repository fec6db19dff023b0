"""Looking at the model during training: the best checkpoint so far is kept beside the last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from pipeline.models import Clip, load_checkpoint, save_checkpoint

Validate = Callable[[Clip], dict[str, float]]


def score(metrics: dict[str, float]) -> float:
    """Return what `best` compares: the mean of both recall@1, or of top-1, in [0, 1].

    Args:
        metrics: of one evaluation set, by name as in `eval.json`.
    """
    values = [v for k, v in metrics.items() if k.endswith(("/i2t_r1", "/t2i_r1", "/top1"))]
    return sum(values) / len(values)


class Best:
    """`arms/ARM/best`: the checkpoint with the highest score, with its step and metrics.

    An interrupted training takes the same looks again and finds the same scores, so nothing about
    them has to be in the resumable state.
    """

    def __init__(self, folder: Path, fresh: bool) -> None:
        self.folder = folder
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def reached(self) -> float:
        """Score of the kept checkpoint; -1 if there is none."""
        try:
            text = (self.folder / "model.json").read_text()
        except OSError:
            return -1.0
        return float(json.loads(text)["provenance"]["score"])

    def offer(self, clip: Clip, model: nn.Module, step: int, metrics: dict[str, float]) -> bool:
        """Keep the model if it is better than the one kept; return whether it was."""
        value = score(metrics)
        if value <= self.reached:
            return False
        provenance = {**clip.provenance, "step": step, "score": value, "metrics": metrics}
        save_checkpoint(replace(clip, model=model, provenance=provenance), self.folder)
        return True

    def load_into(self, model: nn.Module) -> None:
        """Give a model the kept weights."""
        model.load_state_dict(load_checkpoint(self.folder).model.state_dict())
