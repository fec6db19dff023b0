"""A tiny real CLIP, tiny shards, and a fabricated run folder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from open_clip.transform import image_transform
from PIL import Image

from data_prep.reader import ShardSet
from data_prep.shards import Sample, write_shards
from eval.contracts import Tokenizer, Transform

WORDS = ("red", "green", "blue", "round", "square", "small", "large", "dark", "bright", "striped")


def tiny_clip(seed: int = 0, *, resnet: bool = True) -> CLIP:
    """A real open_clip model that takes milliseconds: 32-pixel images, 16 tokens."""
    torch.manual_seed(seed)
    vision = {"layers": [1, 1, 1, 1], "width": 8} if resnet else {"layers": 2, "width": 32}
    if not resnet:
        vision |= {"patch_size": 8, "head_width": 16}
    return CLIP(
        embed_dim=16,
        vision_cfg={**vision, "image_size": 32},
        text_cfg={"context_length": 16, "width": 32, "heads": 2, "layers": 2},
    ).eval()


@pytest.fixture
def model() -> CLIP:
    return tiny_clip()


@pytest.fixture
def make_model() -> Callable[..., CLIP]:
    return tiny_clip


@pytest.fixture(scope="session")
def transform() -> Transform:
    return image_transform(32, is_train=False)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return SimpleTokenizer(context_length=16)


def picture(number: int) -> bytes:
    """A PNG of its own for every number."""
    pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def captions_of(number: int) -> list[str]:
    """One to three captions, so that images own different numbers of them."""
    return [
        f"a {WORDS[(number + i) % 10]} thing {number} seen {i} times" for i in range(number % 3 + 1)
    ]


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(count: int = 23, prefix: str = "test", broken: int | None = None) -> Path:
        folder = tmp_path_factory.mktemp("shards")

        def sample(i: int) -> Sample:
            record = {"captions": captions_of(i), "label": i % 7}
            files = {"png": picture(i), "json": json.dumps(record).encode()}
            if i == broken:
                files["png"] = b"\x89PNG no"
            return Sample(f"{prefix}{i:05d}", files)

        write_shards((sample(i) for i in range(count)), folder, prefix, samples_per_shard=10)
        classes = {"classes": list(WORDS[:7]), "templates": ["a {} thing.", "one {} thing."]}
        (folder / "classes.json").write_text(json.dumps(classes))
        return folder

    return make


@pytest.fixture(scope="session")
def shard_folder(make_shards: Callable[..., Path]) -> Path:
    return make_shards()


@pytest.fixture(scope="session")
def shards(shard_folder: Path) -> ShardSet:
    return ShardSet.find(shard_folder, "test-*.tar")
