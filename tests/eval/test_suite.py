"""One model measured on whole sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from open_clip import CLIP, SimpleTokenizer
from open_clip.transform import image_transform
from pydantic import ValidationError

from data_prep.errors import UserError
from eval.contracts import Tokenizer, Transform
from eval.suite import EvalSet, Suite, evaluate, evaluate_all


def pairs(root: Path, **more: Any) -> EvalSet:
    return EvalSet(name="pairs", kind="retrieval", root=str(root), shards="test-*.tar", **more)


def words(root: Path, **more: Any) -> EvalSet:
    settings = {"classes": "classes.json", "name": "words", "shards": "test-*.tar"} | more
    return EvalSet(kind="zero_shot", root=str(root), **settings)


def test_every_image_and_caption_is_counted(
    model: CLIP, transform: Transform, tokenizer: Tokenizer, shard_folder: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    result = evaluate_all(
        model,
        transform,
        tokenizer,
        [pairs(shard_folder), words(shard_folder)],
        batch_size=10,
        latency_batch=2,
        threads=1,
        progress=lambda *said: seen.append(said),
    )
    captions = sum(i % 3 + 1 for i in range(23))
    assert result.metrics["pairs/images"] == result.metrics["words/images"] == 23
    assert result.metrics["pairs/captions"] == captions
    for name in ("pairs/i2t_r1", "pairs/t2i_r10", "words/top1", "words/top5"):
        assert 0 <= result.metrics[name] <= 1
    assert {"params", "macs", "latency_ms_b1", "images_per_s"} <= set(result.metrics)
    assert result.conditions["batch"] == 2
    assert seen[:3] == [("pairs images", done, 3) for done in (1, 2, 3)]
    assert ("pairs texts", 5, 5) in seen
    result.write_queries(tmp_path / "queries.npz")
    with np.load(tmp_path / "queries.npz", allow_pickle=False) as arrays:
        assert float((arrays["rank:pairs/t2i"] <= 1).mean()) == result.metrics["pairs/t2i_r1"]
        assert len(arrays["owner:pairs"]) == captions
        assert float((arrays["rank:words/class"] <= 1).mean()) == result.metrics["words/top1"]


def test_numbers_do_not_depend_on_batches(
    model: CLIP, transform: Transform, tokenizer: Tokenizer, shard_folder: Path
) -> None:
    found = [
        evaluate(model, transform, tokenizer, sets, batch_size=size, efficiency=False)
        for sets, size in (
            ([pairs(shard_folder), words(shard_folder)], 3),
            ([words(shard_folder), pairs(shard_folder)], 64),
        )
    ]
    assert found[0] == found[1]


def test_subsets_by_name_and_by_indices(
    model: CLIP, transform: Transform, tokenizer: Tokenizer, shard_folder: Path, tmp_path: Path
) -> None:
    listed = json.loads((shard_folder / "classes.json").read_text())
    path = tmp_path / "listed.json"
    path.write_text(json.dumps(listed | {"all_indices": list(range(7))}))
    plain = evaluate(model, transform, tokenizer, [words(shard_folder)], efficiency=False)
    for subset in ("all", list(range(7))):
        item = words(shard_folder, classes=str(path), subset=subset)
        assert evaluate(model, transform, tokenizer, [item], efficiency=False) == plain
    other = words(shard_folder, classes=str(path), subset="other")
    with pytest.raises(UserError, match="no subset 'other'"):
        evaluate(model, transform, tokenizer, [other], efficiency=False)


def test_labels_that_do_not_fit_are_refused_by_set(
    model: CLIP, transform: Transform, tokenizer: Tokenizer, shard_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "few.json"
    path.write_text(json.dumps({"classes": ["a", "b"], "templates": ["a {}."]}))
    item = words(shard_folder, classes=str(path))
    with pytest.raises(UserError, match="out of range") as fault:
        evaluate(model, transform, tokenizer, [item], efficiency=False)
    assert fault.value.where == "evaluation set words"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "zero_shot"}, "needs `classes`"),
        ({"kind": "retrieval", "classes": "imagenet"}, "belong to zero_shot"),
        ({"kind": "retrieval", "split": "test"}, "Extra inputs"),
        ({"kind": "captions"}, "'retrieval' or 'zero_shot'"),
        ({"kind": "retrieval", "name": "a/b"}, "pattern"),
    ],
)
def test_impossible_sets_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvalSet.model_validate({"name": "x", "shards": "x.tar"} | settings)


def test_sets_have_names_of_their_own_and_a_root(shard_folder: Path) -> None:
    item = EvalSet(name="x", kind="retrieval", shards="test-*.tar")
    with pytest.raises(ValidationError, match="named twice: x"):
        Suite(sets=(item, item))
    with pytest.raises(UserError, match="`root` is not set"):
        item.open()
    filled = Suite(sets=(item,)).with_root(shard_folder)
    assert filled.sets[0].open().num_samples == 23
    with pytest.raises(UserError):
        Suite(sets=(item,)).with_root(shard_folder / "nowhere").sets[0].open()


def test_real_photographs(
    shared_data: Path, make_model: Callable[..., CLIP], tmp_path: Path
) -> None:
    listed = json.loads((shared_data / "imagenet-classes.json").read_text())
    classes = {"classes": listed["classes"], "templates": listed["simple_templates"][:1]}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    root = str(shared_data)
    metrics = evaluate(
        make_model(),
        image_transform(32, is_train=False),
        SimpleTokenizer(context_length=16),
        [
            EvalSet(name="flickr8k", kind="retrieval", root=root, shards="flickr8k-test-*.tar"),
            EvalSet(
                name="imagenet",
                kind="zero_shot",
                root=root,
                shards="imagenet-sample-val.tar",
                classes=str(tmp_path / "classes.json"),
            ),
        ],
        batch_size=100,
        efficiency=False,
    )
    assert metrics["flickr8k/images"] == metrics["imagenet/images"] == 1000
    assert metrics["flickr8k/captions"] == 5000
    # Random weights know nothing: chance is 0.01 and 0.005, give or take.
    assert metrics["flickr8k/t2i_r10"] < 0.05
    assert metrics["imagenet/top5"] < 0.05
