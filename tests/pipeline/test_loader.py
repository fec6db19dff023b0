"""The training loader: any number of workers gives the same batches; bad samples are replaced."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.errors import UserError
from data_prep.reader import BatchSchedule, ShardSet
from data_prep.shards import Sample, write_shards
from pipeline.models import build_tokenizer
from pipeline.train.loader import TrainingPairs, training_batches
from pipeline.train.settings import AugmentSettings

TEXT = {"text_cfg": {"context_length": 16, "vocab_size": 1024}}


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (40, 52, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder: Path, bad: tuple[int, ...] = (), count: int = 24) -> ShardSet:
    samples = [
        Sample(f"{n:04d}", {"png": b"no image" if n in bad else picture(n), "txt": b"a cat"})
        for n in range(count)
    ]
    write_shards(samples, folder, "x", samples_per_shard=10)
    return ShardSet.find(folder, "x-*.tar")


def pairs(found: ShardSet, cache: bool = False) -> TrainingPairs:
    augment = AugmentSettings(
        scale=(0.4, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=0.5,
        gray_scale_prob=0.3,
    )  # fmt: skip
    return TrainingPairs(found, build_tokenizer(TEXT), 32, augment, seed=5, cache_decoded=cache)


def batches(
    dataset: TrainingPairs, workers: int, start: int = 0, end: int = 9
) -> list[torch.Tensor]:
    schedule = BatchSchedule(dataset.shards, 4, 0, 1, seed=5)
    loader = training_batches(
        dataset, schedule, start=start, end=end, workers=workers, pin=False
    )  # fmt: skip
    return [batch.images for batch in loader]


def test_workers_caching_and_a_later_start_change_nothing(tmp_path: Path) -> None:
    found = shards(tmp_path)
    expected = batches(pairs(found), 0)
    for other in (
        batches(pairs(found), 2),
        batches(pairs(found, cache=True), 0),
        batches(pairs(found), 0, end=4) + batches(pairs(found), 1, start=4),
    ):
        assert len(other) == len(expected) == 9
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


def test_a_corrupt_sample_is_named_and_replaced_by_the_next(tmp_path: Path) -> None:
    dataset = pairs(shards(tmp_path, bad=(3, 4)))
    batch = dataset.__getitems__([(0, 2), (0, 3)])
    assert batch.keys == ["0002", "0005"]
    assert batch.images.shape == (2, 3, 32, 32)
    assert len(batch.corrupt) == 2
    assert "x-000000.tar" in batch.corrupt[0]
    assert "0003" in batch.corrupt[0]


def test_a_set_without_one_readable_image_is_refused(tmp_path: Path) -> None:
    dataset = pairs(shards(tmp_path, bad=tuple(range(5)), count=5))
    with pytest.raises(UserError, match="not one readable sample"):
        dataset.__getitems__([(0, 0)])
