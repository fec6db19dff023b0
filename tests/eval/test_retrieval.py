"""Recall against a brute-force reading of CLIP_benchmark's definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eval.retrieval import nearest, recall_at_k, retrieval_ranks


def brute_force(image: Tensor, text: Tensor, owner: Tensor, k: int) -> tuple[float, float]:
    """CLIP_benchmark: build [texts, images] scores and positives, top-k, any positive counts."""
    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), owner] = True

    def any_hit(scores: Tensor, positive: Tensor) -> float:
        top = scores.topk(min(k, scores.shape[1]), dim=1).indices
        hits = [bool(positive[row, top[row]].any()) for row in range(len(scores))]
        return sum(hits) / len(hits)

    return any_hit(scores.T, positive.T), any_hit(scores, positive)


def random_set(images: int, extra: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(images), torch.randint(images, (extra,), generator=generator)])
    owner = owner[torch.randperm(len(owner), generator=generator)]
    image = torch.nn.functional.normalize(torch.randn(images, width, generator=generator), dim=1)
    noise = torch.randn(len(owner), width, generator=generator)
    text = torch.nn.functional.normalize(image[owner] + 0.8 * noise, dim=1)
    return image, text, owner


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 40),
    extra=st.integers(0, 80),
    width=st.integers(2, 8),
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 100, 1 << 20]),
)
def test_recall_is_what_brute_force_finds(
    images: int, extra: int, width: int, seed: int, chunk: int
) -> None:
    image, text, owner = random_set(images, extra, width, seed)
    found = recall_at_k(image.double(), text.double(), owner, (1, 5, 10), chunk_elements=chunk)
    for k in (1, 5, 10):
        i2t, t2i = brute_force(image.double(), text.double(), owner, k)
        assert found[f"i2t_r{k}"] == pytest.approx(i2t)
        assert found[f"t2i_r{k}"] == pytest.approx(t2i)
    assert list(found) == ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"]


def test_chunks_do_not_change_ranks() -> None:
    image, text, owner = random_set(300, 700, 16, 1)
    whole = retrieval_ranks(image.double(), text.double(), owner)
    for chunk in (1, 1000, 7777):
        parts = retrieval_ranks(image.double(), text.double(), owner, chunk_elements=chunk)
        assert torch.equal(whole[0], parts[0])
        assert torch.equal(whole[1], parts[1])


def test_a_collapsed_model_scores_nothing() -> None:
    image, text = torch.ones(20, 4) / 2, torch.ones(40, 4) / 2
    owner = torch.arange(20).repeat(2)
    recalls = recall_at_k(image, text, owner)
    assert set(recalls.values()) == {0.0}


def test_every_image_counts_once_however_many_captions_it_has() -> None:
    image = torch.eye(3)
    # Image 0 owns three captions of which one is right at the top; image 2 is never found.
    text = torch.stack([image[0], image[1], image[1], image[1], image[0]])
    owner = torch.tensor([0, 0, 0, 1, 2])
    i2t, t2i = retrieval_ranks(image, text, owner)
    # Ties with the captions of others count against an image.
    assert i2t.tolist() == [2, 3, 5]
    assert t2i.tolist() == [1, 3, 3, 1, 3]


def test_one_image_one_caption() -> None:
    recalls = recall_at_k(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.long))
    assert set(recalls.values()) == {1.0}


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ([0, 0, 2], "1 images have no caption"),
        ([0, 1, 3], "does not exist"),
        ([0, 1], "owners of shape"),
    ],
)
def test_impossible_owners_are_refused(owner: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(torch.eye(3), torch.eye(3), torch.tensor(owner))


def test_nan_is_refused_since_it_would_rank_first() -> None:
    image = torch.eye(3)
    image[1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        retrieval_ranks(image, torch.eye(3), torch.arange(3))


def test_nearest_gives_fewer_where_there_are_fewer() -> None:
    scores, found = nearest(torch.eye(4)[:2], torch.eye(4)[:3], 5)
    assert found.shape == scores.shape == (2, 3)
    assert found[:, 0].tolist() == [0, 1]
