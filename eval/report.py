"""A run folder in, `report.html` out: one page that needs nothing but a browser."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_prep.files import atomic_write
from eval import figures
from eval.columns import COST, Column, describe, headline_metrics, metric_order
from eval.compare import compare_arms, ratio, reference_line
from eval.examples import Examples, Query, read_examples
from eval.results import ArmResult, RunResult, read_run
from eval.summary import facts, headline, primary_quality
from eval.table import Line, load_results, sets, summarise

EXAMPLE_ARMS = 4
"""Arms whose retrievals are shown side by side; more do not fit beside each other."""


def write_report(run: str | Path, *, out: str | Path | None = None) -> Path:
    """Write `report.html` (and `figures/*.svg`) of a run; returns the path of the page.

    The page is made of whatever the run folder holds and names what is missing.

    Args:
        run: the run folder.
        out: where to write; None: into the run folder.

    Raises:
        UserError: it is no run folder.
    """
    result = read_run(run)
    folder = Path(out) if out is not None else result.path
    lines = summarise(load_results(result))
    drawn = _figures(result, lines)
    for name, svg in drawn.items():
        atomic_write(folder / "figures" / f"{name}.svg", svg)
    path = folder / "report.html"
    atomic_write(path, render(result, lines, drawn))
    return path


def render(result: RunResult, lines: Sequence[Line], drawn: dict[str, str]) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    said = headline(result, lines)
    return environment.get_template("report.html.j2").render(
        name=result.name,
        headline=said,
        facts=facts(result),
        tables=_tables(result, lines),
        lost=[line for line in lines if line.reason],
        contrasts=compare_arms(result),
        figures={name: Markup(figures.themed(svg)) for name, svg in drawn.items()},
        inheritance=[_inheritance(arm) for arm in result.arms if arm.plan],
        examples=_examples(result),
        config=result.config_text,
        arms=_colours(result),
    )


def _colours(result: RunResult) -> dict[str, int]:
    """Return arm -> colour index, in table order."""
    return {name: i for i, name in enumerate(dict.fromkeys(arm.arm for arm in result.arms))}


def _tables(result: RunResult, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return the overview, then a table per evaluation set, then cost."""
    names = metric_order((name for line in lines for name in line.values), sets(result))
    described = [describe(name) for name in names]
    quality = [describe(name) for name in headline_metrics(names, sets(result))]
    cost = [column for column in described if column.metric in COST[:3]]
    tables = [_one_table(result, lines, "", [*quality, *cost])]
    for group in dict.fromkeys(column.group for column in described if column.group):
        columns = [c for c in described if c.group == group and c.scale == 100]
        tables.append(_one_table(result, lines, group, columns))
        counts = [c for c in described if c.group == group and c.scale != 100]
        tables[-1]["note"] = ", ".join(
            f"{value:,.0f} {column.title}"
            for column in counts
            for value in sorted({line.mean(column.metric) or 0 for line in lines} - {0})
        )
    finals = [line for line in lines if not line.before]
    costs = [column for column in described if not column.group]
    tables.append(_one_table(result, finals, "cost", costs))
    return [table for table in tables if table["columns"]]


def _one_table(
    result: RunResult, lines: Sequence[Line], title: str, columns: Sequence[Column]
) -> dict[str, Any]:
    """Return rows of cells: text, bar length (quality only), and whether it is the best."""
    reference = reference_line(result, lines)
    colours = _colours(result)
    rows = []
    for line in lines:
        cells = []
        for column in columns:
            value = line.values.get(column.metric)
            share = ratio(line, reference, column.metric)
            show_share = share is not None and line is not reference and column.metric in COST[:2]
            cells.append(
                {
                    "text": "–" if value is None else column.show(value.mean, value.spread),
                    "bar": round(100 * value.mean, 1) if value and column.scale == 100 else None,
                    "share": f"{100 * share:.0f} %" if share is not None and show_share else "",
                }
            )
        rows.append({"line": line, "colour": colours.get(line.arm, 0), "cells": cells})
    several = len({column.group for column in columns if column.group}) > 1
    return {"title": title, "columns": columns, "rows": rows, "several": several, "note": ""}


def _figures(result: RunResult, lines: Sequence[Line]) -> dict[str, str]:
    drawn = {}
    colours = _colours(result)
    logs = {}
    for arm in result.arms:
        array = figures.curve(arm.log, ("loss/task", "loss"))
        if len(array) > 1:
            logs[arm.label] = (colours[arm.arm], array)
    if logs:
        drawn["learning"] = figures.learning_curves(logs, "contrastive loss")
    primary = primary_quality(result, lines)
    points = []
    for line in lines:
        size, quality = line.mean("params"), primary.of(line) if primary else None
        if size and quality is not None:
            points.append(
                figures.Point(line.arm, size, quality, colours.get(line.arm, 0), line.before)
            )
    if primary and points:
        drawn["scatter"] = figures.quality_against_size(points, f"{primary.title} (%)")
    for arm in result.arms:
        layers = _layers(arm)
        if layers:
            shares = [(x["name"], x["kind"], x["share"]) for x in layers]
            drawn[f"layers-{arm.folder.name}"] = figures.kept_shares(shares)
    return drawn


