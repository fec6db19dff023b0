"""What the evaluation asks of a model: (model, transform, tokenizer), no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

Transform = Callable[[Image.Image], Tensor]
"""An RGB image -> float tensor [3, S, S]."""

Tokenizer = Callable[[list[str]], Tensor]
"""B texts -> token ids [B, L], int64."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@runtime_checkable
class DualEncoder(Protocol):
    """The two methods that every model under evaluation has (open_clip's, ours, a wrapper)."""

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Map images [B, 3, S, S] to embeddings [B, D]."""
        ...

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Map token ids [B, L] to embeddings [B, D]."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode without gradients, then restore every module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def encode(model: nn.Module, inputs: Tensor, *, image: bool) -> Tensor:
    """Encode one batch and L2-normalise in float32; a zero vector stays zero.

    Raises:
        TypeError: the model lacks `encode_image` or `encode_text`.
    """
    if not isinstance(model, DualEncoder):
        raise TypeError(f"{type(model).__name__} has no encode_image and encode_text")
    features = model.encode_image(inputs) if image else model.encode_text(inputs)
    return nn.functional.normalize(features.float(), dim=-1)


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype images must have: that of the model's first floating-point parameter."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def input_sizes(transform: Transform, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return (image side, context length) as transform and tokenizer produce them."""
    image = transform(Image.new("RGB", (64, 64)))
    return int(image.shape[-1]), int(tokenizer(["a"]).shape[-1])


def check_unique(names: Sequence[str], what: str) -> None:
    """Raise ValueError when a name occurs twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} named twice: {', '.join(twice)}")
