"""A running average of the weights, weighted by samples and not by steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average in which a step's share halves after `half_life` samples.

    The step's decay is d = 2^(-batch / half_life), so the same half-life means the same average at
    any batch size. The average is normalised by the weights it has given so far, so that the random
    start has no part in it: after step t the newest weights count (1 - d) / (1 - d^t).

    Args:
        model: The trained model; its parameters and BatchNorm statistics are followed.
        half_life: In samples.
        batch_size: Global batch.
    """

    def __init__(self, model: nn.Module, half_life: int, batch_size: int) -> None:
        self.decay = 2.0 ** (-batch_size / half_life)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs = _pairs(self.model, model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update `step` (1 is the first)."""
        share = (1 - self.decay) / (1 - self.decay**step)
        floating = [pair for pair in self._pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], share)
        for average, now in self._pairs:
            if not average.is_floating_point():
                average.copy_(now)

    def state(self) -> dict[str, Any]:
        """Return copies of the average's tensors on the CPU."""
        return {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}

    def load(self, state: dict[str, Any]) -> None:
        """Put an average back."""
        self.model.load_state_dict(state)

    @torch.no_grad()
    def give(self) -> None:
        """Write the average into the followed model."""
        for average, now in self._pairs:
            now.copy_(average)


def _pairs(average: nn.Module, model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ours = {**dict(average.named_parameters()), **dict(average.named_buffers())}
    theirs = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [(ours[name], theirs[name]) for name in ours]
