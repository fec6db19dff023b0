"""One optimizer update: the contrastive loss over the global batch, in one piece or in chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.objectives.features import Features, bounded_scale
from pipeline.objectives.objective import Objective
from pipeline.train.normalisation import frozen_statistics, slower_statistics
from pipeline.train.processes import Processes
from pipeline.train.taps import Taps

Tensors = dict[str, Tensor]


class Trainee(nn.Module):
    """Student and objective as the one module that DeepSpeed trains, broadcasts and saves."""

    def __init__(self, student: nn.Module, objective: Objective, max_scale: float) -> None:
        super().__init__()
        self.student: Any = student  # nn.Module's attributes are untyped: encode_image, logit_scale
        self.objective, self.max_scale = objective, max_scale
        self.taps: Taps | None = None

    def forward(
        self, images: Tensor, tokens: Tensor, views: Tensors, targets: Tensors
    ) -> tuple[Tensor, Tensor, Tensors]:
        """Return what the objective reads of a batch.

        Args:
            images: [b,3,S,S].
            tokens: [b,L].
            views: further images [b,3,S,S] by name.
            targets: the teacher's layer outputs [b, ...] by name.

        Returns:
            L2-normalised image [b,D] and text [b,D] features, and by name those of the views and
            the rows of the taps.
        """
        encode = self.student.encode_image
        with self.taps or nullcontext():
            image = F.normalize(encode(images).float(), dim=-1)
            text = F.normalize(self.student.encode_text(tokens).float(), dim=-1)
        more = {} if self.taps is None else self.taps.rows(tokens, targets)
        more |= {k: F.normalize(encode(v).float(), dim=-1) for k, v in views.items()}
        return image, text, more

    def terms(
        self, image: Tensor, text: Tensor, views: Tensors, teacher: Features | None
    ) -> Tensors:
        """Return the weighted loss terms of features."""
        scale = bounded_scale(self.student.logit_scale, self.max_scale)
        return self.objective(Features(image, text, scale), teacher, **views)


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of a batch: its features, and its layer outputs [b, ...] by name."""

    features: Features | None = None
    layers: Tensors = field(default_factory=dict)


@torch.no_grad()
def lesson(teacher: Any, images: Tensor, tokens: Tensor, taps: Taps) -> Lesson:
    """Run a frozen teacher on a batch."""
    with taps:
        image = F.normalize(teacher.encode_image(images).float(), dim=-1)
        text = F.normalize(teacher.encode_text(tokens).float(), dim=-1)
    layers = dict(taps.outputs)
    taps.clear()
    return Lesson(Features(image, text, bounded_scale(teacher.logit_scale, 100.0)), layers)


def plain_step(
    engine: Any,
    images: Tensor,
    tokens: Tensor,
    teacher: Lesson,
    generator: torch.Generator,
) -> Tensors:
    """Run forward and backward on this rank's whole part of the batch; return the terms."""
    trainee: Trainee = engine.module
    views = trainee.objective.view_images(images, generator)
    image, text, more = engine(images, tokens, views, teacher.layers)
    terms = trainee.terms(image, text, more, teacher.features)
    engine.backward(torch.stack([t.reshape(()) for t in terms.values()]).sum())
    return {name: term.detach().reshape(()) for name, term in terms.items()}


