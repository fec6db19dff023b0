"""Losses on the student's inside; their rows are prepared by the training step's taps."""

from __future__ import annotations

from torch import Tensor

from pipeline.objectives.batch import Batch
from pipeline.objectives.config import LayersTerm, Term
from pipeline.objectives.contrastive import Loss
from pipeline.objectives.features import gather


class Layers(Loss):
    """Layer distillation (FitNets, arXiv 1412.6550): |h - H|² / |H|² of modules of equal name."""

    options: LayersTerm

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d; wants the rows `layers` [b, n]."""
        return batch.views["layers"].mean()


class Balance(Loss):
    """Even use of heads: squared coefficient of variation of the batch's mean gates, over layers.

    The importance loss of Shazeer et al. (arXiv 1701.06538), taken over the global batch.
    """

    needs_teacher = False
    options: Term

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d; wants the rows `gates` [b, sum of H]."""
        rows = batch.views.get("gates")
        if rows is None:  # a student without gates is balanced
            return batch.student.image.sum() * 0.0
        return gather(rows).mean(dim=0).square().sum()
