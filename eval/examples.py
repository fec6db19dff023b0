"""Embeddings of a retrieval set in, example queries with their nearest answers out.

Which queries are shown depends on the set alone, so that the arms of a run can be put side by side.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from data_prep.files import atomic_path, atomic_write
from data_prep.reader import ShardSet
from eval.contracts import Progress, Tokenizer, Transform
from eval.embed import decode_image
from eval.retrieval import nearest
from eval.suite import Embedded, EvalSet, embed_set


class Answer(BaseModel):
    """One thing that was found: an image (`key`, thumbnail `image`) or a caption (`text`)."""

    key: str
    image: str = ""
    text: str = ""
    score: float
    right: bool


class Query(BaseModel):
    """One query and its nearest answers, best first.

    Attributes:
        key: the image that asks, or that is the right answer.
        image: its thumbnail, relative to the arm's folder.
        text: the caption that asks; empty where an image asks.
        results: what was found.
    """

    key: str
    image: str
    text: str = ""
    results: list[Answer]


class Examples(BaseModel):
    """The content of `examples.json`."""

    set: str
    images: int
    captions: int
    text_to_image: list[Query]
    image_to_text: list[Query]


def write_examples(
    model: nn.Module,
    transform: Transform,
    tokenizer: Tokenizer,
    eval_set: EvalSet,
    folder: str | Path,
    *,
    embedded: Embedded | None = None,
    count: int = 6,
    k: int = 5,
    thumbnail: int = 112,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write `examples.json` and its thumbnails `examples/INDEX.jpg` into an arm's folder.

    Args:
        model: as for `evaluate`; so are transform, tokenizer, batch_size, device, workers.
        transform: see there.
        tokenizer: see there.
        eval_set: a retrieval set.
        folder: the arm's folder.
        embedded: `Evaluation.embedded[eval_set.name]`, if the set was just evaluated; embedding it
            is then not done again.
        count: queries in each direction.
        k: answers per query.
        thumbnail: longest side of a thumbnail in pixels.
        seed: of the choice of queries.
        batch_size: see `evaluate`.
        device: see `evaluate`.
        workers: see `evaluate`.
        progress: see `evaluate`.

    Returns:
        The path of `examples.json`. With several ranks all must call; rank 0 writes.

    Raises:
        UserError: the set cannot be read.
        ValueError: it is not a retrieval set.
    """
    if eval_set.kind != "retrieval":
        raise ValueError(f"{eval_set.name} is no retrieval set")
    path = Path(folder) / "examples.json"
    if embedded is None:
        embedded = embed_set(
            model,
            transform,
            tokenizer,
            eval_set,
            batch_size=batch_size,
            device=device,
            workers=workers,
            progress=progress,
        )
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return path
    gallery = _Gallery(embedded, eval_set.open(), Path(folder), thumbnail)
    queries = choose(len(embedded.images.keys), 2 * count, seed)
    half = (len(queries) + 1) // 2
    shown = Examples(
        set=eval_set.name,
        images=len(embedded.images.keys),
        captions=len(embedded.text),
        text_to_image=[gallery.text_to_image(index, k) for index in queries[:half]],
        image_to_text=[gallery.image_to_text(index, k) for index in queries[half:]],
    )
    atomic_write(path, shown.model_dump_json(indent=1, exclude_defaults=True) + "\n")
    return path


def read_examples(folder: str | Path) -> Examples | None:
    """Read `examples.json` of an arm; None where there is none, or none that can be read."""
    path = Path(folder) / "examples.json"
    try:
        return Examples.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def choose(total: int, count: int, seed: int) -> list[int]:
    """Choose up to `count` different numbers below `total`; the same for the same arguments."""
    return random.Random(seed).sample(range(total), min(count, total))


class _Gallery:
    """A retrieval set whose answers can be looked up and whose images can be shown."""

    def __init__(self, embedded: Embedded, shards: ShardSet, folder: Path, side: int) -> None:
        self.images, self.text = embedded.images, embedded.text
        self.owner: Tensor = embedded.images.owner
        self.texts = embedded.images.texts
        self.shards, self.folder, self.side = shards, folder, side
        self.shown: set[int] = set()

    def _picture(self, index: int) -> str:
        """Write the thumbnail of an image once; returns its path relative to the arm's folder."""
        name = f"examples/{index}.jpg"
        if index not in self.shown:
            image = decode_image(self.shards.read(index))
            image.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
            with atomic_path(self.folder / name) as temporary:
                image.save(temporary, "JPEG", quality=82)
            self.shown.add(index)
        return name

    def text_to_image(self, index: int, k: int) -> Query:
        """Return the images nearest to the first caption of image `index`."""
        query = int((self.owner == index).nonzero()[0])
        scores, found = nearest(self.text[query : query + 1], self.images.features, k)
        results = [
            Answer(
                key=self.images.keys[int(hit)],
                image=self._picture(int(hit)),
                score=round(float(score), 4),
                right=int(hit) == index,
            )
            for score, hit in zip(scores[0], found[0], strict=True)
        ]
        return Query(
            key=self.images.keys[index],
            text=self.texts[query],
            image=self._picture(index),
            results=results,
        )

    def image_to_text(self, index: int, k: int) -> Query:
        """Return the captions nearest to image `index`."""
        scores, found = nearest(self.images.features[index : index + 1], self.text, k)
        results = [
            Answer(
                key=self.images.keys[int(self.owner[hit])],
                text=self.texts[int(hit)],
                score=round(float(score), 4),
                right=int(self.owner[hit]) == index,
            )
            for score, hit in zip(scores[0], found[0], strict=True)
        ]
        return Query(key=self.images.keys[index], image=self._picture(index), results=results)
