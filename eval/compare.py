"""Results of all arms in, one table out: `compare.csv` for programs, `compare.md` for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.files import atomic_write
from eval.columns import COST, Column, describe, headline_metrics, metric_order
from eval.results import ArmResult, RunResult, read_run
from eval.results import write_result as write_result
from eval.statistics import Difference, paired_bootstrap
from eval.table import Line, load_results, sets, summarise


@dataclass(frozen=True)
class Contrast:
    """One arm against another on the same queries.

    Attributes:
        first: the arm that is asked about.
        second: the arm that it is compared with.
        metric: `SET/i2t_r1`, `SET/t2i_r1` or `SET/top1`.
        difference: first minus second, as a fraction, with its interval.
    """

    first: str
    second: str
    metric: str
    difference: Difference

    @property
    def title(self) -> str:
        """Set and metric, for people."""
        column = describe(self.metric)
        return f"{column.group} {column.title}"

    @property
    def points(self) -> str:
        """The difference in percentage points."""
        return f"{100 * self.difference.value:+.1f}"

    @property
    def interval(self) -> str:
        """Its 95 % interval in percentage points."""
        return f"{100 * self.difference.low:+.1f} to {100 * self.difference.high:+.1f}"


def write_comparison(run: str | Path, *, out: str | Path | None = None) -> Path:
    """Write `compare.csv` and `compare.md` of a run; returns the path of the Markdown.

    Args:
        run: the run folder.
        out: where to write; None: into the run folder.

    Raises:
        UserError: it is no run folder.
    """
    result = read_run(run)
    folder = Path(out) if out is not None else result.path
    frame = load_results(result)
    atomic_write(folder / "compare.csv", frame.to_csv(index=False, lineterminator="\n"))
    path = folder / "compare.md"
    atomic_write(path, markdown(result, summarise(frame)))
    return path


def markdown(result: RunResult, lines: Sequence[Line]) -> str:
    """Return the tables as Markdown that is aligned and so reads well in a terminal too."""
    names = metric_order((name for line in lines for name in line.values), sets(result))
    parts = [f"# {result.name}\n"]
    parts.append(_headline_table(result, lines, names))
    for group in dict.fromkeys(describe(name).group for name in names):
        columns = [describe(name) for name in names if describe(name).group == group]
        if group:
            parts += [f"\n## {group} (%)\n", _table(lines, [c for c in columns if c.scale == 100])]
            parts.append(_counts(lines, group))
        else:
            parts += ["\n## Cost\n", _table([x for x in lines if not x.before], columns)]
    contrasts = compare_arms(result)
    if contrasts:
        parts += ["\n## Differences in percentage points\n", _contrast_table(contrasts)]
        parts.append(
            "\n95 % intervals: paired bootstrap, 2,000 draws of whole images with their captions.\n"
        )
    lost = [f"- {line.arm}: {line.reason}" for line in lines if line.reason]
    if lost:
        parts += ["\n## Without a result\n", "\n".join(lost) + "\n"]
    return "".join(f"{part}\n" if not part.endswith("\n") else part for part in parts)


def ratio(line: Line, reference: Line | None, metric: str) -> float | None:
    """Return a metric relative to the reference arm's; None where either is missing or zero."""
    own, other = line.mean(metric), reference.mean(metric) if reference else None
    return own / other if own is not None and other else None


def reference_line(result: RunResult, lines: Sequence[Line]) -> Line | None:
    """Return the teacher's line, None without a teacher that has a result."""
    found = (x for x in lines if x.arm == result.reference and not x.before and x.values)
    return next(found, None)


def _headline_table(result: RunResult, lines: Sequence[Line], names: Sequence[str]) -> str:
    """R@1, top-1 and the main costs of every arm, with the size relative to the teacher's."""
    quality = [describe(name) for name in headline_metrics(names, sets(result))]
    several = len({column.group for column in quality}) > 1
    cost = [describe(name) for name in COST[:3] if name in names]
    reference = reference_line(result, lines)
    header = ["arm"]
    header += [f"{c.group} {c.title}" if several else c.title for c in quality]
    header += [column.title for column in cost]
    header += ["x teacher"] if reference else []
    rows = []
    for line in lines:
        row = [line.title, *_cells(line, [*quality, *cost])]
        if reference:
            share = ratio(line, reference, "params")
            row.append("-" if share is None else f"{share:.3f}")
        rows.append(row)
    return _align(header, rows)


