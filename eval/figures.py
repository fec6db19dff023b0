"""Numbers in, SVG text out: learning curves, quality against size, what each layer kept."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np

matplotlib.use("Agg")  # before pyplot: a machine without a display must do

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")

SERIES = (
    "#475569", "#0f8a72", "#c2571a", "#7c4dbd", "#1d6fb8", "#a8325e", "#8a6d0b", "#4d7c0f",
)  # fmt: skip
"""Colours of the arms, in table order; the page maps each to `--s0`, `--s1`, ..."""
INK, MUTED, GRID = "#1b2430", "#5f6b7a", "#dde2e8"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {
    colour: f"--s{number}" for number, colour in enumerate(SERIES)
}
_POINTS = 240
"""Points per learning curve: more than a screen can show only make the page heavier."""


@dataclass(frozen=True)
class Point:
    """One arm in the scatter: what it costs, how good it is.

    Attributes:
        label: its name.
        parameters: number of parameters.
        quality: a fraction.
        colour: index into SERIES.
        before: whether this is the arm before fine-tuning, drawn hollow.
    """

    label: str
    parameters: float
    quality: float
    colour: int
    before: bool = False


STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: sharp, selectable, in the page's font
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "legend.fontsize": 9,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
"""Matplotlib settings of every figure; colours are those that the page replaces."""


def _styled(draw: Callable[Arguments, str]) -> Callable[Arguments, str]:
    """Let a function draw in our style whatever the user's matplotlibrc says."""

    @wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> str:
        with plt.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """Return the figure as one <svg> element without prolog, metadata or background."""
    stream = io.StringIO()
    # The salt makes ids differ between the figures of a page, and equal for equal numbers.
    with plt.rc_context({"svg.hashsalt": title}):
        figure.savefig(
            stream,
            format="svg",
            transparent=True,
            metadata={"Creator": None, "Date": None, "Format": None, "Type": None},
        )
    plt.close(figure)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # The viewBox alone: the page decides how wide the figure is.
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def themed(svg: str) -> str:
    """Return an SVG for the page: colours become its CSS variables, fonts its own."""
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred running mean of [T] values; at the ends over what there is."""
    kernel = np.ones(min(max(1, window), len(values)))
    total = np.convolve(values, kernel, mode="same")
    return np.asarray(total / np.convolve(np.ones(len(values)), kernel, mode="same"))


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    picked = np.unique(np.linspace(0, len(steps) - 1, min(_POINTS, len(steps))).round().astype(int))
    return steps[picked], values[picked]


def curve(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> np.ndarray:
    """Return [T, 2] of (step, value): the first of `names` that the records have."""
    for name in names:
        found = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
        if found:
            array = np.array(found, dtype=np.float64)
            return array[np.isfinite(array[:, 1])]
    return np.empty((0, 2))


@_styled
def learning_curves(logs: Mapping[str, tuple[int, np.ndarray]], ylabel: str) -> str:
    """Draw a curve per arm: faint as logged, strong smoothed.

    Args:
        logs: arm -> (colour index, [T, 2] of step and value).
        ylabel: what the values are.
    """
    figure, axes = _figure(4.9, 3.3)
    for arm, (colour, array) in logs.items():
        steps, values = array[:, 0], array[:, 1]
        shade = SERIES[colour % len(SERIES)]
        if len(steps) > 20:
            axes.plot(*_thin(steps, values), color=shade, alpha=0.22, linewidth=0.8)
        axes.plot(*_thin(steps, smooth(values, len(values) // 40)), color=shade, label=arm)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.legend()
    return _svg(figure, "Learning curves")


@_styled
def quality_against_size(points: Sequence[Point], ylabel: str) -> str:
    """Draw every arm at its size and quality; an arrow leads from before to after training."""
    figure, axes = _figure(4.9, 3.3)
    finals = {point.label: point for point in points if not point.before}
    for point in points:
        shade = SERIES[point.colour % len(SERIES)]
        x, y = point.parameters / 1e6, 100 * point.quality
        face = "none" if point.before else shade
        axes.scatter([x], [y], s=64, facecolor=face, edgecolor=shade, linewidth=1.6, zorder=3)
        after = finals.get(point.label)
        if point.before and after is not None:
            axes.annotate(
                "",
                xy=(after.parameters / 1e6, 100 * after.quality),
                xytext=(x, y),
                arrowprops={"arrowstyle": "->", "color": shade, "shrinkA": 6, "shrinkB": 6},
            )
    _label_points(axes, points)
    axes.set_xlim(0, 1.12 * max(point.parameters for point in points) / 1e6)
    axes.set_ylim(0, max(5.0, 112 * max(point.quality for point in points)))
    axes.set_xlabel("parameters (millions)")
    axes.set_ylabel(ylabel)
    return _svg(figure, "Quality against size")


def _label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write names beside the points, keeping labels apart that would lie on each other."""
    top = max(5.0, 112 * max(point.quality for point in points))
    widest = 1.12 * max(point.parameters for point in points) / 1e6
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda item: -item.quality):
        x, y = point.parameters / 1e6, 100 * point.quality
        height = y
        while any(
            abs(height - other) < top / 15 and abs(x - at) < widest / 2 for at, other in taken
        ):
            height -= top / 60
        taken.append((x, height))
        right = x > 0.6 * widest
        axes.annotate(
            f"{point.label} before" if point.before else point.label,
            (x, height),
            xytext=(-9 if right else 9, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            fontsize=9,
            color=SERIES[point.colour % len(SERIES)],
        )


@_styled
def kept_shares(layers: Sequence[tuple[str, str, float]]) -> str:
    """Draw what share of its parameters each layer kept, in network order.

    Args:
        layers: (name, kind, share) of every layer that has parameters.
    """
    figure, axes = _figure(9.6, 2.6)
    kinds = list(dict.fromkeys(kind for _, kind, _ in layers))
    for number, kind in enumerate(kinds):
        own = [(i, share) for i, (_, k, share) in enumerate(layers) if k == kind]
        axes.bar(
            [i for i, _ in own],
            [100 * share for _, share in own],
            width=0.82,
            color=SERIES[(number + 1) % len(SERIES)],
            label=kind,
        )
    axes.axhline(100, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlim(-0.8, len(layers) - 0.2)
    axes.set_xlabel("layer, from input to output")
    axes.set_ylabel("parameters kept (%)")
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=min(5, len(kinds)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _svg(figure, "Parameters kept by each layer")
