"""Losses against a teacher (CLIP-KD, arXiv 2307.12732; open_clip; Hinton et al., arXiv 1503.02531).

`v, t, s` are the student's image and text features and scale, `V, T, s_T` the teacher's; `b` rows
here, `B` on all ranks. All are written from the formulas of the method, section 5.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.objectives.batch import Batch, Pair
from pipeline.objectives.config import MaskedTerm, MixTerm, ScaledTerm
from pipeline.objectives.contrastive import Loss, info_nce, positives
from pipeline.objectives.features import (
    bounded_scale,
    gather,
    mask_patches,
    seeded_linear,
)


def _kl(target: Tensor, guess: Tensor) -> Tensor:
    """Return KL(target ‖ guess) of log-probabilities `[b, B]`, mean over rows."""
    return F.kl_div(guess, target, reduction="batchmean", log_target=True)


class Crd(Loss):
    """Contrastive relational: ½[KL(softmax(s_T V Tᵀ) ‖ softmax(s v tᵀ)) + the same for texts]."""

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d."""
        student, teacher = batch.student, batch.teacher
        image = _kl(teacher.image_log_probs, student.image_log_probs)
        return (image + _kl(teacher.text_log_probs, student.text_log_probs)) / 2


class Fd(Loss):
    """Feature distillation: MSE(v, V) + MSE(t, T), means over b·D."""

    maps_student = True

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d."""
        image, text = batch.mapped_rows
        return F.mse_loss(image, batch.teacher.image) + F.mse_loss(text, batch.teacher.text)


class Mfd(Loss):
    """Masked feature distillation: `Fd` with v of an image of which whole patches are hidden."""

    maps_student = True
    options: MaskedTerm

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d; wants the view `masked_image` `[b, D]`."""
        if "masked_image" not in batch.views:
            raise ValueError("mfd needs the student's features of masked images as `masked_image`")
        masked = batch.mapped_image(batch.views["masked_image"])
        image = F.mse_loss(masked, batch.teacher.image)
        return image + F.mse_loss(batch.mapped_rows[1], batch.teacher.text)

    def view_images(self, images: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return the masked images to encode."""
        masked = mask_patches(images, self.options.ratio, self.options.patch, generator)
        return {"masked_image": masked}


class Gd(Loss):
    """Gradient distillation: MSE between the InfoNCE gradients of student and teacher.

    For each direction (image to text, text to image) and each of v and t, so four means over b·D,
    of `d CE / d v` and so on, CE being the mean over the B rows. The value scales with 1/B², hence
    the large weights in use (CLIP-KD: 1e8).
    """

    maps_student = True

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d."""
        ours = info_nce_gradients(batch.mapped)
        with torch.no_grad():
            theirs = info_nce_gradients(batch.teacher)
        loss = sum(
            (F.mse_loss(mine, target) for mine, target in zip(ours, theirs, strict=True)),
            start=torch.zeros((), device=ours[0].device, dtype=ours[0].dtype),
        )
        return loss / len(batch.teacher.all_image) ** 2


def info_nce_gradients(pair: Pair) -> list[Tensor]:
    """Return B times the gradients of both cross-entropies for this rank's rows, four of `[b, D]`.

    With P = softmax(s v tᵀ) over rows: d CE/d v = s/B (P - I) t and d CE/d t = s/B (P - I)ᵀ v; the
    same with the modalities exchanged. The transposed product needs the columns of P that belong
    to this rank; these are exp(logit - logsumexp of its row), so only the row sums `[B]` travel.
    The largest tensor is `[b, B]`: at B = 4,096 and D = 512 that is 67 MB in float32, where the
    product spelled out as B x D x B would take 34 GB.
    """
    sums = torch.stack([pair.image_logits.logsumexp(1), pair.text_logits.logsumexp(1)], dim=1)
    image_sums, text_sums = gather(sums).unbind(1)
    image_rows, text_rows = pair.image_log_probs.exp(), pair.text_log_probs.exp()
    image_columns = (pair.image_logits - text_sums).exp()  # of softmax(s t vᵀ), transposed
    text_columns = (pair.text_logits - image_sums).exp()  # of softmax(s v tᵀ), transposed
    return [
        pair.scale * (image_rows @ pair.all_text - pair.text),
        pair.scale * (text_columns @ pair.all_image - pair.image),
        pair.scale * (text_rows @ pair.all_image - pair.image),
        pair.scale * (image_columns @ pair.all_text - pair.text),
    ]


class _Scaled(Loss):
    """A loss with a logit scale of its own, stored as its logarithm in one element."""

    options: ScaledTerm

    def __init__(
        self, options: ScaledTerm, student_dim: int, teacher_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__(options, student_dim, teacher_dim, generator)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(options.scale)))


class Icl(_Scaled):
    """Interactive contrastive: ½[CE(c v Tᵀ) + CE(c t Vᵀ)], `c` learnable."""

    maps_student = True

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d."""
        scale, teacher = bounded_scale(self.log_scale), batch.teacher
        student_image, student_text = batch.mapped_rows
        image = scale * student_image @ teacher.all_text.T
        text = scale * student_text @ teacher.all_image.T
        targets = positives(image, teacher.offset)
        return (F.cross_entropy(image, targets) + F.cross_entropy(text, targets)) / 2


class Afd(_Scaled):
    """Augmented features: InfoNCE on normalise(Linear([v; V])) and normalise(Linear([t; T]))."""

    def __init__(
        self, options: ScaledTerm, student_dim: int, teacher_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__(options, student_dim, teacher_dim, generator)
        self.image = seeded_linear(student_dim + teacher_dim, student_dim, generator)
        self.text = seeded_linear(student_dim + teacher_dim, student_dim, generator)

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d."""
        student, teacher = batch.student, batch.teacher
        image = self.image(torch.cat([student.all_image, teacher.all_image], dim=1))
        text = self.text(torch.cat([student.all_text, teacher.all_text], dim=1))
        fused = torch.cat([F.normalize(image, dim=1), F.normalize(text, dim=1)], dim=1)
        here = fused[student.offset : student.offset + len(student.image)]
        image, text = here.chunk(2, dim=1)
        return info_nce(Pair(image, text, fused, bounded_scale(self.log_scale)))


class LogitKl(Loss):
    """Logit distillation as in open_clip: ½[CE(softmax(s_T V Tᵀ), s v tᵀ) + the same for texts].

    It is `Crd` plus the teacher's entropy, a constant: same gradient, the value that open_clip
    logs.
    """

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d."""
        student, teacher = batch.student, batch.teacher
        image = -(teacher.image_log_probs.exp() * student.image_log_probs).sum(1).mean()
        text = -(teacher.text_log_probs.exp() * student.text_log_probs).sum(1).mean()
        return (image + text) / 2


class Kd(Loss):
    """The classic mix (1-α)·task + α·τ²·½[KL(σ(z_T/τ) ‖ σ(z/τ)) + the same for texts]."""

    options: MixTerm

    def forward(self, batch: Batch) -> Tensor:
        """Return the unweighted loss, 0-d."""
        student, teacher = batch.student, batch.teacher
        alpha, tau = self.options.alpha, self.options.tau
        image, text = (
            _kl((theirs / tau).log_softmax(1), (ours / tau).log_softmax(1))
            for theirs, ours in (
                (teacher.image_logits, student.image_logits),
                (teacher.text_logits, student.text_logits),
            )
        )
        return (1 - alpha) * info_nce(student) + alpha * tau**2 * (image + text) / 2
