"""Budgets as properties: never above, hardly below, monotone; factorisation is optimal."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.inherit import inherit
from pipeline.inherit.budget import SOLVERS, make_offer, solve_convex, total
from pipeline.inherit.factorize import Moments, decompose, factors, head_deviations

layer = st.tuples(st.integers(4, 80), st.integers(4, 80), st.floats(0.5, 3.0))


def offers_of(layers: list[tuple[int, int, float]], heads: int) -> list:
    made = []
    for i, (width_in, width_out, decay) in enumerate(layers):
        full = min(width_in, width_out)
        energies = torch.arange(1, full + 1, dtype=torch.float64) ** -decay
        tail = [*energies.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        made.append(
            make_offer(
                f"layer{i}", full, lambda r, a=width_in, b=width_out: r * (a + heads * b),
                width_in * width_out, tail, heads=heads,
            )
        )  # fmt: skip
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(layer, min_size=1, max_size=12), st.integers(1, 3), st.floats(0.0, 1.0))
@pytest.mark.parametrize("solver", ["fraction", "energy"])
def test_budgets_hold(
    solver: str, layers: list[tuple[int, int, float]], heads: int, share: float
) -> None:
    offers = offers_of(layers, heads)
    dense = sum(a * b for a, b, _ in layers)
    least = sum(min(o.cost for o in offer.options) for offer in offers)
    budget = share * dense
    if budget < least:
        with pytest.raises(UserError, match="rank 1 everywhere"):
            SOLVERS[solver](offers, budget)
        return
    choice = SOLVERS[solver](offers, budget)
    assert set(choice) == {offer.name for offer in offers}
    assert total(choice) <= budget + 1e-9
    # nothing that is left over would have bought another step of any layer
    for offer in offers:
        position = offer.options.index(choice[offer.name])
        for option in offer.options[position + 1 :]:
            assert total(choice) - choice[offer.name].cost + option.cost > budget - 1e-9


@settings(max_examples=30, deadline=None)
@given(st.lists(layer, min_size=2, max_size=5), st.floats(0.2, 0.9))
def test_the_convex_solver_loses_no_more_than_one_fraction(
    layers: list[tuple[int, int, float]], share: float
) -> None:
    offers = offers_of(layers, 1)
    budget = share * sum(a * b for a, b, _ in layers)
    if budget < sum(min(o.cost for o in offer.options) for offer in offers):
        return
    convex = sum(o.loss for o in solve_convex(offers, budget).values())
    even = sum(o.loss for o in SOLVERS["fraction"](offers, budget).values())
    # greedy on hulls is optimal up to the last step that did not fit
    steps = max(
        a.loss - b.loss for o in offers for a, b in zip(o.options, o.options[1:], strict=False)
    )
    assert convex <= even + steps + 1e-9


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 10**6))
def test_the_cut_is_the_best_of_its_rank(width_out: int, width_in: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, x = random(1, width_out, width_in), random(200, width_in) @ random(width_in, width_in)
    metric = (x.mT @ x / 200)[None]
    moments = Moments(metric, None, metric.diagonal(dim1=1, dim2=2).sum(1), 200.0)
    parts = decompose(weight, moments, 1e-9)
    for rank in range(1, min(width_in, width_out) + 1):
        up, down = factors(weight, parts, rank)
        cut = up @ down
        error = float((x @ (weight - cut)[0].mT).square().sum(dim=1).mean())
        best = float(parts.energies[0, rank:].sum())
        assert error == pytest.approx(best, rel=1e-4, abs=1e-6 * float(parts.energies.sum()))
    torch.testing.assert_close(cut, weight, rtol=1e-5, atol=1e-5)


def test_head_deviations_cancel() -> None:
    up = torch.randn(6, 4, dtype=torch.float64)
    deviations = head_deviations(up, 3, 0.1, torch.Generator().manual_seed(0))
    assert float(deviations.sum(dim=0).abs().max()) < 1e-12
    assert float(deviations.square().mean().sqrt()) == pytest.approx(
        0.1 * float(up.square().mean().sqrt())
    )


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["linear", "conv", "grouped", "embedding"]),
    st.integers(3, 10),
    st.integers(3, 10),
    st.floats(0.2, 1.0),
    st.sampled_from([1, 3]),
    st.sampled_from(["svd", "activation", "sequential"]),
)
def test_a_layer_is_its_rank_r_map_at_step_0(
    kind: str, width_in: int, width_out: int, share: float, heads: int, arm: str
) -> None:
    """Calibration inputs are white here, so that all three arms mean the plain truncated SVD."""
    torch.manual_seed(width_in * 100 + width_out)
    x: torch.Tensor
    if kind == "embedding":
        dense, x = torch.nn.Embedding(20, width_out), torch.arange(20)[None]
    elif kind == "linear":
        dense = torch.nn.Linear(width_in, width_out)
        x = torch.cat([torch.eye(width_in), -torch.eye(width_in)])
    else:
        groups = 2 if kind == "grouped" else 1
        dense = torch.nn.Conv2d(groups * width_in, groups * width_out, 1, groups=groups)
        eye = torch.eye(groups * width_in)
        x = torch.cat([eye, -eye])[:, :, None, None]
    model = torch.nn.Sequential(dense)
    refit = {"ridge": 1e-9, "compensate": False}
    new, plan = inherit(model, f"rank={share}", x, heads, arm, shrinkage=1e-9, refit=refit)
    rank = plan.layers[0].rank
    weight = dense.weight.detach().double().flatten(1)
    parts = weight.unflatten(0, (getattr(dense, "groups", 1), -1))
    left, sigma, right = torch.linalg.svd(parts, full_matrices=False)
    cut = (left[..., :rank] * sigma[:, None, :rank]) @ right[:, :rank]
    twin = copy.deepcopy(dense)
    twin.weight.data = cut.float().reshape(dense.weight.shape)
    want = twin(x)
    assert float(((new(x) - want).norm() / want.norm()).detach()) < 1e-5
