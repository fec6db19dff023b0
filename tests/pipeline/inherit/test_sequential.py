"""Sequential inheritance: what the fit is told about ReLUs, dense layers, sums and sample size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.inherit import inherit
from pipeline.inherit.regression import Settings


class Block(nn.Module):
    """A residual block behind a stem, with a classifier."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean(dim=(2, 3)))


def smooth(count: int, seed: int) -> Tensor:
    """Images with neighbours that resemble each other, so that layers can be cut at all."""
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(count, 3, 4, 4, generator=generator), 12, mode="bilinear")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Block()
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):  # half of the units are off, as in trained networks
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, -0.2, 0.5)
            norm.momentum = None
        model.train()(smooth(64, 1))
    return model.eval()


@torch.no_grad()
def miss(
    model: nn.Module,
    include: tuple[str, ...],
    look: str = "forward",
    budget: Any = "weights=0.4",
    **refit: Any,
) -> float:
    """Return the relative error on fresh images when the included layers are cut."""
    new, plan = inherit(
        model, budget, smooth(192, 2), 1, "sequential", include=include, refit=refit
    )
    assert plan.notes["audit"] < 1e-5
    x = smooth(64, 3)
    want = getattr(model, look)(x)
    return float((getattr(new, look)(x) - want).square().sum() / want.square().sum())


def test_a_fit_that_knows_of_the_relu_errs_less_behind_it(model: nn.Module) -> None:
    for include in (("conv1",), ("conv2",), ("conv1", "conv2")):
        plain = miss(model, include, "features", steps=0, dense=False)
        aware = miss(model, include, "features", steps=4, dense=False)
        assert aware < 0.97 * plain, include


def test_layers_that_stay_dense_repair_those_before_them(model: nn.Module) -> None:
    kept = miss(model, ("conv1", "conv2"), dense=False)
    fitted = miss(model, ("conv1", "conv2"), dense=True)
    assert fitted < 0.95 * kept


def test_the_branch_makes_up_for_what_the_shortcut_carries(model: nn.Module) -> None:
    budget = {"stem": "rank=0.4", "conv2": "rank=1.0"}  # the shortcut errs, the branch has room
    options: dict[str, Any] = {"look": "features", "budget": budget, "dense": False}
    alone = miss(model, ("stem", "conv2"), compensate=False, **options)
    both = miss(model, ("stem", "conv2"), compensate=True, **options)
    assert both < 0.99 * alone


def test_the_pass_leaves_no_trace(model: nn.Module) -> None:
    # conv1 stays dense in the second case; its input is the other operand of conv2's sum
    for include in (("conv*",), ("conv2",)):
        new, _ = inherit(model, "weights=0.4", smooth(64, 2), 1, "sequential", include=include)
        for module in [*model.modules(), *new.modules()]:
            assert "forward" not in vars(module)
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_the_ridge_falls_with_the_samples() -> None:
    assert Settings().ridge_for(64) == Settings().ridge_for(256) == 0.02
    assert Settings().ridge_for(1024) == pytest.approx(0.005)
    assert Settings(ridge=0.1).ridge_for(1024) == 0.1
