"""Metric names in, table columns out: order, titles, units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

QUALITY = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "top1", "top5")
COST = ("params", "macs", "latency_ms_b1", "images_per_s", "texts_per_s", "peak_memory_mb")
COUNTS = ("images", "captions", "classes")
HEADLINE = ("i2t_r1", "t2i_r1", "top1")

_TITLES = {
    "i2t_r1": "I→T R@1", "i2t_r5": "I→T R@5", "i2t_r10": "I→T R@10",
    "t2i_r1": "T→I R@1", "t2i_r5": "T→I R@5", "t2i_r10": "T→I R@10",
    "top1": "top-1", "top5": "top-5",
    "params": "params M", "macs": "GMAC", "latency_ms_b1": "ms/pair",
    "images_per_s": "images/s", "texts_per_s": "texts/s", "peak_memory_mb": "memory MB",
}  # fmt: skip
_SCALES = {"params": 1e-6, "macs": 1e-9}
_DIGITS = {
    "params": 2, "macs": 3, "latency_ms_b1": 1,
    "images_per_s": 0, "texts_per_s": 0, "peak_memory_mb": 0,
}  # fmt: skip
_LOWER = ("params", "macs", "latency_ms_b1", "peak_memory_mb")


@dataclass(frozen=True)
class Column:
    """A metric as a column of a table for people.

    Attributes:
        metric: its name in eval.json.
        group: its evaluation set; "" for what it costs.
        title: short heading, with the unit.
        scale: factor from the stored to the shown number (100 for per cent).
        digits: decimals shown; None: as many as a number of this size needs.
        higher_is_better: whether more is better.
    """

    metric: str
    group: str
    title: str
    scale: float
    digits: int | None
    higher_is_better: bool

    def show(self, value: float, spread: float | None = None) -> str:
        """Format a value, with the spread over seeds where there is one."""
        shown = value * self.scale
        digits = self.digits
        if digits is None:
            digits = 1 if abs(shown) >= 100 else 2 if abs(shown) >= 1 else 4
        text = f"{shown:.{digits}f}"
        return text if spread is None else f"{text} ±{spread * self.scale:.{digits}f}"


def _split(metric: str) -> tuple[str, str]:
    group, _, name = metric.rpartition("/")
    return group, name


def _position(values: Sequence[str], name: str) -> tuple[int, str]:
    return (values.index(name), "") if name in values else (len(values), name)


def metric_order(metrics: Iterable[str], sets: Sequence[str] = ()) -> list[str]:
    """Return the metrics without repetition: quality by set, `before/`, cost, counts, the rest.

    Sets come in the order of `sets`, others after them by name; the order does not depend on the
    order of `metrics`.
    """

    def key(metric: str) -> tuple[object, ...]:
        before = metric.startswith("before/")
        group, name = _split(metric.removeprefix("before/"))
        count = name in COUNTS and bool(group)
        if group and not count:
            return (int(before), _position(list(sets), group), _position(QUALITY, name))
        if not group:
            return (2, (0, ""), _position(COST, name))
        return (3 + int(before), _position(list(sets), group), _position(COUNTS, name))

    return sorted(set(metrics), key=key)


def describe(metric: str) -> Column:
    """Return how a metric is shown."""
    group, name = _split(metric)
    quality = bool(group) and name not in COUNTS
    scale = 100.0 if quality else _SCALES.get(name, 1.0)
    digits = 1 if quality else _DIGITS.get(name, 0 if name in COUNTS else None)
    return Column(metric, group, _TITLES.get(name, name), scale, digits, name not in _LOWER)


def headline_metrics(metrics: Iterable[str], sets: Sequence[str] = ()) -> list[str]:
    """Return R@1 both ways and top-1 of every set, in table order."""
    return [
        name
        for name in metric_order(metrics, sets)
        if not name.startswith("before/") and _split(name)[0] and _split(name)[1] in HEADLINE
    ]
