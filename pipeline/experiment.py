"""An experiment: data, arms, training and evaluation, as one strict and documented schema.

`pipeline.graph` turns it into stages; `pipeline.runner` runs them here, `slurm` on a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from data_prep.errors import UserError
from data_prep.files import atomic_write
from data_prep.scenes import ScenesConfig
from eval.suite import Suite
from pipeline.config import Strict, apply_overrides, read_yaml, validate
from pipeline.inherit.factorize import Arm as Initialisation
from pipeline.inherit.groups import parse_groups
from pipeline.models import read_architecture, refuse_other_input
from pipeline.objectives import ObjectiveConfig
from pipeline.train.settings import TrainSettings, overlaid

ARM_KINDS = ("pretrained", "scratch", "inherited")


class PrepareSettings(Strict):
    """How the training shards are made where they are not there yet."""

    arguments: list[str] = Field(
        ..., min_length=1, description="what follows `inherclip prepare`, without --out and --slice"
    )
    slices: int = Field(1, ge=1, le=1000, description="parts that the jobs of an array make")

    @field_validator("arguments")
    @classmethod
    def _ours_to_say(cls, arguments: list[str]) -> list[str]:
        for option in ("--out", "--slice"):
            if any(a == option or a.startswith(f"{option}=") for a in arguments):
                raise ValueError(f"{option} is filled in from data.root and slices; leave it out")
        return arguments

    @model_validator(mode="after")
    def _can_be_sliced(self) -> PrepareSettings:
        sources = ("cc3m", "cc12m", "urls", "folder")
        if self.slices > 1 and self.arguments[0] not in sources:
            raise ValueError(f"only {', '.join(sources)} can be made in slices")
        return self


class DataSettings(Strict):
    """Where the training pairs come from."""

    scenes: ScenesConfig | None = Field(
        None, description="render the embedded data set instead of reading shards from `root`"
    )
    root: Path | None = Field(None, description="folder of the shards; also of evaluation sets")
    prepare: PrepareSettings | None = Field(None, description="make the shards in `root` first")
    train: str | list[str] = Field(..., description="training shards: names with {0..9} or globs")
    expected_samples: int | None = Field(
        None, ge=1, description="official number of pairs; a shortfall is named, never hidden"
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if self.scenes is None and self.root is None:
            raise ValueError("give root (a folder of shards) or scenes (the embedded data)")
        if self.prepare is not None and (self.root is None or self.scenes is not None):
            raise ValueError("prepare makes shards in root: give root, and no scenes")
        return self


class PretrainedArm(Strict):
    """A trained model from outside; it is measured, and other arms learn from it."""

    kind: Literal["pretrained"]
    weights: str = Field(..., description="ARCHITECTURE:TAG, ARCHITECTURE:FILE or a checkpoint")


class ScratchArm(Strict):
    """A model trained from random weights, with or without a teacher's help."""

    kind: Literal["scratch"]
    model: str | dict[str, Any] = Field(
        ..., description="open_clip name, JSON file beside this one, or the configuration itself"
    )
    objective: ObjectiveConfig = ObjectiveConfig.model_validate("task")
    teacher: str | None = Field(None, description="arm to distil from")
    train: TrainSettings


class InheritedArm(Strict):
    """A smaller descendant built from the teacher's own weights, then fine-tuned."""

    kind: Literal["inherited"]
    teacher: str = "teacher"
    budget: str | dict[str, str] = Field(
        "params=0.4",
        description="params=, weights=, macs=, latency= or fidelity= share; or globs on layer "
        "names, each with its own",
    )
    heads: Annotated[int, Field(ge=1, le=16)] | Literal["auto"] = Field(
        3, description="up projections per layer; auto chooses 1 or 3 for each"
    )
    init: Initialisation = "activation"
    options: dict[str, Any] = Field({}, description="further arguments of inherit()")
    calibration: int = Field(512, ge=0, description="training pairs seen before any training")
    objective: ObjectiveConfig = ObjectiveConfig.model_validate("task")
    train: TrainSettings

    @field_validator("budget")
    @classmethod
    def _budget(cls, budget: str | dict[str, str]) -> str | dict[str, str]:
        for text in [budget] if isinstance(budget, str) else budget.values():
            match = re.fullmatch(r"(params|weights|macs|latency|fidelity)=([0-9.eE+-]+)", text)
            try:
                share = float(match[2]) if match else None
            except ValueError:
                share = None
            if match is None or share is None:
                raise ValueError("a budget reads params=0.4 (or weights=, macs=, ...)")
            if not 0 < share <= 1:
                raise ValueError(f"the share must be above 0 and at most 1, not {share:g}")
        try:
            parse_groups(budget)
        except UserError as error:
            raise ValueError(f"{error.what}; {error.todo}") from error
        return budget


Arm = Annotated[PretrainedArm | ScratchArm | InheritedArm, Field(discriminator="kind")]


