"""Image and text embeddings in, recall@k out, both directions, several captions per image.

"Recall" is what the CLIP literature reports and CLIP_benchmark computes: the share of queries with
*any* of their right answers among the k most similar. An image is found by a caption if it is among
the k images nearest to that caption; a caption set is found by an image if any of the image's
captions is among the k captions nearest to it.

Ranks are counted, not sorted: a right answer's rank is one plus the number of wrong answers at
least as similar. Ties thus count against the model. A collapsed model, whose embeddings are all the
same, scores 0 instead of whatever order the sort happened to leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Similarities held at once: 64 MiB in float32."""


def retrieval_ranks(
    image: Tensor, text: Tensor, owner: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Return the rank (1 = first) of the best right answer of every query.

    Args:
        image: [N, D] L2-normalised image embeddings.
        text: [M, D] L2-normalised caption embeddings.
        owner: [M] index of each caption's image; every image owns at least one caption.
        chunk_elements: how many similarities may be in memory at once.

    Returns:
        image-to-text ranks [N] and text-to-image ranks [M], int64, on the CPU.

    Raises:
        ValueError: shapes disagree, an image has no caption, or a value is not finite.
    """
    _check(image, text, owner)
    owner = owner.to(image.device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # training may have chosen TF32 or bfloat16
    try:
        return (
            _image_to_text(image, text, owner, max(1, chunk_elements // len(text))),
            _text_to_image(image, text, owner, max(1, chunk_elements // len(image))),
        )
    finally:
        torch.set_float32_matmul_precision(precision)


def _check(image: Tensor, text: Tensor, owner: Tensor) -> None:
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"embeddings of shapes {tuple(image.shape)} and {tuple(text.shape)}")
    if owner.shape != (len(text),):
        raise ValueError(f"{len(text)} captions but owners of shape {tuple(owner.shape)}")
    if max(len(image), len(text)) >= 1 << 24:
        raise ValueError("counts above 2**24 are not exact in float32")
    if not len(image) or not len(text):
        raise ValueError("no images or no captions")
    if int(owner.min()) < 0 or int(owner.max()) >= len(image):
        raise ValueError("a caption belongs to an image that does not exist")
    alone = int((torch.bincount(owner.cpu(), minlength=len(image)) == 0).sum())
    if alone:
        raise ValueError(f"{alone} images have no caption: their recall is not defined")
    # A comparison with NaN is false, so a NaN would rank first.
    if not bool(torch.isfinite(image).all() & torch.isfinite(text).all()):
        raise ValueError("embeddings contain NaN or infinity")


def _image_to_text(image: Tensor, text: Tensor, owner: Tensor, rows: int) -> Tensor:
    """[N] ranks: 1 + the wrong captions at least as similar as the best right one."""
    order = torch.argsort(owner, stable=True)
    bounds = torch.searchsorted(owner[order], torch.arange(len(image) + 1, device=owner.device))
    ranks = []
    for low in range(0, len(image), rows):
        high = min(low + rows, len(image))
        similarity = image[low:high] @ text.T
        own = order[bounds[low] : bounds[high]]
        row = owner[own] - low
        best = torch.full((high - low,), -torch.inf, device=image.device, dtype=image.dtype)
        best.scatter_reduce_(0, row, similarity[row, own], "amax")
        similarity[row, own] = -torch.inf
        ranks.append(_count_at_least(similarity, best[:, None]) + 1)
    return torch.cat(ranks).cpu()


def _count_at_least(similarity: Tensor, bound: Tensor) -> Tensor:
    """[R] int64: how many of each row [R, C] are at least the row's `bound` [R, 1]; overwrites.

    Comparing in place and adding floats is about eight times as fast on a CPU as adding booleans,
    and exact while there are fewer than 2**24 columns.
    """
    return similarity.ge_(bound).sum(dim=1).long()


def _text_to_image(image: Tensor, text: Tensor, owner: Tensor, rows: int) -> Tensor:
    """[M] ranks: the images at least as similar as the right one, itself included."""
    ranks = []
    for low in range(0, len(text), rows):
        similarity = text[low : low + rows] @ image.T
        right = similarity.gather(1, owner[low : low + rows, None])
        ranks.append(_count_at_least(similarity, right))
    return torch.cat(ranks).cpu()


def recall_from_ranks(ranks: Tensor, ks: Sequence[int]) -> list[float]:
    """Return the share of queries with rank at most k, for each k."""
    return [float((ranks <= k).double().mean()) for k in ks]


def recall_at_k(
    image: Tensor,
    text: Tensor,
    owner: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> dict[str, float]:
    """Return recall@k in both directions as fractions: `i2t_r1`, ..., `t2i_r10`.

    Arguments and errors are those of `retrieval_ranks`.
    """
    return recalls(*retrieval_ranks(image, text, owner, chunk_elements=chunk_elements), ks)


def recalls(i2t: Tensor, t2i: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Name the recalls of both directions' ranks: `i2t_r1`, ..., `t2i_r10`."""
    named: dict[str, float] = {}
    for direction, ranks in (("i2t", i2t), ("t2i", t2i)):
        for k, value in zip(ks, recall_from_ranks(ranks, ks), strict=True):
            named[f"{direction}_r{k}"] = value
    return named


def nearest(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (similarities [Q, k], indices [Q, k]) of the k nearest of `gallery` to each query."""
    found = (queries @ gallery.T).topk(min(k, len(gallery)), dim=1)
    return found.values, found.indices
