"""Hits of two models on the same queries in, the difference and its interval out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 2000
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Difference:
    """How much better the first model is: share of hits, with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    first: np.ndarray,
    second: np.ndarray,
    cluster: np.ndarray | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Return the difference of two hit rates with a paired percentile bootstrap interval.

    Both models answered the same queries, so queries are drawn for both at once. The captions of an
    image are not independent of each other: whole images are drawn where `cluster` says whose each
    query is.

    Args:
        first: [Q] whether the first model hit.
        second: [Q] whether the second model hit.
        cluster: [Q] index of the image of each query; None: each query is its own.
        draws: number of bootstrap samples.
        seed: seed of the draws.

    Raises:
        ValueError: the arrays differ in length or are empty.
    """
    if first.shape != second.shape or not len(first):
        raise ValueError(f"hits of shapes {first.shape} and {second.shape}")
    groups = (
        np.arange(len(first)) if cluster is None else np.unique(cluster, return_inverse=True)[1]
    )
    gains = np.bincount(groups, first.astype(np.float64) - second.astype(np.float64))
    sizes = np.bincount(groups).astype(np.float64)
    count = len(sizes)
    generator = np.random.default_rng(seed)
    step = max(1, _BLOCK // count)
    values = []
    for low in range(0, draws, step):
        picked = generator.multinomial(
            count, np.full(count, 1 / count), size=min(step, draws - low)
        ).astype(np.float64)
        values.append((picked @ gains) / (picked @ sizes))
    low_value, high_value = np.quantile(np.concatenate(values), [0.025, 0.975])
    return Difference(float(gains.sum() / sizes.sum()), float(low_value), float(high_value))
