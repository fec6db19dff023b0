"""A run folder in, what its arms left behind out; and the one writer of `eval.json`.

Reading is lenient: whatever exists is taken, what is missing or broken becomes a marked arm and
never an arm that is not there.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from data_prep.errors import UserError
from data_prep.files import atomic_write

State = Literal["done", "failed", "cancelled", "running", "unfinished", "missing"]
STATES: tuple[State, ...] = ("done", "failed", "cancelled", "running", "unfinished", "missing")
_SEED_FOLDER = re.compile(r"^(?P<arm>.+)-seed(?P<seed>\d+)$")
_PACKAGES = ("torch", "torchvision", "open_clip_torch", "deepspeed", "numpy", "pillow")


@dataclass
class ArmResult:
    """What one arm (with one seed) of a run left behind.

    Attributes:
        arm: its name; several seeds share it.
        seed: the seed, None where nothing says it.
        folder: `arms/ARM` or `arms/ARM-seedN`; it may not exist.
        state: whether there is a result, and if not, how far the arm came.
        reason: why there is no result, for people.
        result: `eval.json`.
        before: `eval_before.json`, the inherited arm before fine-tuning.
        log: the records of `train.jsonl`.
        plan: `plan.json`, the inheritance report.
    """

    arm: str
    seed: int | None
    folder: Path
    state: State
    reason: str = ""
    result: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the result, empty where there is none."""
        return dict(self.result["metrics"]) if self.result else {}

    @property
    def metrics_before(self) -> dict[str, float]:
        """The metrics before fine-tuning, empty where they were not taken."""
        return dict(self.before["metrics"]) if self.before else {}

    @property
    def label(self) -> str:
        """Arm and seed, for people."""
        named = _SEED_FOLDER.match(self.folder.name)
        return f"{self.arm} (seed {self.seed})" if named else self.arm

    def queries(self) -> dict[str, np.ndarray]:
        """Return the ranks of all queries from `queries.npz`; empty where it was not written."""
        path = self.folder / "queries.npz"
        if not path.is_file():
            return {}
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


@dataclass
class RunResult:
    """A run folder.

    Attributes:
        path: the folder.
        config: the resolved configuration, empty where there is none.
        config_text: the same as written.
        info: `run.json` where there is one: command, started, seconds, hardware, ...
        arms: every arm configured or found, the teacher first, then in configured order.
    """

    path: Path
    config: dict[str, Any]
    config_text: str
    info: dict[str, Any]
    arms: list[ArmResult]

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("name") or self.path.resolve().name)

    @property
    def reference(self) -> str | None:
        """The arm that others are compared with: the one inherited from, else `teacher`."""
        names = [arm.arm for arm in self.arms]
        settings = self.config.get("arms")
        for own in settings.values() if isinstance(settings, dict) else ():
            if isinstance(own, dict) and own.get("kind") == "inherited":
                named = own.get("teacher", "teacher")
                return str(named) if named in names else None
        # Arms gathered from several runs are called RUN.ARM.
        teachers = {name for name in names if name.rpartition(".")[2] == "teacher"}
        return teachers.pop() if len(teachers) == 1 else None


