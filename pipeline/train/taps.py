"""Taps: what the student's inside hands to the objective besides the two embeddings.

Two losses look inside: `layers` compares the outputs of named modules with the teacher's modules of
the same name, `balance` wants the heads of inherited layers used evenly. Both are prepared here as
one row per sample, so that they pass through gathering and cached features like any feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.inherit.valid import valid_tokens


class Taps:
    """Hooks on a model that note outputs while they are open.

    Args:
        model: A CLIP.
        layers: Names of modules whose outputs are noted.
        gates: Whether gates of inherited layers are noted.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] = (), gates: bool = False) -> None:
        self.model, self.layers = model, tuple(layers)
        self.open = False
        self.outputs: dict[str, Tensor] = {}
        self.gates: dict[str, Tensor] = {}
        for name in layers:
            model.get_submodule(name).register_forward_hook(self._note(self.outputs, name))
        for name, module in model.named_modules() if gates else ():
            if isinstance(getattr(module, "gate", None), nn.Linear) and hasattr(module, "up"):
                module.gate.register_forward_hook(self._note(self.gates, name))

    def _note(self, kept: dict[str, Tensor], name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if self.open:
                kept[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def __enter__(self) -> Taps:
        self.open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False

    def clear(self) -> None:
        """Let go of the noted tensors."""
        self.outputs.clear()
        self.gates.clear()

    def rows(self, tokens: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the losses read, and let go of the noted tensors.

        Args:
            tokens: [b, L], which tells padding apart.
            targets: The teacher's outputs of `layers`, [b, ...] each.

        Returns:
            `layers` [b, n]: squared distance to the teacher's output as a share of that output's
            square; `gates` [b, sum of H]: how far each head's mean gate is from 1/H, scaled so
            that the squared norm of the mean row is the mean squared coefficient of variation.

        Raises:
            UserError: an output has another shape than the teacher's.
        """
        valid = valid_tokens(self.model, tokens)
        rows: dict[str, Tensor] = {}
        if self.layers:
            errors = [
                _distance(n, self.outputs[n], targets[n], _mask(n, valid)) for n in self.layers
            ]
            rows["layers"] = torch.stack(errors, dim=1)
        if self.gates:
            parts = [_imbalance(logits, _mask(n, valid)) for n, logits in self.gates.items()]
            rows["gates"] = torch.cat(parts, dim=1) / math.sqrt(len(parts))
        self.clear()
        return rows


def _mask(name: str, valid: Tensor) -> Tensor | None:
    """Return the valid positions [b, L] of a module of the text tower, None in the visual one."""
    return None if name.startswith("visual.") else valid


def _distance(name: str, ours: Tensor, theirs: Tensor, valid: Tensor | None) -> Tensor:
    """Return |ours - theirs|² / |theirs|² per sample, [b]."""
    if ours.shape != theirs.shape:
        raise UserError(
            f"layer {name}: the student's output is {list(ours.shape)}, "
            f"the teacher's {list(theirs.shape)}",
            where="objective.layers",
            todo="name layers of equal width, such as an inherited student has",
        )
    ours, theirs = ours.float(), theirs.float()
    if valid is not None and ours.ndim == 3 and ours.shape[:2] == valid.shape:
        ours, theirs = ours * valid[:, :, None], theirs * valid[:, :, None]
    power = theirs.square().flatten(1).sum(dim=1).clamp_min(1e-12)
    return (ours - theirs).square().flatten(1).sum(dim=1) / power


def _imbalance(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Return sqrt(H) (p - 1/H) of each sample's mean gate p, [b, H]."""
    gates = logits.float().softmax(dim=-1)
    if gates.ndim == 3:
        if valid is not None and gates.shape[:2] == valid.shape:
            weight = valid.float() / valid.sum(dim=1, keepdim=True)
            gates = (gates * weight[:, :, None]).sum(dim=1)
        else:
            gates = gates.mean(dim=1)
    heads = gates.shape[-1]
    return (gates - 1 / heads) * math.sqrt(heads)


def shared_layers(student: nn.Module, teacher: nn.Module, globs: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that a list of globs names in both models.

    Raises:
        UserError: a glob names none.
    """
    theirs = {name for name, _ in teacher.named_modules() if name}
    both = [name for name, _ in student.named_modules() if name in theirs]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in both):
            raise UserError(
                f"student and teacher have no module {glob!r} in common",
                where="objective.layers.modules",
                todo="name modules as in visual.layer3 or transformer.resblocks.5",
            )
    return tuple(name for name in both if any(fnmatchcase(name, glob) for glob in globs))
