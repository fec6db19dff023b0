"""`inherclip evaluate`, `compare` and `report`: checkpoints and runs in, numbers and pages out."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from data_prep.errors import UserError
from data_prep.files import atomic_write
from eval.suite import Suite
from pipeline.config import read_yaml, validate

if TYPE_CHECKING:
    import torch

    from eval.suite import Evaluation
    from pipeline.models import Clip


def read_suite(path: Path, root: Path | None) -> Suite:
    """Return the suite in a YAML file: its own, or the `eval` section of an experiment.

    Raises:
        UserError: the file is no suite, or a set has no folder.
    """
    content = read_yaml(path)
    if "eval" in content:
        data = content.get("data")
        configured = data.get("root") if isinstance(data, dict) else None
        root = root or (Path(configured) if configured else None)
        content = content["eval"]
    suite = validate(Suite, content, str(path))
    if root is not None:
        suite = suite.with_root(root)
    homeless = [item.name for item in suite.sets if item.root is None]
    if homeless:
        raise UserError(
            f"evaluation set {homeless[0]} names no folder", where=str(path), todo="give --root DIR"
        )
    return suite


def measure(clip: Clip, suite: Suite, device: torch.device) -> Evaluation:
    """Measure one model on all sets of a suite.

    Args:
        clip: moved to `device`.
        suite: whose sets all have a root.
        device: where to run.

    Raises:
        UserError: a set is unusable.
    """
    from eval.suite import evaluate_all

    return evaluate_all(
        clip.model.to(device),
        clip.transform(),
        clip.tokenizer(),
        suite.sets,
        batch_size=suite.batch_size,
        device=device,
        workers=suite.workers,
        efficiency=suite.efficiency,
        latency_batch=suite.latency_batch,
        threads=suite.threads,
    )


def run_evaluate(args: argparse.Namespace) -> int:
    """Measure each checkpoint on the suite; one `eval.json` each, and one table of all."""
    from eval.compare import write_comparison
    from eval.results import write_result
    from pipeline.teachers import load_teacher
    from pipeline.train.processes import choose_device

    say = Console()
    suite = read_suite(args.suite, args.root)
    for item in suite.sets:
        item.open()
    device = choose_device(args.device)
    for spec, arm in _named(args.checkpoints):
        folder = args.out / "arms" / arm
        if (folder / "eval.json").is_file() and not args.overwrite:
            say.print(f"{arm}: measured already (--overwrite measures again)", highlight=False)
            continue
        clip = load_teacher(spec)
        result = measure(clip, suite, device)
        result.write_queries(folder / "queries.npz")
        write_result(
            folder / "eval.json",
            arm=arm,
            checkpoint_sha256=clip.sha256 or str(clip.provenance.get("sha256", "")),
            metrics=result.metrics,
            seed=clip.provenance.get("seed"),
            steps=clip.provenance.get("steps"),
            checkpoint=spec,
            conditions=result.conditions,
        )
        say.print(f"{arm}: done", highlight=False)
    write_comparison(args.out)
    say.print((args.out / "compare.md").read_text(), markup=False, highlight=False, soft_wrap=True)
    return 0


def _named(specs: Sequence[str]) -> list[tuple[str, str]]:
    """Return (checkpoint, name): the arm's name where the path has one, else the path itself."""
    named, taken = [], set()
    for spec in specs:
        match = re.search(r"([^/]+)/arms/([^/]+)/(checkpoint|inherited)/?$", spec)
        name = spec.rstrip("/")
        if match:
            name = match[2] if match[3] == "checkpoint" else f"{match[2]}-before"
            name = name if name not in taken else f"{match[1]}-{name}"
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-")
        while name in taken:
            name += "_"
        taken.add(name)
        named.append((spec, name))
    return named


def run_compare(args: argparse.Namespace) -> int:
    """Write the comparison of one run, or of the arms of several runs side by side."""
    from eval.compare import write_comparison

    if len(args.runs) == 1 and args.out in (None, args.runs[0]):
        out = args.runs[0]
    else:
        out = _gathered(args.runs, args.out)
    write_comparison(out)
    Console().print((out / "compare.md").read_text(), markup=False, highlight=False, soft_wrap=True)
    return 0


def _gathered(runs: Sequence[Path], out: Path | None) -> Path:
    """Copy the results (not the weights) of several runs into one folder; arms are RUN.ARM."""
    from eval.results import read_run

    if out is None:
        raise UserError("several runs need a folder for their table", todo="give --out DIR")
    for run in runs:
        result = read_run(run)
        for arm in result.arms:
            name = arm.folder.name if len(runs) == 1 else f"{result.name}.{arm.folder.name}"
            if arm.state != "done":  # stays a marked row, also where it left no file
                status = {"state": "failed", "reason": f"{arm.state}: {arm.reason}"}
                atomic_write(out / "arms" / name / "status.json", json.dumps(status) + "\n")
                continue
            for file in ("eval.json", "eval_before.json", "queries.npz"):
                if (arm.folder / file).is_file():
                    target = out / "arms" / name / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(arm.folder / file, target)
    atomic_write(out / "runs.txt", "".join(f"{run}\n" for run in runs))
    return out


def run_report(args: argparse.Namespace) -> int:
    """Write `report.html` of one run."""
    from eval.report import write_report

    path = write_report(args.runs[0])
    Console().print(f"report: {path}", highlight=False)
    return 0