def write_result(
    path: str | Path,
    *,
    arm: str,
    checkpoint_sha256: str,
    metrics: Mapping[str, float],
    **provenance: Any,
) -> None:
    """Write an `eval.json` (or `eval_before.json`): what was measured, of what, and how.

    Args:
        path: the file; it appears whole or not at all.
        arm: name of the arm.
        checkpoint_sha256: hash of the weights that were measured.
        metrics: finite numbers; recalls and accuracies as fractions.
        provenance: JSON-able; `stage` ("final" or "before_training"), `seed`, `steps`, `data`,
            `conditions` and whatever else explains the numbers.

    Raises:
        ValueError: a metric is not a finite number.
    """
    broken = [name for name, value in metrics.items() if not np.isfinite(value)]
    if broken:
        raise ValueError(f"metrics that are not finite: {', '.join(broken)}")
    content = {
        "arm": arm,
        "stage": provenance.pop("stage", "final"),
        "seed": provenance.pop("seed", None),
        "steps": provenance.pop("steps", None),
        "checkpoint_sha256": checkpoint_sha256,
        "metrics": {name: float(value) for name, value in metrics.items()},
        **provenance,
        "environment": environment(),
    }
    atomic_write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def environment() -> dict[str, str]:
    """Return the versions and the time of a measurement."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {"time": datetime.now(UTC).isoformat(timespec="seconds")}


def read_run(path: str | Path) -> RunResult:
    """Read a run folder.

    Raises:
        UserError: there is no such folder, or it holds neither a config nor an arm.
    """
    path = Path(path)
    config_file = path / "config.yaml"
    text = config_file.read_text(encoding="utf-8") if config_file.is_file() else ""
    folders = sorted(path.glob("arms/*/")) if path.is_dir() else []
    if not text and not folders:
        raise UserError(
            "not a run: there is neither config.yaml nor arms/",
            where=str(path),
            todo="give the folder that `inherclip run` or `inherclip submit` wrote",
        )
    config = _mapping(text, config_file)
    arms = [_read_arm(folder, config) for folder in folders]
    found = {arm.arm for arm in arms}
    listed = config.get("arms")
    names = list(listed) if isinstance(listed, (dict, list)) else []
    arms += [
        ArmResult(str(name), config.get("seed"), path / "arms" / str(name), "missing", "not run")
        for name in names
        if name not in found
    ]
    order = {str(name): position for position, name in enumerate(names)}

    def position(arm: ArmResult) -> tuple[bool, int, str, int]:
        return (arm.arm != "teacher", order.get(arm.arm, len(order)), arm.arm, arm.seed or 0)

    info = _read_json(path / "run.json")
    return RunResult(path, config, text, info or {}, sorted(arms, key=position))


def _mapping(text: str, where: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        raise UserError(f"the configuration is not YAML ({error})", where=str(where)) from error
    return content if isinstance(content, dict) else {}


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None where there is no file or no object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _read_arm(folder: Path, config: dict[str, Any]) -> ArmResult:
    named = _SEED_FOLDER.match(folder.name)
    configured = config.get("arms")
    # An arm may itself be called `x-seed1`: the configuration decides.
    name, seed = folder.name, config.get("seed")
    if named and not (isinstance(configured, dict) and folder.name in configured):
        name, seed = named["arm"], int(named["seed"])
    arm = ArmResult(name, seed if isinstance(seed, int) else None, folder, "missing", "not run")
    arm.log = _read_log(folder / "train.jsonl")
    arm.plan = _read_json(folder / "plan.json")
    arm.before = _valid(_read_json(folder / "eval_before.json"))
    arm.result = _valid(_read_json(folder / "eval.json"))
    measured = (arm.result or {}).get("seed")
    if isinstance(measured, int):
        arm.seed = measured
    arm.state, arm.reason = _state(arm)
    return arm


def _valid(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a result if it has numbers for metrics, else None."""
    metrics = result.get("metrics") if result else None
    if not isinstance(metrics, dict):
        return None
    good = all(isinstance(value, (int, float)) for value in metrics.values())
    return result if good else None


def _state(arm: ArmResult) -> tuple[State, str]:
    """Return how far an arm came. `status.json` of the scheduler counts where no result is."""
    status = _read_json(arm.folder / "status.json") or {}
    said = status.get("state")
    if said in ("failed", "cancelled", "running"):
        return said, str(status.get("reason") or status.get("error") or "")
    if arm.result:
        return "done", ""
    if (arm.folder / "eval.json").is_file():
        return "failed", "eval.json cannot be read"
    if arm.log:
        return "unfinished", f"last logged step {arm.log[-1].get('step', '?')}"
    return "missing", "nothing logged"


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a train.jsonl; a line that is not JSON (cut off) is left out."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
