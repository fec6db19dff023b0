"""Shards to training batches: augmentation, batching and placement.

Every random choice is a function of (seed, draw, sample), where `draw` is the number of the batch
since the start of training. Neither the number of loader processes nor an interruption changes it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data_prep.errors import UserError
from data_prep.reader import BatchSchedule, ShardSet
from pipeline.train.settings import AugmentSettings

LARGEST_SIDE = 8192  # a training image beyond this is a mistake or an attack


@dataclass
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: [b, 3, S, S] uint8.
        tokens: [b, L] int64.
        keys: The sample keys, for messages.
        corrupt: One message per sample that could not be decoded and was replaced.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    keys: list[str]
    corrupt: list[str]

    def pin_memory(self) -> Batch:
        """Pin for asynchronous copies to a GPU (called by the DataLoader)."""
        return Batch(self.images.pin_memory(), self.tokens.pin_memory(), self.keys, self.corrupt)


@dataclass
class Encoded:
    """One rank's part of a global batch whose images are still to be decoded (`train.decode`).

    Attributes:
        data: The encoded images, uint8 [n] each.
        items: (draw, global sample index) of each.
        tokens, keys, corrupt: As in `Batch`.
    """

    data: list[torch.Tensor]
    items: list[tuple[int, int]]
    tokens: torch.Tensor
    keys: list[str]
    corrupt: list[str]


@dataclass(frozen=True)
class Sample:
    """One augmented image [3, S, S] uint8 with the caption drawn for it."""

    image: torch.Tensor
    caption: str
    key: str


class TrainingPairs(Dataset[Batch | Encoded]):
    """Samples of a shard set as augmented batches; `__getitems__` makes a whole batch at once."""

    def __init__(
        self,
        shards: ShardSet,
        tokenizer: Callable[[list[str]], torch.Tensor],
        image_size: int,
        augment: AugmentSettings,
        seed: int,
        cache_decoded: bool = False,
        encoded: bool = False,
    ) -> None:
        self.shards, self.tokenizer, self.image_size = shards, tokenizer, image_size
        self.augment, self.seed, self.encoded = augment, seed, encoded
        self._cache: dict[int, tuple[torch.Tensor, list[str], str]] | None = (
            {} if cache_decoded else None
        )

    def __len__(self) -> int:
        return self.shards.num_samples

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> Batch | Encoded:
        """Return the batch for `(draw, global sample index)` pairs."""
        if self.encoded:
            return self._encoded(items)
        corrupt: list[str] = []
        samples = [self.sample(item, corrupt) for item in items]
        return Batch(
            torch.stack([sample.image for sample in samples]),
            self.tokenizer([sample.caption for sample in samples]),
            [sample.key for sample in samples],
            corrupt,
        )

    def sample(self, item: tuple[int, int], corrupt: list[str]) -> Sample:
        """Return one augmented sample; those passed over as unreadable are added to `corrupt`."""
        image, captions, key = self._readable(item[1], corrupt)
        rng, choice = self.caption_choice(item, len(captions))
        return Sample(augmented(image, self.image_size, self.augment, rng), captions[choice], key)

    def caption_choice(
        self, item: tuple[int, int], captions: int
    ) -> tuple[np.random.Generator, int]:
        """Return a sample's generator, past the choice of its caption, and that choice."""
        rng = np.random.default_rng((self.seed, *item))
        return rng, int(rng.random() * captions)

    def _encoded(self, items: Sequence[tuple[int, int]]) -> Encoded:
        data, captions, keys = [], [], []
        for item in items:
            raw = self.shards.read(item[1])
            data.append(torch.frombuffer(bytearray(raw.image_bytes), dtype=torch.uint8))
            choice = self.caption_choice(item, len(raw.captions))[1] if raw.captions else 0
            captions.append(raw.captions[choice] if raw.captions else "")
            if not raw.captions:
                data[-1] = data[-1][:0]  # unusable: the decoder finds a substitute
            keys.append(raw.key)
        return Encoded(data, [*items], self.tokenizer(captions), keys, [])

    def _readable(self, index: int, corrupt: list[str]) -> tuple[torch.Tensor, list[str], str]:
        """Return the sample, or the next readable one; those passed over are added to `corrupt`.

        A batch must stay full: a rank with fewer pairs than the others would hang the gather.
        """
        for failures in range(self.shards.num_samples):
            candidate = (index + failures) % self.shards.num_samples
            try:
                return self._decoded(candidate)
            except (OSError, ValueError) as error:
                corrupt.append(str(error))
        raise UserError("not one readable sample in the training shards")

    def _decoded(self, index: int) -> tuple[torch.Tensor, list[str], str]:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        raw = self.shards.read(index)
        captions = raw.captions
        if not captions:
            raise ValueError(f"{raw.shard}: {raw.key}: no caption")
        try:
            decoded = decode_image(raw.image_bytes), captions, raw.key
        except ValueError as error:
            raise ValueError(f"{raw.shard}: {raw.key}: {error}") from error
        if self._cache is not None:
            self._cache[index] = decoded
        return decoded


