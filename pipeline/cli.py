"""The `inherclip` command. Parsers only; whatever is heavy is imported by the chosen subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

USER_FAULT = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: `verify`, `doctor` found something wrong. 2: a fault of the input, explained in one
    message. 74: another process of a training is gone. 75: a signal stopped a training, which is
    saved. 130: interrupted; the same command
    continues.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _explained(error)


def _explained(error: Exception) -> int:
    """Print the faults that a user can mend; raise what is a bug, with its traceback."""
    if type(error).__name__ in ("StopRequested", "LostRank"):
        print(f"inherclip: {error}", file=sys.stderr)
        return int(error.code)  # type: ignore[attr-defined]
    if type(error).__name__ in ("UserError", "SlurmError"):
        print(f"inherclip: {error}", file=sys.stderr)
        return USER_FAULT
    if isinstance(error, OSError) and error.errno in (13, 28, 30):
        print(f"inherclip: {error}", file=sys.stderr)
        return USER_FAULT
    raise error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inherclip",
        description="Make a CLIP model smaller by inheritance, and compare it with distillation.",
        epilog="Start with `inherclip run configs/demo.yaml`; if it fails, try `inherclip doctor`.",
    )
    commands = parser.add_subparsers(title="commands, in the order the data flows", metavar="")
    _add(commands, "prepare", "captions and images -> checked shards", "data_prep.commands")
    _add(commands, "verify", "find what is wrong with shards", "data_prep.commands")
    _add_run(commands)
    _add(commands, "inherit", "teacher -> smaller checkpoint", "pipeline.inherit.commands")
    _add_train(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add(commands, "export", "checkpoint -> ONNX, torch.export, dense", "pipeline.inherit.commands")
    _add_submit(commands)
    _add(commands, "status", "what of a submitted run waits, runs, failed", "slurm.commands")
    _add(commands, "cancel", "cancel the jobs of a submitted run", "slurm.commands")
    _add(commands, "logs", "show the log of an arm's job", "slurm.commands")
    _add(commands, "doctor", "what this machine can do, and what is missing", "pipeline.doctor")
    return parser


def _add(commands: Any, name: str, text: str, module: str) -> None:
    """Add a subcommand whose arguments and body live in `module`, which imports nothing heavy."""
    import importlib

    home = importlib.import_module(module)
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    getattr(home, f"add_{name}_arguments")(parser)
    parser.set_defaults(run=getattr(home, f"run_{name}"))


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="the experiment's YAML, e.g. configs/demo.yaml")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder (default: runs/NAME of the config)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", help="override a key (YAML)"
    )


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="the whole experiment on this machine",
        description="Run all stages of an experiment: finished ones are skipped, interrupted ones "
        "continue, and what a change of the configuration touches is done again.",
        epilog="example: inherclip run configs/flickr8k.yaml --set data.root=/data/flickr8k",
    )
    _experiment_arguments(parser)
    parser.add_argument(
        "--only", nargs="+", metavar="ARM", help="these arms, and what they learn from"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would run and what is missing; run nothing",
    )
    parser.add_argument(
        "--stage", metavar="STAGE", help="one stage alone, e.g. evaluate:student (used by jobs)"
    )
    parser.add_argument(
        "--slice", metavar="I/N", help="one slice of --stage prepare (used by the jobs of an array)"
    )
    parser.set_defaults(run=_run)


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train one arm; resumes by itself",
        description="Train one arm whose inputs are there. Started plainly it is one process; "
        "torchrun and srun make it one rank of many.",
        epilog="example: torchrun --nproc-per-node 8 -m pipeline.cli train configs/cc3m_rn101.yaml "
        "--arm inherited. Exit code 75: stopped by a signal, saved; 74: another rank is gone; "
        "start it again in both cases.",
    )
    _experiment_arguments(parser)
    parser.add_argument("--arm", required=True, help="name of the arm")
    parser.set_defaults(run=_train)


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="any checkpoint on any suite",
        description="Measure checkpoints (ours, open_clip's, CLIP-KD's) on a suite.",
        epilog="example: inherclip evaluate RN101-quickgelu:openai runs/demo/arms/*/checkpoint "
        "--suite configs/demo.yaml --root runs/demo/data --out results",
    )
    parser.add_argument("checkpoints", nargs="+", help="folders, or ARCHITECTURE:TAG|FILE")
    parser.add_argument("--suite", type=Path, required=True, help="YAML: a suite, or an experiment")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--root", type=Path, help="folder of the shards where a set names none")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--overwrite", action="store_true", help="measure again what is there")
    parser.set_defaults(run=_lazy("pipeline.evaluate", "run_evaluate"))


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="results -> compare.csv, compare.md",
        description="Compare the arms of one or several runs.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="folder of the tables (default: the run itself)")
    parser.set_defaults(run=_lazy("pipeline.evaluate", "run_compare"))
    parser = commands.add_parser(
        "report",
        help="run -> report.html",
        description="Write one self-contained page about a run.",
    )
    parser.add_argument("runs", nargs=1, type=Path, metavar="run", help="run folder")
    parser.set_defaults(run=_lazy("pipeline.evaluate", "run_report"))


def _add_submit(commands: Any) -> None:
    import slurm.commands

    parser = commands.add_parser(
        "submit",
        help="the whole experiment through SLURM",
        description="Submit the stages that are not done as SLURM jobs.",
        epilog="example: inherclip submit configs/cc3m_rn101.yaml --cluster h100x8 --dry-run",
    )
    _experiment_arguments(parser)
    slurm.commands.add_submit_arguments(parser)
    parser.set_defaults(run=_lazy("pipeline.submit", "run_submit"))


def _lazy(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    def call(args: argparse.Namespace) -> int:
        import importlib

        return int(getattr(importlib.import_module(module), function)(args))

    return call


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline import runner
    from pipeline.dry_run import dry_run
    from pipeline.experiment import load_experiment

    experiment = load_experiment(args.config, args.set)
    run = args.out or Path("runs") / experiment.name
    say = Console()
    if args.dry_run:
        return dry_run(experiment, run, args.only, say)
    if args.stage == "prepare" and args.slice:
        return runner.run_slice(experiment, run, args.slice, say)
    if args.stage:
        return runner.run_single(experiment, run, args.stage, say)
    return runner.run_experiment(experiment, run, args.only, say)


def _train(args: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline import runner
    from pipeline.experiment import load_experiment

    experiment = load_experiment(args.config, args.set)
    runner.check_arms(experiment, [args.arm])
    run = args.out or Path("runs") / experiment.name
    return runner.run_single(experiment, run, f"train:{args.arm}", Console())


if __name__ == "__main__":
    sys.exit(main())
