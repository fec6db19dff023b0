"""Inheritance: a trained teacher becomes a smaller, low-rank, multi-head, gated descendant."""

from pipeline.inherit.plan import LayerPlan, Plan
from pipeline.inherit.surgery import inherit, rebuild

__all__ = ["LayerPlan", "Plan", "inherit", "rebuild"]
