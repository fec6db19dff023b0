"""The commands `inherclip inherit` and `inherclip export`: arguments, and thin bodies.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXPORT_FORMATS = ("dense", "onnx", "torch-export")


def add_inherit_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `inherclip inherit`."""
    parser.description = (
        "Build a smaller descendant of a trained CLIP: every heavy layer of both towers becomes a "
        "low-rank layer made from the teacher's own weights; ranks follow from the budget."
    )
    parser.epilog = (
        "examples: inherclip inherit RN101 --untrained --budget params=0.5 --plan;  inherclip "
        "inherit runs/demo/arms/teacher/checkpoint --budget params=0.4 --calibration "
        "'data/scenes-train-*.tar' --out inherited"
    )
    parser.add_argument("teacher", help="checkpoint folder, ARCHITECTURE:TAG or ARCHITECTURE:FILE")
    parser.add_argument(
        "--budget",
        action="append",
        metavar="[GLOB:]UNIT=SHARE",
        help="params, weights, macs, latency or fidelity (a cosine), default params=0.4; repeat it "
        "with globs to give groups of layers their own share, as in visual.*:params=0.6",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument("--plan", action="store_true", help="print the plan, write no weights")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--untrained", action="store_true", help="random weights, to see sizes and timings"
    )
    parser.add_argument(
        "--arm",
        help="initialisation (default: svd without calibration data; with it sequential, or "
        "activation where one batch of all pairs would need too much memory)",
    )
    parser.add_argument("--allocator", help="how ranks are chosen (default: the best one)")
    parser.add_argument(
        "--heads", type=_heads, default=3, help="heads per layer, or auto (default 3)"
    )
    parser.add_argument(
        "--calibration",
        action="append",
        metavar="SHARDS",
        help="shards of pairs, a path with globs or {000..005} braces; repeatable",
    )
    parser.add_argument("--pairs", type=int, default=512, help="calibration pairs (default 512)")
    parser.add_argument(
        "--include", action="append", metavar="GLOB", help="inherit only layers with these names"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="leave these dense"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, metavar="DIR", help="write plan, table and figure")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _heads(text: str) -> int | str:
    return text if text == "auto" else int(text)


def run_inherit(args: argparse.Namespace) -> int:
    """Plan or build a descendant; print the plan."""
    import json

    from data_prep.errors import UserError
    from pipeline.inherit.report import write_report
    from pipeline.inherit.surgery import inherit

    if args.out is None and not args.plan:
        raise UserError("nowhere to write", where="--out", todo="give --out DIR, or --plan")
    if args.out is not None and (args.out / "model.json").exists():
        raise UserError("there is a checkpoint already", where=str(args.out), todo="choose another")
    teacher = _teacher(args)
    batches = _calibration(args, teacher)
    model, plan = inherit(
        teacher.model,
        budget=args.budget or "params=0.4",
        calibration=batches,
        heads=args.heads,
        arm=args.arm or (None if args.calibration else "svd"),
        include=tuple(args.include or ("*",)),
        exclude=tuple(args.exclude),
        seed=args.seed,
        cache=_cache(),
        **({"allocator": args.allocator} if args.allocator else {}),
    )
    print(json.dumps(plan.to_dict(), indent=1) if args.json else plan.table())
    if args.report is not None:
        write_report(plan, args.report)
    if args.plan:
        return 0
    from pipeline.models import Clip, save_checkpoint

    made = {"teacher": args.teacher, "teacher_sha256": teacher.sha256, "budget": plan.budget}
    made |= {"init": plan.arm, "heads": args.heads, "seed": args.seed}
    made |= {"calibration": args.calibration, "pairs": args.pairs if args.calibration else 0}
    save_checkpoint(Clip(model.cpu(), teacher.architecture, plan.structure, made), args.out)
    if not args.json:
        print(f"written: {args.out}")
    return 0


def _cache() -> Path:
    """Return the folder of the calibration moments."""
    import os

    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "inherclip" / "moments"


def _teacher(args: argparse.Namespace) -> Any:
    """Load the teacher onto the asked device."""
    import torch

    from data_prep.errors import UserError
    from pipeline.teachers import load_teacher

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is here", where="--device", todo="use --device cpu")
    teacher = load_teacher(args.teacher, untrained=args.untrained, seed=args.seed)
    teacher.model.to(device)
    return teacher


def _calibration(args: argparse.Namespace, teacher: Any) -> list[Any] | None:
    """Read the calibration pairs, or make one dummy pair so that multiply-adds are known."""
    import torch

    if not args.calibration:
        images = torch.zeros(1, 3, teacher.image_size, teacher.image_size)
        tokens = teacher.tokenizer()(["a photo"])
        return [(images, tokens)]
    from data_prep.reader import ShardSet
    from pipeline.stages import calibration_pairs

    where = Path(args.calibration[0]).parent
    patterns = [Path(pattern).name for pattern in args.calibration]
    shards = ShardSet.find(where, patterns)
    return list(calibration_pairs(shards, teacher, args.pairs, args.seed))


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `inherclip export`."""
    parser.description = (
        "Write a checkpoint in a form other programs read, and verify it against the model on "
        "random inputs."
    )
    parser.epilog = (
        "example: inherclip export runs/demo/arms/inherited/checkpoint --format onnx --out exported"
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder")
    parser.add_argument("--format", choices=EXPORT_FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of normalised embeddings allowed (default %(default)s)",
    )


def run_export(args: argparse.Namespace) -> int:
    """Export a checkpoint and print how far the exported towers are from the model's."""
    from pipeline.export import export
    from pipeline.models import load_checkpoint

    clip = load_checkpoint(args.checkpoint)
    for line in export(clip, args.format, args.out, tolerance=args.tolerance):
        print(line)
    return 0
