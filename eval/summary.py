"""A run in, what a hurried reader must know out: one sentence, and what was run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.columns import headline_metrics, metric_order
from eval.compare import is_inherited, ratio, reference_line
from eval.results import RunResult
from eval.table import Line, sets


@dataclass(frozen=True)
class Primary:
    """The one quality that the headline and the scatter speak of.

    Attributes:
        metrics: the metrics whose mean it is.
        title: what it is called.
    """

    metrics: tuple[str, ...]
    title: str

    def of(self, line: Line) -> float | None:
        """Return the quality of a line as a fraction, None where a metric is missing."""
        values = [line.mean(metric) for metric in self.metrics]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class Card:
    """A number worth large type."""

    value: str
    caption: str


@dataclass(frozen=True)
class Headline:
    """The sentence at the head of the page, and the numbers behind it."""

    sentence: str
    cards: tuple[Card, ...]


def primary_quality(result: RunResult, lines: Sequence[Line]) -> Primary | None:
    """Choose the quality to speak of: the first set's recall (mean of both directions).

    R@1 where the best arm reaches 10 %, else R@5, else R@10: below that the numbers are too
    small to tell arms apart. Top-1 where the first set is a zero-shot set.
    """
    names = {name for line in lines if not line.before for name in line.values}
    ordered = metric_order(names, sets(result))
    best = headline_metrics(ordered, sets(result))
    if not best:
        return None
    group = best[0].rpartition("/")[0]
    if f"{group}/i2t_r1" not in names:
        return Primary((best[0],), f"top-1 on {group}")
    for k in (1, 5, 10):
        chosen = Primary((f"{group}/i2t_r{k}", f"{group}/t2i_r{k}"), f"R@{k} on {group}")
        values = [chosen.of(line) for line in lines if not line.before]
        if k == 10 or max((value for value in values if value is not None), default=0) >= 0.1:
            return chosen
    return None


def headline(result: RunResult, lines: Sequence[Line]) -> Headline:
    """Say in one sentence what came out; computed from the numbers, never written beforehand."""
    primary = primary_quality(result, lines)
    finals = [line for line in lines if not line.before and line.values]
    if primary is None or not finals:
        return Headline("No arm of this run has a result yet.", ())
    reference = reference_line(result, lines)
    heirs = [line for line in finals if is_inherited(result, line.arm)]
    rated = [line for line in heirs if primary.of(line) is not None]
    if reference is None or not rated:
        return _ranking(primary, finals)
    heir = max(rated, key=lambda line: primary.of(line) or 0)
    return _inheritance(primary, reference, heir, lines)


def _percent(value: float) -> str:
    shown = f"{100 * value:.1f}" if abs(value) < 0.1 else f"{100 * value:.0f}"
    return f"{shown}\N{NO-BREAK SPACE}%"


def _ranking(primary: Primary, finals: Sequence[Line]) -> Headline:
    rated = [(value, line) for line in finals if (value := primary.of(line)) is not None]
    if not rated:
        return Headline(f"No arm was measured on {primary.title}.", ())
    value, best = max(rated, key=lambda pair: pair[0])
    size = best.mean("params")
    millions = f" with {size / 1e6:.1f} M parameters" if size else ""
    return Headline(f"{best.arm} reaches {_percent(value)} {primary.title}{millions}.", ())


def _inheritance(primary: Primary, reference: Line, heir: Line, lines: Sequence[Line]) -> Headline:
    own, teacher = primary.of(heir) or 0.0, primary.of(reference) or 0.0
    size = ratio(heir, reference, "params")
    cards = []
    sentence = f"The inherited model reaches {_percent(own)} {primary.title}"
    if teacher:
        sentence += f", {_percent(own / teacher)} of its teacher's {_percent(teacher)},"
        cards.append(Card(_percent(own / teacher), f"of the teacher's {primary.title}"))
    if size:
        sentence += f" with {_percent(size)} of the parameters"
        cards.append(Card(_percent(size), "of the teacher's parameters"))
    before = next((x for x in lines if x.before and x.arm == heir.arm), None)
    start = primary.of(before) if before else None
    if start is not None:
        cards.append(Card(_percent(start), f"{primary.title} before any training"))
    rivals = [
        (value, line)
        for line in lines
        if not line.before and line.arm not in (heir.arm, reference.arm)
        if (value := primary.of(line)) is not None
    ]
    if rivals:
        listed = ", ".join(f"{line.arm} {_percent(value)}" for value, line in rivals)
        as_long = heir.steps is not None and all(line.steps == heir.steps for _, line in rivals)
        sentence += f"; trained {'as long ' if as_long else ''}without inheritance: {listed}"
        value, best = max(rivals, key=lambda pair: pair[0])
        cards.append(Card(f"{100 * (own - value):+.1f}", f"points against {best.arm}"))
    return Headline(f"{sentence}.", tuple(cards))


def facts(result: RunResult) -> list[tuple[str, str]]:
    """Return what was run: (what, value), only what is known."""
    config, info = result.config, result.info
    found = [
        ("data", _data(config.get("data"))),
        ("steps", _steps(result)),
        ("seed", _text(config.get("seed"))),
        ("hardware", _hardware(result)),
        ("duration", _duration(result)),
        ("versions", _versions(result)),
        ("started", _text(info.get("started"))),
        ("commit", _text(info.get("commit"))),
        ("command", _text(info.get("command"))),
    ]
    return [(name, value) for name, value in found if value]


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, (dict, list)) else str(value)


def _data(data: Any) -> str:
    """Name the training data: how many rendered scenes, or which shards of which folder."""
    if not isinstance(data, dict):
        return _text(data)
    scenes = data.get("scenes")
    if isinstance(scenes, dict):
        count, side = scenes.get("train"), scenes.get("image_size")
        size = f" of {side} x {side} pixels" if side else ""
        return f"{count:,} rendered scenes{size}" if isinstance(count, int) else "rendered scenes"
    patterns = data.get("train")
    listed = ", ".join(map(str, patterns)) if isinstance(patterns, list) else _text(patterns)
    return ", ".join(part for part in (_text(data.get("root")), listed) if part)


def _steps(result: RunResult) -> str:
    counts = {
        arm.label: int((arm.result or {})["steps"])
        for arm in result.arms
        if isinstance((arm.result or {}).get("steps"), int)
    }
    counts = counts or {arm.label: int(arm.log[-1]["step"]) for arm in result.arms if arm.log}
    if len(set(counts.values())) == 1 and len(counts) == len(result.arms):
        return f"{next(iter(counts.values())):,} for every arm"
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _hardware(result: RunResult) -> str:
    if result.info.get("hardware"):
        return _text(result.info["hardware"])
    for arm in result.arms:
        conditions = (arm.result or {}).get("conditions")
        if isinstance(conditions, dict) and conditions.get("device"):
            return f"{conditions['device']}, {conditions.get('threads', '?')} threads"
    return ""


def _duration(result: RunResult) -> str:
    seconds = result.info.get("seconds")
    if not isinstance(seconds, (int, float)):
        seconds = sum(
            float(arm.log[-1]["seconds"])
            for arm in result.arms
            if arm.log and isinstance(arm.log[-1].get("seconds"), (int, float))
        )
        return f"{_clock(seconds)} of training" if seconds else ""
    return _clock(seconds)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _versions(result: RunResult) -> str:
    versions = result.info.get("versions")
    for arm in result.arms:
        if not isinstance(versions, dict):
            versions = (arm.result or {}).get("environment")
    if not isinstance(versions, dict):
        return ""
    return ", ".join(f"{name} {value}" for name, value in versions.items() if name != "time")