def decode_image(data: bytes) -> torch.Tensor:
    """Return an encoded image as uint8 [3, H, W] in RGB.

    Raises:
        ValueError: not an image, truncated, or larger than any training image should be.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if max(image.size) > LARGEST_SIDE:
                raise ValueError(f"image of {image.size[0]} x {image.size[1]} pixels")
            array = np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode: {error}") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def augmented(
    image: torch.Tensor, size: int, augment: AugmentSettings, rng: np.random.Generator
) -> torch.Tensor:
    """Return a random resized crop [3, size, size] uint8, colour-jittered if asked.

    The distribution of crops is torchvision's RandomResizedCrop (Szegedy et al. 2015, GoogLeNet).
    """
    top, left, height, width = _crop(image.shape[-2], image.shape[-1], augment, rng)
    image = F.resized_crop(
        image, top, left, height, width, [size, size], InterpolationMode.BICUBIC, antialias=True
    )
    if augment.color_jitter is not None and rng.random() < augment.color_jitter_prob:
        image = _jittered(image, augment.color_jitter, rng)
    if rng.random() < augment.gray_scale_prob:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    return image


def _crop(
    height: int, width: int, augment: AugmentSettings, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    low, high = np.log(augment.ratio[0]), np.log(augment.ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*augment.scale)
        ratio = np.exp(rng.uniform(low, high))
        crop_width, crop_height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    side = min(height, width)  # an image more elongated than the ratios allow: its centre
    return (height - side) // 2, (width - side) // 2, side, side


def _jittered(
    image: torch.Tensor, strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> torch.Tensor:
    brightness, contrast, saturation, hue = strengths
    image = F.adjust_brightness(image, float(rng.uniform(max(0, 1 - brightness), 1 + brightness)))
    image = F.adjust_contrast(image, float(rng.uniform(max(0, 1 - contrast), 1 + contrast)))
    image = F.adjust_saturation(image, float(rng.uniform(max(0, 1 - saturation), 1 + saturation)))
    return F.adjust_hue(image, float(rng.uniform(-hue, hue)))


class _NumberedBatches:
    """The schedule's batches as `(draw, index)` pairs, from batch number `start` on."""

    def __init__(self, schedule: BatchSchedule, start: int, end: int) -> None:
        self.schedule, self.start, self.end = schedule, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self.schedule.batches(self.start)
        for draw, indices in zip(range(self.start, self.end), batches, strict=False):
            yield [(draw, int(index)) for index in indices]


def training_batches(
    pairs: TrainingPairs,
    schedule: BatchSchedule,
    *,
    start: int,
    end: int,
    workers: int,
    pin: bool,
) -> DataLoader[Any]:
    """Return a loader over batches `start` to `end` of the schedule, in order, as `Batch`."""
    return DataLoader(
        pairs,
        batch_sampler=_NumberedBatches(schedule, start, end),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        persistent_workers=False,
        worker_init_fn=_one_thread if workers else None,
        # an iterator draws a seed when it starts; from the global generator, a resumed training
        # would draw once more than an undisturbed one
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


class Normalise:
    """uint8 [b,3,S,S] to floats with the model's mean and standard deviation, on the device."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean = torch.tensor(mean, device=device).mul(255).view(1, 3, 1, 1)
        self.factor = torch.tensor(std, device=device).mul(255).reciprocal().view(1, 3, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return [b,3,S,S] float32 on the device."""
        images = images.to(self.mean.device, non_blocking=True)
        images = images.float().sub_(self.mean).mul_(self.factor)
        return images.contiguous(memory_format=self.format)
