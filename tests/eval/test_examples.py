"""Example retrievals: the same queries for every model, thumbnails, right answers marked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from open_clip import CLIP
from PIL import Image

from eval.contracts import Tokenizer, Transform
from eval.examples import write_examples
from eval.suite import EvalSet, evaluate_all


def test_examples_are_the_nearest_answers(
    make_model: Callable[..., CLIP],
    transform: Transform,
    tokenizer: Tokenizer,
    shard_folder: Path,
    tmp_path: Path,
) -> None:
    item = EvalSet(name="pairs", kind="retrieval", root=str(shard_folder), shards="test-*.tar")
    contents = []
    for seed in (0, 1):
        model, folder = make_model(seed), tmp_path / str(seed)
        result = evaluate_all(model, transform, tokenizer, [item], efficiency=False)
        path = write_examples(
            model,
            transform,
            tokenizer,
            item,
            folder,
            embedded=result.embedded["pairs"],
            count=3,
            thumbnail=24,
        )
        contents.append(json.loads(path.read_text()))
    first, second = contents
    for direction, query in (("text_to_image", "text"), ("image_to_text", "key")):
        assert len(first[direction]) == 3
        assert [x[query] for x in first[direction]] == [x[query] for x in second[direction]]
        for shown in first[direction]:
            scores = [answer["score"] for answer in shown["results"]]
            assert len(scores) == 5
            assert scores == sorted(scores, reverse=True)
    query = first["text_to_image"][0]
    for answer in query["results"]:
        assert answer["right"] == (answer["key"] == query["key"])
        with Image.open(tmp_path / "0" / answer["image"]) as thumbnail:
            assert thumbnail.format == "JPEG"
            assert max(thumbnail.size) == 24
    for shown in first["image_to_text"]:
        number = int(shown["key"].removeprefix("test"))
        for answer in shown["results"]:
            assert answer["right"] == (f" thing {number} " in answer["text"])


def test_examples_embed_the_set_where_that_was_not_done(
    model: CLIP, transform: Transform, tokenizer: Tokenizer, shard_folder: Path, tmp_path: Path
) -> None:
    item = EvalSet(name="pairs", kind="retrieval", root=str(shard_folder), shards="test-*.tar")
    path = write_examples(model, transform, tokenizer, item, tmp_path, count=50)
    content = json.loads(path.read_text())
    assert len(content["text_to_image"]) + len(content["image_to_text"]) == 23
    labels = EvalSet(name="w", kind="zero_shot", shards="x", classes="imagenet")
    with pytest.raises(ValueError, match="no retrieval set"):
        write_examples(model, transform, tokenizer, labels, tmp_path)
