"""Which parameters learn, from which step on, how fast, and whether they decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from data_prep.errors import UserError
from pipeline.train.settings import TrainSettings

KINDS = ("inherited", "heads", "gates", "scales")


def kind_of(name: str, inherited: Iterable[str]) -> str | None:
    """Return the kind of a parameter, None for an ordinary one.

    Args:
        name: Full name in the trained module.
        inherited: Prefixes of inherited layers, each with its dot.

    Returns:
        `gates` of an inherited layer, its `heads` (up projections), `inherited` (its shared down
        projection), or `scales` (logit scales of the model and of the losses).
    """
    if name.endswith(("scale", "logit_bias")):
        return "scales"
    prefix = next((p for p in inherited if name.startswith(p)), None)
    if prefix is None:
        return None
    own = name.removeprefix(prefix)
    if own.startswith("gate."):
        return "gates"
    if own.startswith("up"):
        return "heads"
    return "inherited" if own.startswith("down.") else None


def inherited_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Return the name prefixes of all inherited layers of a module."""
    from pipeline.inherit.layers import InheritedConv2d, InheritedEmbedding, InheritedLinear

    kinds = (InheritedConv2d, InheritedEmbedding, InheritedLinear)
    return tuple(f"{name}." for name, m in module.named_modules() if isinstance(m, kinds))


def factor_of(name: str, kind: str | None, factors: Mapping[str, float]) -> float:
    """Return the factor of the learning rate of one parameter: the first entry that fits."""
    for wanted, factor in factors.items():
        # `inherited` means the whole layer unless its heads and gates are named before
        if wanted in KINDS:
            if wanted == kind or (wanted == "inherited" and kind in ("heads", "gates")):
                return factor
        elif _fits(name, wanted):
            return factor
    return 1.0


def _fits(name: str, glob: str) -> bool:
    """Whether a glob on the student's names fits a parameter of the trained module."""
    return fnmatchcase(name, glob) or fnmatchcase(name.removeprefix("student."), glob)


def parameter_groups(module: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Return AdamW groups: matrices decay; norms, biases, gates, scales and positions do not.

    Parameters that are frozen for a number of steps are in their group from the start, because
    optimizer and checkpoint must know them.

    Raises:
        UserError: a pattern of `freeze` or `lr_factors` fits nothing, or nothing is left to learn.
    """
    prefixes = inherited_prefixes(module)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    _refuse_idle(names, prefixes, settings)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if frozen_until(name, settings.freeze) == "always":
            parameter.requires_grad_(False)
            continue
        kind = kind_of(name, prefixes)
        plain = parameter.ndim < 2 or kind in ("gates", "scales") or "positional_emb" in name
        factor = factor_of(name, kind, settings.lr_factors)
        groups.setdefault((factor, plain), []).append(parameter)
    if not groups:
        raise UserError(
            "every parameter is frozen", where="train.freeze", todo="leave some to learn"
        )
    return [
        {
            "params": parameters,
            "lr": settings.lr * factor,
            "factor": factor,
            "weight_decay": 0.0 if plain else settings.weight_decay,
            "name": f"{'plain' if plain else 'decayed'} x {factor:g}",
        }
        for (factor, plain), parameters in sorted(groups.items(), key=lambda item: item[0][::-1])
    ]


def _refuse_idle(names: list[str], prefixes: tuple[str, ...], settings: TrainSettings) -> None:
    for glob in settings.freeze:
        if not any(_fits(name, glob) for name in names):
            raise UserError(
                f"no parameter is called {glob!r}",
                where="train.freeze",
                todo=f"names look like {names[0].removeprefix('student.')!r}",
            )
    kinds = {kind_of(name, prefixes) for name in names}
    for wanted in settings.lr_factors:
        # an arm without inherited layers may share a section that has factors for their kinds
        if wanted not in KINDS and not any(_fits(name, wanted) for name in names):
            raise UserError(
                f"no parameter is called {wanted!r}",
                where="train.lr_factors",
                todo=f"give a glob, or one of {', '.join(KINDS)} "
                f"(here: {', '.join(sorted(k for k in kinds if k)) or 'none of them'})",
            )


def frozen_until(name: str, freeze: Mapping[str, Any]) -> Any:
    """Return `always`, the step from which a parameter learns, or 0; the first glob counts."""
    return next((until for glob, until in freeze.items() if _fits(name, glob)), 0)


class Thaw:
    """Progressive unfreezing as a pure function of the step."""

    def __init__(self, module: nn.Module, freeze: Mapping[str, Any]) -> None:
        self.waiting = [
            (parameter, until)
            for name, parameter in module.named_parameters()
            if isinstance(until := frozen_until(name, freeze), int) and until > 0
        ]

    def __call__(self, step: int) -> None:
        """Set what learns in update `step` (0 is the first)."""
        for parameter, until in self.waiting:
            parameter.requires_grad_(step >= until)
            if step < until:
                parameter.grad = None
