"""Which losses exist and how they are asked for; imports no torch.

An objective is written as a preset (`objective: clip_kd`), as loss names with weights (`objective:
{task: 1, crd: 1, fd: 2000}`), or as both (`{preset: clip_kd, fd: 500}`). A loss with options of
its own takes a mapping: `kd: {weight: 1, alpha: 0.7, tau: 4}`. Weight 0 switches a loss off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from pipeline.objectives.contrastive import Loss


class Term(BaseModel):
    """A loss with a weight; a bare number stands for the weight."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    weight: float = Field(default=1.0, ge=0, description="factor of this loss; 0 switches it off")

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        if isinstance(value, Mapping | Term):
            return value
        if isinstance(value, str) and _is_number(value):
            raise PydanticCustomError(
                "number_as_text",
                "'{text}' is text; YAML reads 1e8 as text, write 1.0e+8",
                {"text": value},
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PydanticCustomError(
                "weight_or_options", "give a weight, as in `1`, or options, as in `{weight: 1}`"
            )
        return {"weight": value}


class ScaledTerm(Term):
    """A loss that learns a logit scale of its own."""

    scale: float = Field(default=1 / 0.07, gt=0, le=100, description="logit scale at the start")


class MaskedTerm(Term):
    """A loss on a student image of which patches are hidden."""

    ratio: float = Field(default=0.75, gt=0, lt=1, description="share of the patches hidden")
    patch: int = Field(default=16, ge=1, description="edge of a patch in pixels")


class LayersTerm(Term):
    """A loss on the outputs of modules inside."""

    modules: tuple[str, ...] = Field(
        ..., min_length=1, description="globs on module names that student and teacher share"
    )

    @field_validator("modules", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class MixTerm(Term):
    """The classic distillation mix."""

    alpha: float = Field(default=0.5, gt=0, le=1, description="share of the teacher's term")
    tau: float = Field(default=2.0, gt=0, description="temperature of both distributions")


def _loss(
    home: str, what: str, *, teacher: bool = True, view: str | None = None, inside: bool = False
) -> Any:
    extra: dict[str, Any] = {"home": home, "teacher": teacher, "view": view, "inside": inside}
    return Field(default=None, description=what, json_schema_extra=extra)


PRESETS: dict[str, dict[str, Any]] = {
    "task": {"task": 1.0},
    "clip_kd": {"task": 1.0, "crd": 1.0, "icl": 1.0, "fd": 2000.0},
    "distill": {"task": 1.0, "logit_kl": 1.0},
    "kd": {"kd": {"weight": 1.0, "alpha": 0.5, "tau": 2.0}},
}


class ObjectiveConfig(BaseModel):
    """The losses of one arm. Each field is a registry line: where the class is, what it does."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    task: Term | None = _loss("contrastive:Task", "InfoNCE on the student", teacher=False)
    crd: Term | None = _loss("distill:Crd", "KL from the teacher's to the student's similarities")
    fd: Term | None = _loss("distill:Fd", "mean squared distance to the teacher's features")
    mfd: MaskedTerm | None = _loss(
        "distill:Mfd", "fd of a masked student image", view="masked_image"
    )
    gd: Term | None = _loss("distill:Gd", "mean squared distance of the InfoNCE gradients")
    icl: ScaledTerm | None = _loss("distill:Icl", "InfoNCE of student against teacher features")
    afd: ScaledTerm | None = _loss("distill:Afd", "InfoNCE on fused student and teacher features")
    logit_kl: Term | None = _loss(
        "distill:LogitKl", "soft cross-entropy, as open_clip's distill loss"
    )
    kd: MixTerm | None = _loss("distill:Kd", "(1-alpha) task + alpha tau^2 KL")
    layers: LayersTerm | None = _loss(
        "inner:Layers", "relative squared distance to the teacher's layers of the same name",
        inside=True,
    )  # fmt: skip
    balance: Term | None = _loss(
        "inner:Balance", "unevenness of the heads' mean gates", teacher=False, inside=True
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, Mapping) or "preset" not in value:
            return value
        name = value["preset"]
        if name not in PRESETS:
            raise PydanticCustomError(
                "unknown_preset",
                "no objective named '{name}'; there are {known}, or name losses with weights",
                {"name": str(name), "known": ", ".join(PRESETS)},
            )
        return PRESETS[name] | {key: term for key, term in value.items() if key != "preset"}

    @model_validator(mode="after")
    def _not_empty(self) -> ObjectiveConfig:
        if not self.terms:
            raise PydanticCustomError(
                "no_loss", "no loss has a weight above 0; give one of {known}", {"known": _known()}
            )
        return self

    @model_serializer
    def _written(self) -> dict[str, Any]:
        # A loss that was not asked for stays out of the resolved file
        fields = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: term.model_dump() for name, term in fields if term is not None}

    @property
    def terms(self) -> dict[str, Term]:
        """Losses that count (weight above 0), by name."""
        fields = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: term for name, term in fields if term is not None and term.weight > 0}

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss looks at a teacher."""
        return any(REGISTRY[name].needs_teacher for name in self.terms)

    @property
    def views(self) -> tuple[str, ...]:
        """Names of further student encodings that the losses want, e.g. `masked_image`."""
        return tuple(view for name in self.terms if (view := REGISTRY[name].view))


@dataclass(frozen=True)
class Entry:
    """What the registry knows of a loss without importing it.

    Attributes:
        home: `module:Class`.
        needs_teacher: Whether it looks at a teacher.
        view: A further student encoding that it wants.
        inside: Whether it looks inside the models, at rows that `train.taps` makes.
    """

    home: str
    needs_teacher: bool
    view: str | None
    inside: bool

    def load(self) -> type[Loss]:
        """Import the loss class."""
        module, name = self.home.split(":")
        loss: type[Loss] = getattr(import_module(f"pipeline.objectives.{module}"), name)
        return loss


def _registry() -> dict[str, Entry]:
    entries = {}
    for name, field in ObjectiveConfig.model_fields.items():
        extra: Any = field.json_schema_extra
        entries[name] = Entry(extra["home"], extra["teacher"], extra["view"], extra["inside"])
    return entries


def _known() -> str:
    return ", ".join(ObjectiveConfig.model_fields)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


REGISTRY: dict[str, Entry] = _registry()
