"""A weighted sum of losses as one module, trained and saved with the student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.objectives.batch import Batch, Maps
from pipeline.objectives.config import REGISTRY, LayersTerm, ObjectiveConfig
from pipeline.objectives.contrastive import Loss
from pipeline.objectives.features import Features, check_equal_rows, full_precision


class Objective(nn.Module):
    """The losses of one arm; build it with `build`.

    Put it into the module that DeepSpeed trains: its parameters then follow the student's in
    broadcast, optimizer and checkpoint.
    """

    def __init__(
        self, losses: dict[str, Loss], weights: dict[str, float], maps: Maps | None = None
    ) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self.weights = dict(weights)
        self.maps = maps
        self.needs_teacher = any(loss.needs_teacher for loss in losses.values())
        self._rows_checked = False

    @property
    def layer_globs(self) -> tuple[str, ...]:
        """Modules whose outputs are compared with the teacher's; see `train.taps`."""
        return next((o.modules for o in self._options() if isinstance(o, LayersTerm)), ())

    @property
    def wants_gates(self) -> bool:
        """Whether a loss looks at the gates of inherited layers."""
        return "balance" in self.losses

    def view_images(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the further images that the student has to encode; pass the features to `forward`.

        Args:
            images: `[b, 3, H, W]`, as the student sees them.
            generator: CPU generator for random views.
        """
        views: dict[str, Tensor] = {}
        for loss in self._ordered():
            views |= loss.view_images(images, generator)
        return views

    def forward(
        self, student: Features, teacher: Features | None = None, **views: Tensor
    ) -> dict[str, Tensor]:
        """Return the weighted terms by loss name; their sum is the loss.

        Each is this rank's share: the mean over ranks is the loss of the global batch, and so is
        the gradient once the engine has averaged it. Computed in float32 (float64 for float64
        features), also under autocast.

        Args:
            student: This rank's features, with gradient.
            teacher: This rank's features of the same samples; may be None where `needs_teacher` is
                False.
            views: L2-normalised student features `[b, D]` of the images that `view_images`
                returned, and the rows that `train.taps` made.

        Raises:
            ValueError: The teacher or a view is missing, or the ranks bring different numbers of
                rows.
        """
        if not self._rows_checked:
            check_equal_rows(len(student.image), student.image.device)
            self._rows_checked = True
        with torch.autocast(student.image.device.type, enabled=False):
            batch = Batch(student, teacher, self.maps, views)
            terms = {
                name: self.weights[name] * loss(batch)
                for name, loss in zip(self.weights, self._ordered(), strict=True)
            }
            # Some losses leave the scale or the unmasked images alone; what trains must still see a
            # gradient at every step, be it zero
            unused = student.image.sum() + student.text.sum() + student.scale.sum()
            first = next(iter(terms))
            terms[first] = terms[first] + 0.0 * full_precision(unused)
        return terms

    def _options(self) -> list[object]:
        return [loss.options for loss in self._ordered()]

    def _ordered(self) -> list[Loss]:
        return [loss for loss in self.losses.values() if isinstance(loss, Loss)]


def build(
    config: ObjectiveConfig | dict[str, object] | str,
    student_dim: int,
    teacher_dim: int | None = None,
    seed: int = 0,
) -> Objective:
    """Build the objective that `config` asks for.

    Args:
        config: An `ObjectiveConfig`, or what one is made from: a preset's name or losses with
            weights.
        student_dim: Embedding width of the student.
        teacher_dim: Embedding width of the teacher; None without a teacher.
        seed: Of the initial values of the losses' own parameters; must be the same on all ranks.

    Raises:
        ValueError: A loss needs a teacher and `teacher_dim` is None; or `config` is not valid.
    """
    if not isinstance(config, ObjectiveConfig):
        config = ObjectiveConfig.model_validate(config)
    if config.needs_teacher and teacher_dim is None:
        names = [name for name in config.terms if REGISTRY[name].needs_teacher]
        raise ValueError(f"{', '.join(names)} need a teacher: give its embedding width")
    width = student_dim if teacher_dim is None else teacher_dim
    losses: dict[str, Loss] = {}
    for index, name in enumerate(REGISTRY):
        if name in config.terms:
            # A generator per loss: adding one does not change the start of another
            generator = torch.Generator().manual_seed(seed * len(REGISTRY) + index)
            losses[name] = REGISTRY[name].load()(config.terms[name], student_dim, width, generator)
    maps = None
    if width != student_dim and any(loss.maps_student for loss in losses.values()):
        maps = Maps(student_dim, width, torch.Generator().manual_seed(seed))
    weights = {name: config.terms[name].weight for name in losses}
    return Objective(losses, weights, maps)
