"""What a model is trained on: a weighted sum of losses over the features of student and teacher.

In:  `Features` of the student (and of the teacher), this rank's rows only.
Out: a dictionary of weighted loss terms whose sum is the loss of the whole global batch.

`config.py` says which losses exist (the registry) and needs no torch, so that a configuration can
be checked anywhere; everything else is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.objectives.config import PRESETS, REGISTRY, ObjectiveConfig

if TYPE_CHECKING:
    from pipeline.objectives.features import Features, bounded_scale, gather, mask_patches
    from pipeline.objectives.objective import Objective, build

__all__ = [
    "PRESETS",
    "REGISTRY",
    "Features",
    "Objective",
    "ObjectiveConfig",
    "bounded_scale",
    "build",
    "gather",
    "mask_patches",
]

_HOMES = {
    "Features": "features",
    "bounded_scale": "features",
    "gather": "features",
    "mask_patches": "features",
    "Objective": "objective",
    "build": "objective",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