class Experiment(Strict):
    """One comparison: the arms see the same data, and are measured by the same suite."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int = Field(1, ge=1, description="training processes on this machine")
    data: DataSettings
    train: TrainSettings = Field(..., description="shared by all arms; an arm may override keys")
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], Arm] = Field(
        ..., min_length=1
    )
    eval: Suite

    @model_validator(mode="before")
    @classmethod
    def _share_train(cls, content: Any) -> Any:
        """Lay each arm's `train` over the experiment's."""
        if not isinstance(content, dict) or not isinstance(content.get("arms"), dict):
            return content
        shared = content.get("train")
        arms = {}
        for name, arm in content["arms"].items():
            if isinstance(arm, dict) and arm.get("kind") in ("scratch", "inherited"):
                own = arm.get("train") or {}
                if isinstance(own, dict) and isinstance(shared, dict):
                    arm = {**arm, "train": overlaid(shared, own)}
            arms[name] = arm
        return {**content, "arms": arms}

    @model_validator(mode="after")
    def _teachers_exist(self) -> Experiment:
        for name, arm in self.arms.items():
            teacher = getattr(arm, "teacher", None)
            objective = getattr(arm, "objective", None)
            if teacher is not None and teacher not in self.arms:
                raise ValueError(
                    f"arms.{name}.teacher: no arm {teacher!r}; there are {', '.join(self.arms)}"
                )
            if objective is not None and objective.needs_teacher and teacher is None:
                raise ValueError(
                    f"arms.{name}.teacher: the objective ({', '.join(objective.terms)}) needs one"
                )
        for name, arm in self.arms.items():
            train = getattr(arm, "train", None)
            if train is not None and train.validate_every and self.eval.quick is None:
                raise ValueError(
                    f"arms.{name}.train.validate_every: give eval.quick, a set to look at"
                )
        _refuse_circles({n: getattr(a, "teacher", None) for n, a in self.arms.items()})
        return self

    def dump(self) -> str:
        """Return the resolved configuration as YAML; it can be run itself."""
        content = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(content, sort_keys=False, width=100)


def _refuse_circles(teachers: dict[str, str | None]) -> None:
    for start in teachers:
        seen, current = [start], teachers[start]
        while current is not None:
            if current in seen:
                raise ValueError(
                    f"arms teach each other in a circle: {' -> '.join([*seen, current])}"
                )
            seen.append(current)
            current = teachers[current]


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, override, validate and resolve an experiment.

    Model files become the configurations they hold, and `data.root` becomes absolute, so that the
    resolved experiment means the same wherever it is run from.

    Raises:
        UserError: with every fault of the file and of the overrides.
    """
    path = Path(path)
    content = apply_overrides(read_yaml(path), overrides)
    for name, arm in content.get("arms", {}).items() if _is_map(content.get("arms")) else ():
        if _is_map(arm) and arm.get("kind") == "scratch" and isinstance(arm.get("model"), str):
            try:
                architecture = read_architecture(arm["model"], path.parent)
            except UserError as error:
                raise UserError(
                    error.what, where=f"{path}: arms.{name}.model", todo=error.todo
                ) from error
            content["arms"] = {**content["arms"], name: {**arm, "model": architecture}}
    experiment = validate(Experiment, content, str(path), tags=ARM_KINDS)
    _refuse_other_inputs(experiment, str(path))
    experiment = _with_absolute_json(experiment, path.parent)
    data = experiment.data
    if data.root is not None:
        data = data.model_copy(update={"root": data.root.expanduser().resolve()})
    return experiment.model_copy(update={"data": data})


def _refuse_other_inputs(experiment: Experiment, where: str) -> None:
    """Refuse a student that reads other input than its teacher, before either is trained."""
    for name, arm in experiment.arms.items():
        teacher = experiment.arms.get(str(getattr(arm, "teacher", None)))
        if not isinstance(arm, ScratchArm) or not isinstance(teacher, ScratchArm):
            continue  # a pretrained teacher's architecture is known when it is loaded
        if isinstance(arm.model, dict) and isinstance(teacher.model, dict):
            refuse_other_input(arm.model, teacher.model, f"{where}: arms.{name}")


def _with_absolute_json(experiment: Experiment, beside: Path) -> Experiment:
    """Find the DeepSpeed JSONs beside the configuration, as model files are."""
    arms = {}
    for name, arm in experiment.arms.items():
        train = getattr(arm, "train", None)
        if train is not None and train.deepspeed is not None:
            found = (beside / train.deepspeed.expanduser()).resolve()
            train = train.model_copy(update={"deepspeed": found})
            arm = arm.model_copy(update={"train": train})
        arms[name] = arm
    return experiment.model_copy(update={"arms": arms})


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


def write_resolved(experiment: Experiment, run: Path) -> None:
    """Write `config.yaml` into the run folder."""
    atomic_write(run / "config.yaml", experiment.dump())
