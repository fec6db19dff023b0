"""Model and shards in, L2-normalised embeddings of every sample out, over all ranks.

The work is cut into batches, and whole batches go to ranks. A batch therefore holds the same
samples whatever the number of ranks, no sample is padded, dropped or repeated, and the result on
two ranks is the result on one.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data_prep.errors import UserError
from data_prep.reader import CorruptSampleError, RawSample, ShardSet
from eval.contracts import Progress, Tokenizer, Transform, encode, evaluating, floating_dtype
from eval.ranks import join, rank_batches, world_of


@dataclass(frozen=True)
class ImageEmbeddings:
    """Embeddings of a whole evaluation set, in shard order.

    Attributes:
        features: [N, D] float32 on the CPU, L2-normalised.
        keys: the N sample keys.
        labels: [N] int64, or None where no sample has a label.
        captions: the captions of each of the N images; empty lists where they were not wanted.
    """

    features: Tensor
    keys: list[str]
    labels: Tensor | None
    captions: list[list[str]]

    @property
    def texts(self) -> list[str]:
        """All captions, image by image."""
        return [caption for captions in self.captions for caption in captions]

    @property
    def owner(self) -> Tensor:
        """[M] int64: for each of `texts`, the index of its image."""
        counts = torch.tensor([len(captions) for captions in self.captions], dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(self.captions)), counts)


def decode_image(sample: RawSample) -> Image.Image:
    """Decode a sample's image to RGB.

    Raises:
        UserError: there is no image, or it cannot be decoded; names shard and key.
    """
    try:
        return Image.open(io.BytesIO(sample.image_bytes)).convert("RGB")
    # Pillow's decoders raise SyntaxError, ValueError and their own kinds besides OSError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unusable(sample, f"the image cannot be decoded ({error})") from error


def _unusable(sample: RawSample, what: str) -> UserError:
    return UserError(
        f"an evaluation sample cannot be used: {what}",
        where=f"{sample.shard}, sample {sample.key}",
        todo="repair or remove the sample: leaving it out silently would change the result",
    )


@dataclass(frozen=True)
class _Item:
    key: str
    label: int | None
    captions: list[str]


class _Images(Dataset[Any]):
    """The samples of a ShardSet, decoded and transformed; a fault is an item, not an exception.

    A DataLoader worker turns exceptions into new ones that carry a traceback for a message. Faults
    travel as values so that the reader of the message sees what the reader of the shard saw.
    """

    def __init__(self, shards: ShardSet, transform: Transform, captions: bool) -> None:
        self.shards, self.transform, self.captions = shards, transform, captions

    def __getitem__(self, index: int) -> tuple[Tensor, _Item] | UserError:
        try:
            sample = self.shards.read(index)
        except CorruptSampleError as error:
            return UserError(f"an evaluation sample cannot be read: {error}")
        except UserError as fault:
            return fault
        try:
            captions = list(sample.captions) if self.captions else []
            image = self.transform(decode_image(sample))
            return image, _Item(sample.key, sample.label, captions)
        except CorruptSampleError as error:
            return _unusable(sample, str(error))
        except UserError as fault:
            return fault


def _collate(
    samples: list[tuple[Tensor, _Item] | UserError],
) -> tuple[Tensor, list[_Item]] | UserError:
    images, items = [], []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        images.append(sample[0])
        items.append(sample[1])
    return torch.stack(images), items


def _check_finite(features: Tensor, what: str) -> None:
    bad = (~torch.isfinite(features)).any(dim=1)
    if bool(bad.any()):
        raise UserError(
            f"the model's {what} embeddings contain NaN or infinity "
            f"({int(bad.sum())} of {len(features)})",
            todo="the weights are damaged or the training diverged; use another checkpoint",
        )


def embed_images(
    model: nn.Module,
    transform: Transform,
    shards: ShardSet,
    *,
    batch_size: int,
    device: torch.device | str,
    workers: int = 0,
    captions: bool = True,
    progress: Progress | None = None,
) -> ImageEmbeddings:
    """Embed every image of an evaluation set, split over the ranks if there are several.

    Args:
        model: has `encode_image`; its parameters are already on `device`.
        transform: PIL image -> float tensor [3, S, S].
        shards: the evaluation set.
        batch_size: images per step on each rank.
        device: where to run.
        workers: processes that decode images; 0 decodes in this one.
        captions: whether the set's captions are wanted; then every sample must have one.
        progress: called after each batch of this rank.

    Returns:
        The same full result on every rank.

    Raises:
        UserError: a sample has no image that can be decoded or no caption (names shard and key),
            only some samples have a label, or embeddings are not finite.
    """
    device = torch.device(device)
    rank, world = world_of()
    batches = rank_batches(shards.num_samples, batch_size, rank, world)
    loader: Iterable[Any] = DataLoader(
        _Images(shards, transform, captions),
        batch_sampler=[list(batch) for batch in batches],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    features: list[Tensor] = []
    items: list[_Item] = []
    fault: UserError | None = None
    dtype = floating_dtype(model)
    with evaluating(model):
        for number, batch in enumerate(loader):
            if isinstance(batch, UserError):
                fault = batch
                break
            images = batch[0].to(device, dtype, non_blocking=True)
            features.append(encode(model, images, image=True).cpu())
            items.extend(batch[1])
            if progress is not None:
                progress("images", number + 1, len(batches))
    joined, all_items = join(features, items, fault, device)
    _check_finite(joined, "image")
    if len(joined) != shards.num_samples:
        raise AssertionError(f"embedded {len(joined)} of {shards.num_samples} images")
    return ImageEmbeddings(
        joined,
        [item.key for item in all_items],
        _labels(all_items),
        [item.captions for item in all_items],
    )


def _labels(items: list[_Item]) -> Tensor | None:
    """Return [N] labels, or None where no sample has one.

    Raises:
        UserError: some samples have a label and others do not.
    """
    labels = [item.label for item in items]
    missing = [item.key for item in items if item.label is None]
    if len(missing) == len(items):
        return None
    if missing:
        raise UserError(
            f"{len(missing)} of {len(items)} samples have no label, the first is {missing[0]}",
            todo="give every sample of the set a label, or none",
        )
    return torch.tensor(labels, dtype=torch.long)


def embed_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch_size: int,
    device: torch.device | str,
    progress: Progress | None = None,
) -> Tensor:
    """Embed texts, split over the ranks; returns [N, D] float32 on the CPU, L2-normalised.

    A text that occurs twice is embedded once: rounding differs with the place in a batch, and equal
    captions of different images must tie exactly.

    Raises:
        UserError: there are no texts, or embeddings are not finite.
    """
    device = torch.device(device)
    rank, world = world_of()
    place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    unique = list(place)
    batches = rank_batches(len(unique), batch_size, rank, world)
    features: list[Tensor] = []
    with evaluating(model):
        for number, batch in enumerate(batches):
            tokens = tokenizer([unique[index] for index in batch]).to(device)
            features.append(encode(model, tokens, image=False).cpu())
            if progress is not None:
                progress("texts", number + 1, len(batches))
    joined, _ = join(features, [], None, device)
    _check_finite(joined, "text")
    return joined[[place[text] for text in texts]]
