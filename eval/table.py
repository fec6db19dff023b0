"""A run's results as a frame (a row per arm and seed) and as lines (a row per arm, for people)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from eval.columns import metric_order
from eval.results import ArmResult, RunResult, read_run

IDENTITY = ("arm", "seed", "state")
PROVENANCE = ("steps", "checkpoint_sha256", "reason")
BEFORE = "before/"
"""Prefix of the metrics that were taken before fine-tuning."""


@dataclass(frozen=True)
class Value:
    """A metric over the seeds of an arm: mean, and sample standard deviation if there are two."""

    mean: float
    spread: float | None = None


@dataclass(frozen=True)
class Line:
    """One arm in the table for people.

    Attributes:
        arm: its name.
        before: whether these are the numbers before fine-tuning.
        state: "done", or why there are no numbers.
        reason: details for people.
        seeds: how many seeds gave numbers.
        steps: training steps, None where unknown or not the same for all seeds.
        values: metric -> value; empty without a result.
    """

    arm: str
    before: bool
    state: str
    reason: str
    seeds: int
    steps: int | None = None
    values: dict[str, Value] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the first column says."""
        if self.before:
            return f"{self.arm}, before training"
        return self.arm if self.state == "done" else f"{self.arm} [{self.state}]"

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric, None where it was not measured."""
        value = self.values.get(metric)
        return None if value is None else value.mean


def load_results(run: str | Path | RunResult) -> pd.DataFrame:
    """Return a row per arm and seed, a column per metric, in a stable order.

    Columns: arm, seed, state; quality by set; the same before fine-tuning (`before/...`); cost;
    counts; steps, checkpoint_sha256, reason. Arms without a result are rows too, with a state other
    than "done".
    """
    result = run if isinstance(run, RunResult) else read_run(run)
    rows = [_row(arm) for arm in result.arms]
    known = (*IDENTITY, *PROVENANCE)
    metrics = metric_order(
        (name for row in rows for name in row if name not in known), sets(result)
    )
    frame = pd.DataFrame(rows, columns=[*IDENTITY, *metrics, *PROVENANCE])
    for name in ("seed", "steps"):
        frame[name] = frame[name].astype("Int64")
    return frame


def sets(result: RunResult) -> list[str]:
    """Return the names of the evaluation sets as configured; empty where nothing says so."""
    section = result.config.get("eval")
    listed = section.get("sets") if isinstance(section, dict) else None
    if isinstance(listed, dict):
        return [str(name) for name in listed]
    if isinstance(listed, list):
        return [str(item.get("name")) for item in listed if isinstance(item, dict)]
    return []


def _row(arm: ArmResult) -> dict[str, object]:
    before = {f"{BEFORE}{name}": value for name, value in arm.metrics_before.items() if "/" in name}
    steps = (arm.result or {}).get("steps")
    return {
        "arm": arm.arm,
        "seed": arm.seed if isinstance(arm.seed, int) else None,
        "state": arm.state,
        **(arm.metrics if arm.state == "done" else {}),
        **before,
        "steps": steps if isinstance(steps, int) else None,
        "checkpoint_sha256": (arm.result or {}).get("checkpoint_sha256"),
        "reason": arm.reason or None,
    }


def summarise(frame: pd.DataFrame) -> list[Line]:
    """Return one line per arm, and one before it with the numbers before fine-tuning, if any."""
    lines: list[Line] = []
    for arm, rows in frame.groupby("arm", sort=False):
        final = _values(rows[rows["state"] == "done"])
        cost = {name: final[name] for name in ("params", "macs") if name in final}
        before = _values(rows, BEFORE)
        done = int((rows["state"] == "done").sum())
        if before:
            lines.append(Line(str(arm), True, "done", "", len(rows), 0, before | cost))
        lost = rows[rows["state"] != "done"]
        state = "done" if done else str(lost["state"].iloc[0])
        counts = rows["steps"].dropna().unique()
        steps = int(counts[0]) if len(counts) == 1 else None
        lines.append(Line(str(arm), False, state, _reasons(rows, lost), done, steps, final))
    return lines


def _values(rows: pd.DataFrame, prefix: str = "") -> dict[str, Value]:
    values = {}
    for name in rows.columns:
        fits = name.startswith(BEFORE) if prefix else not name.startswith(BEFORE)
        if not fits or name in (*IDENTITY, *PROVENANCE):
            continue
        known = rows[name].dropna().astype(float)
        if len(known):
            spread = float(known.std(ddof=1)) if len(known) > 1 else None
            values[name.removeprefix(prefix)] = Value(float(known.mean()), spread)
    return values


def _reasons(rows: pd.DataFrame, lost: pd.DataFrame) -> str:
    texts = []
    for seed, state, reason in zip(lost["seed"], lost["state"], lost["reason"], strict=True):
        why = f": {reason}" if isinstance(reason, str) else ""
        texts.append(f"seed {seed} {state}{why}" if len(rows) > 1 else f"{state}{why}")
    return "; ".join(texts)
