"""The loss base class and the task loss; `v, t` are the student's features, `s` its scale."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.objectives.batch import Batch, Pair
from pipeline.objectives.config import Term


class Loss(nn.Module):
    """One loss: a scalar of a `Batch`, in local form (mean over this rank's rows).

    Subclasses that learn something make their parameters in `__init__` from `generator` alone, so
    that all ranks agree, with at least one dimension each, because DeepSpeed cannot broadcast 0-d
    parameters.
    """

    needs_teacher = True
    maps_student = False
    """Whether student features are compared with the teacher's element by element."""

    def __init__(
        self, options: Any, student_dim: int, teacher_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.options = options

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d."""
        raise NotImplementedError

    def view_images(self, images: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return further student images `[b, 3, H, W]` to encode, by the name of the view."""
        return {}


def positives(logits: Tensor, offset: int) -> Tensor:
    """Return the column of each row's own partner, `[b]`."""
    return torch.arange(offset, offset + len(logits), device=logits.device)


def info_nce(pair: Pair) -> Tensor:
    """Return ½[CE(s v tᵀ) + CE(s t vᵀ)] of this rank's rows."""
    targets = positives(pair.image_logits, pair.offset)
    image = F.nll_loss(pair.image_log_probs, targets)
    return (image + F.nll_loss(pair.text_log_probs, targets)) / 2


class Task(Loss):
    """InfoNCE, as CLIP is trained (arXiv 2103.00020): ½[CE(s v tᵀ) + CE(s t vᵀ)]."""

    needs_teacher = False
    options: Term

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d."""
        return info_nce(batch.student)