def cached_step(
    engine: Any,
    images: Tensor,
    tokens: Tensor,
    teacher: Lesson,
    generator: torch.Generator,
    chunks: int,
) -> Tensors:
    """The same update as `plain_step` with the activations of one chunk at a time.

    Plain accumulation would see only a chunk's negatives. Here (Gao et al. 2021, GradCache) the
    features of all chunks are computed first without a graph, then the loss of the whole batch
    and its gradient with respect to the features, and then each chunk again, with
    `sum(features * gradient)` as the loss to propagate. BatchNorm normalises over a chunk; its
    running statistics move in the second pass only, by chunks as far as by one batch.
    """
    trainee: Trainee = engine.module
    views = trainee.objective.view_images(images, generator)
    parts = _chunked(images, tokens, views, teacher.layers, chunks)
    states = []
    with torch.no_grad(), frozen_statistics(trainee):
        cached = []
        for part in parts:
            states.append(_rng_state(images.device))
            cached.append(engine(*part))
    leaves = _leaves(cached)
    extra = [trainee.student.logit_scale, *trainee.objective.parameters()]
    extra = [p for p in extra if p.requires_grad]
    with torch.enable_grad():
        terms = trainee.terms(leaves["image"], leaves["text"], _views(leaves), teacher.features)
        total = torch.stack([t.reshape(()) for t in terms.values()]).sum()
    inputs = [*leaves.values(), *extra]
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    by_name = dict(zip(leaves, gradients[: len(leaves)], strict=True))
    after = _rng_state(images.device)
    offset = 0
    for number, part in enumerate(parts):
        _set_rng_state(states[number], images.device)
        with slower_statistics(trainee, chunks):
            image, text, more = engine(*part)
        rows = slice(offset, offset + len(image))
        offset += len(image)
        surrogate = torch.zeros((), device=images.device)
        for name, feature in {"image": image, "text": text, **more}.items():
            gradient = by_name[name]
            if gradient is not None:
                surrogate = surrogate + (feature * gradient[rows]).sum()
        if number == len(parts) - 1:  # what the features do not carry: scales and loss parameters
            for parameter, gradient in zip(extra, gradients[len(leaves) :], strict=True):
                if gradient is not None:
                    surrogate = surrogate + (parameter * gradient).sum()
        engine.backward(surrogate * chunks)  # DeepSpeed divides by the number of chunks
        if number < len(parts) - 1:
            engine.step()  # counts the chunk; parameters move only at the boundary
    _set_rng_state(after, images.device)
    return {name: term.detach().reshape(()) for name, term in terms.items()}


def _chunked(
    images: Tensor, tokens: Tensor, views: Tensors, targets: Tensors, chunks: int
) -> list[tuple[Tensor, Tensor, Tensors, Tensors]]:
    def piece(tensors: Tensors, number: int) -> Tensors:
        return {name: tensor.chunk(chunks)[number] for name, tensor in tensors.items()}

    pairs = zip(images.chunk(chunks), tokens.chunk(chunks), strict=True)
    return [
        (image, text, piece(views, i), piece(targets, i)) for i, (image, text) in enumerate(pairs)
    ]


def _leaves(cached: Sequence[tuple[Tensor, Tensor, Tensors]]) -> Tensors:
    leaves = {
        "image": torch.cat([c[0] for c in cached]),
        "text": torch.cat([c[1] for c in cached]),
    }
    for name in cached[0][2]:
        leaves[name] = torch.cat([c[2][name] for c in cached])
    return {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}


def _views(leaves: Tensors) -> Tensors:
    return {name: tensor for name, tensor in leaves.items() if name not in ("image", "text")}


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), (
        torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    )


def _set_rng_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def gradient_norm(engine: Any, processes: Processes) -> float | None:
    """Return the global gradient norm before clipping, on all ranks.

    At ZeRO stage 1 and 2 every rank holds a part of the averaged gradients. None where the
    optimizer is offloaded: DeepSpeed has then moved them out of reach.
    """
    if engine.zero_optimization_stage() == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))
    parts = getattr(engine.optimizer, "averaged_gradients", {}).values()
    own = [gradient for part in parts if part is not None for gradient in part]
    if processes.any(not own):
        return None
    return math.sqrt(processes.total(float(torch.nn.utils.get_total_norm(own)) ** 2))


def refuse_non_finite(
    values: dict[str, float], step: int, keys: Sequence[str], processes: Processes
) -> None:
    """Stop all ranks before the update if a loss term or the gradient is not finite on any.

    Raises:
        UserError: with the step, and on the rank concerned the terms and sample keys.
    """
    wrong = {k: v for k, v in values.items() if v != v or v in (float("inf"), float("-inf"))}
    if not processes.any(bool(wrong)):
        return
    described = ", ".join(f"{name} = {value}" for name, value in wrong.items())
    here = f"{described}; samples: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
    raise UserError(
        f"step {step}: loss or gradient is not finite "
        f"({here if wrong else 'on another rank; this one is finite'})",
        where=f"rank {processes.rank}",
        todo="nothing was updated in this step; the last checkpoint is kept. Lower train.lr, "
        "lengthen train.warmup, or look at the samples named",
    )
