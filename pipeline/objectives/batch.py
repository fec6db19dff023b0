"""What all losses of one step share: features in both widths, similarities, softmaxes.

Shapes as in `features.py`: `b` rows on this rank, `B` rows on all ranks.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.objectives.features import Features, full_precision, gather, seeded_linear, world


class Pair:
    """Both modalities of one model: this rank's rows, all rows, and their similarities.

    Each property is computed once, however many losses ask for it.

    Logits are `[b, B]`: row i of this rank against all columns; its positive is column `offset +
    i`.
    """

    def __init__(
        self, image: Tensor, text: Tensor, everything: Tensor | None, scale: Tensor
    ) -> None:
        self.image, self.text, self.scale = image, text, scale
        self._everything = everything
        self.offset = world()[0] * len(image)

    @cached_property
    def _all(self) -> Tensor:
        if self._everything is not None:
            return self._everything
        return gather(torch.cat([self.image, self.text], dim=1))

    @property
    def all_image(self) -> Tensor:
        """Image features of all ranks, `[B, D]`."""
        return self._all[:, : self.image.shape[1]]

    @property
    def all_text(self) -> Tensor:
        """Text features of all ranks, `[B, D]`."""
        return self._all[:, self.image.shape[1] :]

    @cached_property
    def image_logits(self) -> Tensor:
        """Scaled similarities of this rank's images to all texts, `[b, B]`."""
        return self.scale * self.image @ self.all_text.T

    @cached_property
    def text_logits(self) -> Tensor:
        """Scaled similarities of this rank's texts to all images, `[b, B]`."""
        return self.scale * self.text @ self.all_image.T

    @cached_property
    def image_log_probs(self) -> Tensor:
        """Log-softmax of `image_logits` over the texts, `[b, B]`."""
        return self.image_logits.log_softmax(dim=1)

    @cached_property
    def text_log_probs(self) -> Tensor:
        """Log-softmax of `text_logits` over the images, `[b, B]`."""
        return self.text_logits.log_softmax(dim=1)


class Maps(nn.Module):
    """Linear maps from the student's to the teacher's width, one per modality, then normalised."""

    def __init__(self, student_dim: int, teacher_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.image = seeded_linear(student_dim, teacher_dim, generator)
        self.text = seeded_linear(student_dim, teacher_dim, generator)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map image `[n, D_student]` and text `[n, D_student]` to `[n, D_teacher]` each."""
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1)


class Batch:
    """The features of student and teacher as every loss sees them, gathered at most once."""

    def __init__(
        self,
        student: Features,
        teacher: Features | None,
        maps: Maps | None = None,
        views: dict[str, Tensor] | None = None,
    ) -> None:
        self.student = _pair(student)
        self._teacher = None if teacher is None else _pair(teacher, detached=True)
        self._maps = maps
        self.views = {name: full_precision(view) for name, view in (views or {}).items()}

    @property
    def teacher(self) -> Pair:
        """The teacher's features, without gradient."""
        if self._teacher is None:
            raise ValueError("this objective needs the teacher's features, and none were given")
        return self._teacher

    @cached_property
    def mapped_rows(self) -> tuple[Tensor, Tensor]:
        """This rank's student features, image and text, in the teacher's width."""
        if self._maps is None:
            return self.student.image, self.student.text
        image, text = self._maps(self.student.image, self.student.text)
        return image, text

    @cached_property
    def mapped(self) -> Pair:
        """The student in the teacher's width, with the rows of all ranks."""
        if self._maps is None:
            return self.student
        # Mapping what was gathered saves the exchange that gathering what was mapped would take
        everything = torch.cat(self._maps(self.student.all_image, self.student.all_text), dim=1)
        return Pair(*self.mapped_rows, everything, self.student.scale)

    def mapped_image(self, image: Tensor) -> Tensor:
        """Bring another student image encoding `[b, D_student]` to the teacher's width."""
        return image if self._maps is None else F.normalize(self._maps.image(image), dim=1)


def _pair(features: Features, detached: bool = False) -> Pair:
    image, text, scale = (
        full_precision(tensor) for tensor in (features.image, features.text, features.scale)
    )
    if detached:
        image, text, scale = image.detach(), text.detach(), scale.detach()
    return Pair(image, text, None, scale.reshape(()))
