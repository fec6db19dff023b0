"""An experiment as a graph of stages, each with the hash of everything that shapes its result.

A stage is done when its marker carries its present hash and its outputs exist. A change in the
configuration, the code's stage versions, the data or an earlier stage changes the hash, and so
exactly what depends on the change is done again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import atomic_write
from data_prep.reader import ShardSet
from pipeline.experiment import Experiment, InheritedArm, PretrainedArm, ScratchArm

# Raise a number when the code of a stage changes its result: finished work of that stage is redone.
VERSIONS = {
    "prepare": 1,
    "data": 1,
    "obtain": 1,
    "inherit": 1,
    "train": 1,
    "evaluate": 1,
    "compare": 1,
}


@dataclass(frozen=True)
class Stage:
    """One unit of work that is done, or is not.

    Attributes:
        name: `VERB` or `VERB:ARM`, e.g. `train:student`.
        arm: The arm it belongs to, if any.
        after: Names of the stages whose results it reads.
        identity: What shapes its result, apart from earlier stages.
        outputs: Files that exist once it is done, relative to the run folder.
    """

    name: str
    arm: str | None
    after: tuple[str, ...]
    identity: dict[str, Any] = field(hash=False)
    outputs: tuple[str, ...]

    @property
    def verb(self) -> str:
        """The kind of stage: prepare, data, obtain, inherit, train, evaluate, compare."""
        return self.name.partition(":")[0]


class Graph:
    """The stages of an experiment in an order in which they can run."""

    def __init__(self, experiment: Experiment, run: Path) -> None:
        self.experiment, self.run = experiment, run
        self.stages = {stage.name: stage for stage in _stages(experiment)}
        self._fingerprints: dict[str, str] = {}

    @property
    def data_root(self) -> Path:
        """Folder of the shards: the configured one, or the run's own for rendered scenes."""
        return self.experiment.data.root or self.run / "data"

    def fingerprint(self, name: str) -> str:
        """Return the hash of everything that shapes a stage's result.

        Raises:
            UserError: the shards that it reads are missing.
        """
        if name not in self._fingerprints:
            stage = self.stages[name]
            content = {
                "version": VERSIONS[stage.verb],
                "identity": stage.identity,
                "after": [self.fingerprint(earlier) for earlier in stage.after],
            }
            if stage.verb == "data":
                content["shards"] = self._shards()
            if stage.verb == "evaluate":
                content["sets"] = self._sets()
            text = json.dumps(content, sort_keys=True, default=str)
            self._fingerprints[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._fingerprints[name]

    def _shards(self) -> str:
        """Hash of the training shards that lie there; scenes are a function of their config."""
        if self.experiment.data.scenes is not None:
            return "scenes"
        try:
            return ShardSet.find(self.data_root, self.experiment.data.train).fingerprint
        except UserError:
            if self.experiment.data.prepare is None:
                raise
            return "not prepared yet"

    def _sets(self) -> list[str]:
        """Hashes of the evaluation sets; rendered scenes follow from their configuration."""
        if self.experiment.data.scenes is not None:
            return ["scenes"]
        sets = self.experiment.eval.with_root(self.data_root).sets
        return [item.open().fingerprint for item in sets]

    def marker(self, name: str) -> Path:
        """Return the path of a stage's done-marker."""
        return self.run / "stages" / f"{name.replace(':', '-')}.json"

    def is_done(self, name: str) -> bool:
        """Whether the stage was finished with its present fingerprint and its outputs exist."""
        try:
            marker = json.loads(self.marker(name).read_text())
        except (OSError, json.JSONDecodeError):
            return False
        outputs = self.stages[name].outputs
        return marker.get("fingerprint") == self.fingerprint(name) and all(
            (self.run / output).exists() for output in outputs
        )

    def look_again(self) -> None:
        """Forget the fingerprints: a stage has changed the data."""
        self._fingerprints.clear()

    def mark_done(self, name: str, seconds: float) -> None:
        """Write a stage's done-marker; always the last thing that a stage does."""
        content = {
            "stage": name,
            "fingerprint": self.fingerprint(name),
            "seconds": round(seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        atomic_write(self.marker(name), json.dumps(content, indent=1) + "\n")

    def forget(self, name: str) -> None:
        """Remove a stage's done-marker before it runs again."""
        self.marker(name).unlink(missing_ok=True)

    def wanted(self, only: list[str] | None) -> list[Stage]:
        """Return the stages of the arms in `only` (all if None), with what these depend on."""
        if not only:
            return list(self.stages.values())
        keep: set[str] = set()

        def include(name: str) -> None:
            if name not in keep:
                keep.add(name)
                for earlier in self.stages[name].after:
                    include(earlier)

        for stage in self.stages.values():
            if stage.arm in only:
                include(stage.name)
        return [s for s in self.stages.values() if s.name in keep or s.name == "compare"]


def _stages(experiment: Experiment) -> Iterator[Stage]:
    # Shards count by their content, not by where they lie: a moved folder redoes nothing.
    data = experiment.data.model_dump(mode="json", exclude={"root", "prepare"})
    after: tuple[str, ...] = ()
    if experiment.data.prepare is not None:
        after = ("prepare",)
        arguments = experiment.data.prepare.arguments
        yield Stage("prepare", None, (), {"arguments": arguments}, ())
    yield Stage("data", None, after, {"data": data}, ())
    for name in _in_order(experiment):
        yield from _arm_stages(experiment, name)
    evaluations = tuple(f"evaluate:{name}" for name in experiment.arms)
    outputs = ("compare.csv", "compare.md", "report.html")
    yield Stage("compare", None, evaluations, {"name": experiment.name}, outputs)


def _in_order(experiment: Experiment) -> list[str]:
    """Return the arms with every teacher before its students."""
    order: list[str] = []

    def place(name: str) -> None:
        teacher = getattr(experiment.arms[name], "teacher", None)
        if teacher is not None and teacher not in order:
            place(teacher)
        if name not in order:
            order.append(name)

    for name in experiment.arms:
        place(name)
    return order


def _arm_stages(experiment: Experiment, name: str) -> Iterator[Stage]:
    arm = experiment.arms[name]
    checkpoint = (f"arms/{name}/checkpoint/model.json", f"arms/{name}/checkpoint/model.safetensors")
    seed = {"seed": experiment.seed}
    last = f"train:{name}"
    if isinstance(arm, PretrainedArm):
        last = f"obtain:{name}"
        yield Stage(last, name, (), {"weights": arm.weights}, checkpoint)
    elif isinstance(arm, ScratchArm):
        after = ("data", *((_source(experiment, arm.teacher),) if arm.teacher else ()))
        what = arm.model_dump(mode="json", include={"model", "objective", "train"})
        yield Stage(last, name, after, seed | _shaping(what), checkpoint)
    elif isinstance(arm, InheritedArm):
        teacher = _source(experiment, arm.teacher)
        inherit = f"inherit:{name}"
        keys = {"budget", "heads", "init", "options", "calibration"}
        what = arm.model_dump(mode="json", include=keys)
        folder = f"arms/{name}/inherited"
        yield Stage(
            inherit,
            name,
            ("data", teacher),
            seed | what,
            (f"{folder}/model.json", f"{folder}/model.safetensors", f"arms/{name}/plan.json"),
        )
        training = _shaping(arm.model_dump(mode="json", include={"objective", "train"}))
        yield Stage(last, name, ("data", inherit, teacher), seed | training, checkpoint)
    where = {"sets": {"__all__": {"root"}}, "workers": True, "quick": True}
    suite = experiment.eval.model_dump(mode="json", exclude=where)  # type: ignore[arg-type]
    before = isinstance(arm, InheritedArm)
    outputs = (f"arms/{name}/eval.json", *((f"arms/{name}/eval_before.json",) if before else ()))
    yield Stage(f"evaluate:{name}", name, ("data", last), {"suite": suite}, outputs)


def _source(experiment: Experiment, arm: str) -> str:
    """Return the stage that makes an arm's checkpoint."""
    verb = "obtain" if isinstance(experiment.arms[arm], PretrainedArm) else "train"
    return f"{verb}:{arm}"


def _shaping(what: dict[str, Any]) -> dict[str, Any]:
    """Leave out settings that say how a training is run, not what comes out of it."""
    running = {
        "workers", "cache_decoded", "log_every", "save_every", "save_every_minutes", "keep",
        "timeout_minutes", "silence_seconds", "max_corrupt_share", "validate_every", "trackers",
        "zero_stage",
    }  # fmt: skip
    if what["train"]["select"] == "best":
        running.remove("validate_every")
    train = {k: v for k, v in what["train"].items() if k not in running}
    return {**what, "train": train}
