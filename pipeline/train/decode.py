"""Decoding on the training device: workers hand over encoded images, nvJPEG does the rest.

On a GPU this takes the costliest part of loading off the processor cores; on the CPU the same code
runs through libjpeg-turbo. Crops are the same as the workers' for the same (seed, draw, sample);
pixels differ by the rounding of another resize.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.train.loader import Batch, Encoded, TrainingPairs, augmented

JPEG = b"\xff\xd8"


def on_device(
    loader: Iterable[Batch | Encoded], pairs: TrainingPairs, device: torch.device
) -> Iterator[Batch]:
    """Yield batches, decoding those whose images are still encoded."""
    for batch in loader:
        yield decoded(batch, pairs, device) if isinstance(batch, Encoded) else batch


def decoded(batch: Encoded, pairs: TrainingPairs, device: torch.device) -> Batch:
    """Return an encoded batch as images [b, 3, S, S] uint8 on `device`.

    What is no JPEG, and what the device refuses, takes the workers' way, which also finds a
    substitute for a corrupt sample and counts it.
    """
    pixels = _decode(batch.data, device)
    images, keys, corrupt = [], list(batch.keys), list(batch.corrupt)
    tokens = batch.tokens
    for row, (image, item) in enumerate(zip(pixels, batch.items, strict=True)):
        if image is None:
            one = pairs.sample(item, corrupt)
            images.append(one.image.to(device))
            keys[row] = one.key
            tokens[row] = pairs.tokenizer([one.caption])[0]
            continue
        rng, _ = pairs.caption_choice(item, 1)
        images.append(augmented(image, pairs.image_size, pairs.augment, rng))
    return Batch(torch.stack(images), tokens, keys, corrupt)


def _decode(data: list[torch.Tensor], device: torch.device) -> list[torch.Tensor | None]:
    """Return [3, H, W] uint8 per image, None where the device cannot decode it."""
    jpegs = [i for i, one in enumerate(data) if bytes(one[:2].tolist()) == JPEG]
    found: list[torch.Tensor | None] = [None] * len(data)
    if not jpegs:
        return found
    try:
        images = decode_jpeg([data[i] for i in jpegs], mode=ImageReadMode.RGB, device=device)
        for i, image in zip(jpegs, images, strict=True):
            found[i] = image
    except RuntimeError:  # one bad image refuses the whole list: find it
        for i in jpegs:
            found[i] = _decode_one(data[i], device)
    return found


def _decode_one(data: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    try:
        return decode_jpeg([data], mode=ImageReadMode.RGB, device=device)[0]
    except RuntimeError:
        return None