def _table(lines: Sequence[Line], columns: Sequence[Column]) -> str:
    rows = [[line.title, *_cells(line, columns)] for line in lines]
    return _align(["arm", *(column.title for column in columns)], rows)


def _cells(line: Line, columns: Sequence[Column]) -> list[str]:
    cells = []
    for column in columns:
        value = line.values.get(column.metric)
        cells.append("-" if value is None else column.show(value.mean, value.spread))
    return cells


def _counts(lines: Sequence[Line], group: str) -> str:
    """Say on how many images, captions and classes a table rests."""
    said = []
    for name in ("images", "captions", "classes"):
        counts = {line.mean(f"{group}/{name}") for line in lines} - {None}
        said += [
            f"{' or '.join(f'{count:.0f}' for count in sorted(filter(None, counts)))} {name}"
        ] * (len(counts) > 0)
    return f"\n{', '.join(said)}\n" if said else ""


def _align(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that lines up: the first column to the left, the others right."""
    widths = [
        max(3, len(title), *(len(row[place]) for row in rows)) for place, title in enumerate(header)
    ]

    def join(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([join(header), join(rule), *(join(row) for row in rows)]) + "\n"


def compare_arms(result: RunResult) -> list[Contrast]:
    """Compare the arms in pairs, per query: the inherited arms with every other one.

    Seeds of an arm are averaged per query. Empty where no arm was inherited or where queries were
    not kept; arms that answered other queries are not compared.
    """
    hits = {}
    for name in dict.fromkeys(arm.arm for arm in result.arms):
        found = _hits([arm for arm in result.arms if arm.arm == name and arm.state == "done"])
        if found:
            hits[name] = found
    inherited = [arm for arm in hits if is_inherited(result, arm)]
    contrasts = []
    for first in inherited:
        for second in (arm for arm in hits if arm != first):
            for metric, (own, cluster) in hits[first].items():
                other, other_cluster = hits[second].get(metric, (np.empty(0), np.empty(0)))
                if not np.array_equal(cluster, other_cluster):
                    continue
                difference = paired_bootstrap(own, other, cluster)
                contrasts.append(Contrast(first, second, metric, difference))
    return contrasts


def is_inherited(result: RunResult, arm: str) -> bool:
    """Say whether an arm was inherited: by its configured kind, its plan, or its name."""
    settings = result.config.get("arms")
    own = settings.get(arm) if isinstance(settings, dict) else None
    if isinstance(own, dict) and "kind" in own:
        return str(own["kind"]).startswith("inherit")
    planned = any(x.plan is not None or x.before is not None for x in result.arms if x.arm == arm)
    return planned or arm.startswith("inherit")


def _hits(arms: Sequence[ArmResult]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return metric -> (hits per query averaged over seeds, image of each query)."""
    found: dict[str, list[np.ndarray]] = {}
    clusters: dict[str, np.ndarray] = {}
    for arm in arms:
        arrays = arm.queries()
        for key, ranks in arrays.items():
            kind, _, name = key.partition(":")
            if kind != "rank":
                continue
            group, _, direction = name.rpartition("/")
            metric = f"{group}/{'top1' if direction == 'class' else direction + '_r1'}"
            owner = arrays.get(f"owner:{group}") if direction == "t2i" else None
            found.setdefault(metric, []).append(ranks <= 1)
            clusters[metric] = np.arange(len(ranks)) if owner is None else owner
    return {
        metric: (np.mean(hits, axis=0), clusters[metric])
        for metric, hits in found.items()
        if len({len(own) for own in hits}) == 1
    }


def _contrast_table(contrasts: Sequence[Contrast]) -> str:
    rows = [[f"{x.first} - {x.second}", x.title, x.points, x.interval] for x in contrasts]
    return _align(["arms", "metric", "difference", "95 % interval"], rows)
