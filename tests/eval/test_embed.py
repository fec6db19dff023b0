"""Embeddings of a set: complete, in order, the same on two ranks, and never silent about faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.model import CLIP

from data_prep.errors import UserError
from data_prep.reader import ShardSet
from data_prep.shards import Sample, write_shards
from eval.contracts import Tokenizer, Transform
from eval.embed import decode_image, embed_images, embed_texts
from eval.ranks import rank_batches
from eval.suite import EvalSet, evaluate

HERE = Path(__file__).parent


@given(total=st.integers(0, 200), size=st.integers(1, 30), world=st.integers(1, 9))
def test_ranks_share_every_index_once_and_in_order(total: int, size: int, world: int) -> None:
    batches = [batch for rank in range(world) for batch in rank_batches(total, size, rank, world)]
    assert [index for batch in batches for index in batch] == list(range(total))
    assert batches == rank_batches(total, size, 0, 1)
    per_rank = [len(rank_batches(total, size, rank, world)) for rank in range(world)]
    assert max(per_rank) - min(per_rank) <= 1


def test_embeddings_are_those_of_each_image(
    model: CLIP, transform: Transform, shards: ShardSet
) -> None:
    found = embed_images(model, transform, shards, batch_size=5, device="cpu")
    assert found.keys == [f"test{i:05d}" for i in range(23)]
    assert found.labels is not None
    assert found.labels.tolist() == [i % 7 for i in range(23)]
    assert [len(captions) for captions in found.captions] == [i % 3 + 1 for i in range(23)]
    assert found.owner.tolist() == [i for i in range(23) for _ in range(i % 3 + 1)]
    assert len(found.texts) == len(found.owner)
    with torch.no_grad():
        alone = model.encode_image(transform(decode_image(shards.read(17)))[None], normalize=True)
    torch.testing.assert_close(found.features[17], alone[0])
    torch.testing.assert_close(found.features.norm(dim=1), torch.ones(23))


def test_workers_and_mode_change_nothing(
    model: CLIP, transform: Transform, shards: ShardSet
) -> None:
    model.train()
    model.visual.bn1.eval()
    here = embed_images(model, transform, shards, batch_size=8, device="cpu")
    assert model.training
    assert not model.visual.bn1.training
    there = embed_images(model, transform, shards, batch_size=8, device="cpu", workers=2)
    assert torch.equal(here.features, there.features)
    assert here.keys == there.keys
    assert here.captions == there.captions


def test_texts_are_embedded_in_order(model: CLIP, tokenizer: Tokenizer) -> None:
    texts = [f"thing {i}" for i in range(11)]
    found = embed_texts(model, tokenizer, texts, batch_size=4, device="cpu")
    with torch.no_grad():
        expected = model.encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(found, expected)
    twice = embed_texts(model, tokenizer, [*texts, *texts[::-1]], batch_size=4, device="cpu")
    assert torch.equal(twice, torch.cat([found, found.flip(0)]))
    with pytest.raises(UserError, match="empty"):
        embed_texts(model, tokenizer, [], batch_size=4, device="cpu")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(
    model: CLIP, transform: Transform, make_shards: Callable[..., Path], workers: int
) -> None:
    broken = ShardSet.find(make_shards(12, broken=11), "test-*.tar")
    with pytest.raises(UserError, match="cannot be decoded") as fault:
        embed_images(model, transform, broken, batch_size=4, device="cpu", workers=workers)
    assert fault.value.where == "test-000001.tar, sample test00011"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"captions": []}, "no caption"),
        ({"captions": ["a"], "label": "x"}, "label"),
        ({"captions": ["a"]}, "1 of 2 samples have no label"),
    ],
)
def test_samples_that_lack_something_are_named(
    model: CLIP, transform: Transform, shards: ShardSet, tmp_path: Path, record: Any, message: str
) -> None:
    png = shards.read(0).image_bytes
    samples = [
        Sample("a", {"png": png, "json": json.dumps({"captions": ["a"], "label": 1}).encode()}),
        Sample("b", {"png": png, "json": json.dumps(record).encode()}),
    ]
    write_shards(samples, tmp_path, "few")
    with pytest.raises(UserError, match=message) as fault:
        embed_images(
            model, transform, ShardSet.find(tmp_path, "few-*.tar"), batch_size=4, device="cpu"
        )
    assert "b" in str(fault.value)


def test_a_set_of_labels_needs_no_captions(
    model: CLIP, transform: Transform, shards: ShardSet, tmp_path: Path
) -> None:
    png = shards.read(0).image_bytes
    write_shards([Sample("a", {"png": png, "cls": b"3"})], tmp_path, "few")
    found = embed_images(
        model,
        transform,
        ShardSet.find(tmp_path, "few-*.tar"),
        batch_size=4,
        device="cpu",
        captions=False,
    )
    assert found.labels is not None
    assert found.labels.tolist() == [3]
    assert found.captions == [[]]


def test_embeddings_that_are_not_finite_are_refused(
    model: CLIP, transform: Transform, shards: ShardSet
) -> None:
    with torch.no_grad():
        model.visual.conv1.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"NaN or infinity \(23 of 23\)"):
        embed_images(model, transform, shards, batch_size=8, device="cpu")


@pytest.fixture(scope="module")
def ranks(
    make_shards: Callable[..., Path], shard_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of two ranks found; both must end, also where only one of them meets a fault."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "only-on-0").symlink_to(shard_folder)
    broken = make_shards(23, broken=22)
    path = f"{HERE.parent.parent}{os.pathsep}{HERE}"
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "two_ranks.py", str(rank), folder, shard_folder, broken],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_two_ranks_find_what_one_finds(
    ranks: list[dict[str, Any]],
    model: CLIP,
    transform: Transform,
    tokenizer: Tokenizer,
    shards: ShardSet,
) -> None:
    alone = embed_images(model, transform, shards, batch_size=4, device="cpu")
    text = embed_texts(model, tokenizer, alone.texts, batch_size=4, device="cpu")
    for found in ranks:
        torch.testing.assert_close(found["features"], alone.features, rtol=0, atol=1e-6)
        torch.testing.assert_close(found["text"], text, rtol=0, atol=1e-6)
        assert found["keys"] == alone.keys
        assert found["captions"] == alone.captions
        assert alone.labels is not None
        assert found["labels"].tolist() == alone.labels.tolist()
        assert found["single"].shape == (1, 16)
    assert torch.equal(ranks[0]["features"], ranks[1]["features"])
    assert ranks[0]["metrics"] == ranks[1]["metrics"]


def test_two_ranks_measure_what_one_measures(
    ranks: list[dict[str, Any]],
    model: CLIP,
    transform: Transform,
    tokenizer: Tokenizer,
    shard_folder: Path,
) -> None:
    root = str(shard_folder)
    sets = [
        EvalSet(name="pairs", kind="retrieval", root=root, shards="test-*.tar"),
        EvalSet(
            name="words", kind="zero_shot", root=root, shards="test-*.tar", classes="classes.json"
        ),
    ]
    alone = evaluate(model, transform, tokenizer, sets, batch_size=4, efficiency=False)
    assert {name: ranks[0]["metrics"][name] for name in alone} == alone
    assert ranks[0]["metrics"]["params"] > 0


def test_a_fault_on_one_rank_is_raised_on_both(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert len(found["faults"]) == 2
        assert "sample test00022" in found["faults"][0]
        assert "only-on-1" in found["faults"][1]
