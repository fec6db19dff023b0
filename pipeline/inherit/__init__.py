"""Inheritance: a trained teacher becomes a smaller, low-rank, multi-head, gated descendant.

The names below are imported on first use, so that the command line can read the arguments of
`inherclip inherit` without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.inherit.plan import LayerPlan, Plan
    from pipeline.inherit.surgery import inherit, rebuild

__all__ = ["LayerPlan", "Plan", "inherit", "rebuild"]

_HOMES = {"LayerPlan": "plan", "Plan": "plan", "inherit": "surgery", "rebuild": "surgery"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