def _layers(arm: ArmResult) -> list[dict[str, Any]]:
    """Return the layers of a plan that name their parameters before and after."""
    listed = (arm.plan or {}).get("layers")
    layers = []
    for layer in listed if isinstance(listed, list) else []:
        if not isinstance(layer, dict):
            continue
        before, after = layer.get("params_before"), layer.get("params_after")
        if isinstance(before, (int, float)) and isinstance(after, (int, float)) and before:
            layers.append(
                {
                    "name": str(layer.get("name", "")),
                    "kind": str(layer.get("kind", "layer")),
                    "shape": "×".join(str(size) for size in layer.get("shape") or []),
                    "rank": layer.get("rank"),
                    "heads": layer.get("heads") or None,
                    "energy": _share(layer.get("energy")),
                    "error": _share(layer.get("error")),
                    "before": before,
                    "after": after,
                    "share": after / before,
                    "reason": str(layer.get("reason") or ""),
                }
            )
    return layers


def _share(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, (int, float)) else "–"


def _inheritance(arm: ArmResult) -> dict[str, Any]:
    """Return totals by kind of layer, and all layers, of an inherited arm."""
    layers = _layers(arm)
    plan = arm.plan or {}
    kinds = []
    for kind in dict.fromkeys(layer["kind"] for layer in layers):
        own = [layer for layer in layers if layer["kind"] == kind]
        before, after = sum(x["before"] for x in own), sum(x["after"] for x in own)
        dense = sum(x["after"] == x["before"] for x in own)
        kinds.append(
            {
                "kind": kind,
                "count": len(own),
                "dense": dense,
                "before": before / 1e6,
                "after": after / 1e6,
                "share": 100 * after / before,
            }
        )
    return {
        "arm": arm.label,
        "figure": f"layers-{arm.folder.name}",
        "kinds": kinds,
        "layers": layers,
        "changes": _changes(plan),
        "how": [f"{plan[key]}" for key in ("arm", "budget") if isinstance(plan.get(key), str)],
    }


def _changes(plan: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return (of what, before, after, share) for parameters, towers and multiply-adds."""
    towers = plan.get("towers")
    counted = [("all parameters", plan.get("total_before"), plan.get("total_after"))]
    for tower, counts in towers.items() if isinstance(towers, dict) else ():
        if isinstance(counts, dict):
            counted.append((f"{tower} tower", counts.get("before"), counts.get("after")))
    counted.append(("multiply-adds", plan.get("macs_before"), plan.get("macs_after")))
    return [
        (what, f"{before / 1e6:,.2f} M", f"{after / 1e6:,.2f} M", f"{100 * after / before:.1f} %")
        for what, before, after in counted
        if isinstance(before, (int, float)) and isinstance(after, (int, float)) and before
    ]


def _data_uri(path: Path) -> str:
    """Return a JPEG as a data URI; "" where there is no file."""
    if not path.is_file():
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _examples(result: RunResult) -> dict[str, Any]:
    """Return, per query, what each arm found; queries that not all arms answered are left out."""
    found: dict[str, tuple[Path, Examples]] = {}
    for arm in result.arms:
        read = read_examples(arm.folder)
        if read is not None and arm.arm not in found and len(found) < EXAMPLE_ARMS:
            found[arm.arm] = (arm.folder, read)
    if not found:
        return {}
    first = next(iter(found.values()))[1]
    asked = {
        direction: _side_by_side(
            {arm: (folder, getattr(read, direction)) for arm, (folder, read) in found.items()}
        )
        for direction in ("text_to_image", "image_to_text")
    }
    return {"set": first.set, "images": first.images, "captions": first.captions, **asked}


def _side_by_side(found: dict[str, tuple[Path, list[Query]]]) -> list[dict[str, Any]]:
    """Return queries with the answers of every arm, images as data URIs."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for arm, (folder, queries) in found.items():
        for query in queries:
            shown = {"text": query.text, "image": _data_uri(folder / query.image), "arms": {}}
            entry = entries.setdefault((query.key, query.text), shown)
            entry["arms"][arm] = [
                {**answer.model_dump(), "image": _data_uri(folder / answer.image)}
                for answer in query.results
            ]
    return [entry for entry in entries.values() if len(entry["arms"]) == len(found)]
