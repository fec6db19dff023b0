"""A budget -> a rank for every layer. Pure functions of numbers; no tensors, no modules.

A layer offers options (rank, cost, loss), the last of which is the dense layer. An allocator picks
one option per layer so that the summed cost stays within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from data_prep.errors import UserError

SLACK = 0.01  # an achieved budget may lie at most this share of the teacher below the asked one


@dataclass(frozen=True)
class Option:
    """One way to build a layer; `rank=None` is the dense layer."""

    rank: int | None
    heads: int
    cost: float
    loss: float


@dataclass(frozen=True)
class Offer:
    """All options of one layer, by rising cost and falling loss; the dense one is last."""

    name: str
    full_rank: int
    options: tuple[Option, ...]


def make_offer(
    name: str,
    full_rank: int,
    cost: Callable[[int], float],
    dense_cost: float,
    losses: Sequence[float],
    *,
    heads: int = 1,
    multiple: int = 1,
    force: bool = False,
) -> Offer:
    """List the options of one layer.

    Args:
        name: the layer.
        full_rank: its largest rank.
        cost: cost of the inherited layer at a rank.
        dense_cost: cost of the dense layer.
        losses: loss at rank 0, 1, ..., full_rank (non-increasing).
        heads: heads of the inherited layer.
        multiple: ranks are multiples of this (rank < multiple and the full rank are still offered).
        force: keep factored options that cost as much as the dense layer, and do not offer the
            dense one.
    """
    ranks = [r for r in range(1, full_rank + 1) if r % multiple == 0 or r == full_rank]
    if multiple > 1 and full_rank > multiple:
        ranks = sorted(
            {1, *(2**k for k in range(1, multiple.bit_length()) if 2**k < multiple), *ranks}
        )
    options = [
        Option(rank, heads, cost(rank), losses[rank])
        for rank in ranks
        if force or cost(rank) < dense_cost
    ]
    if not force:
        options.append(Option(None, 0, dense_cost, 0.0))
    return Offer(name, full_rank, tuple(options))


Choice = dict[str, Option]


def total(choice: Mapping[str, Option]) -> float:
    """Return the summed cost of a choice."""
    return sum(option.cost for option in choice.values())


def check_budget(offers: Sequence[Offer], budget: float, what: str = "budget") -> None:
    """Refuse a budget that even the cheapest options exceed.

    Raises:
        UserError: naming the least that can be reached.
    """
    least = sum(min(option.cost for option in offer.options) for offer in offers)
    if budget < least:
        raise UserError(
            f"the budget leaves {budget:,.0f} for the inherited layers, but rank 1 everywhere "
            f"needs {least:,.0f}",
            where=what,
            todo="raise the budget, include more layers, or use fewer heads",
        )


def _at_fraction(offer: Offer, fraction: float) -> Option:
    """Return the dearest option of at most `fraction` of full rank, else the cheapest."""
    dense = offer.options[-1] if offer.options[-1].rank is None else None
    ranked = [option for option in offer.options if option.rank is not None]
    if not ranked:
        assert dense is not None
        return dense
    limit = fraction * offer.full_rank
    # where the fraction asks for more than factoring can save, the layer is dense
    beyond = ranked[-1].rank is not None and limit >= ranked[-1].rank + 1
    if dense is not None and beyond:
        return dense
    below = [option for option in ranked if option.rank is not None and option.rank <= limit]
    return below[-1] if below else ranked[0]


def fraction_choice(offers: Sequence[Offer], fraction: float) -> Choice:
    """Give every layer the same fraction of its full rank."""
    return {offer.name: _at_fraction(offer, fraction) for offer in offers}


def solve_fraction(offers: Sequence[Offer], budget: float) -> Choice:
    """Find the largest common rank fraction within the budget, then spend what rounding left.

    Raises:
        UserError: even rank 1 exceeds the budget.
    """
    check_budget(offers, budget)
    low, high = 0.0, 1.0
    if total(fraction_choice(offers, 1.0)) <= budget:
        return fraction_choice(offers, 1.0)
    for _ in range(50):
        middle = (low + high) / 2
        if total(fraction_choice(offers, middle)) <= budget:
            low = middle
        else:
            high = middle
    choice = fraction_choice(offers, low)

    def urgency(offer: Offer, option: Option) -> float:
        rank = offer.full_rank if option.rank is None else option.rank
        return -rank / offer.full_rank

    return _fill(offers, choice, budget, urgency)


def _fill(
    offers: Sequence[Offer],
    choice: Choice,
    budget: float,
    urgency: Callable[[Offer, Option], float],
) -> Choice:
    """Spend the rest in small steps: always the most urgent layer whose next option still fits."""
    choice = dict(choice)
    left = budget - total(choice)
    index = {offer.name: offer.options.index(choice[offer.name]) for offer in offers}
    open_offers = list(offers)
    while open_offers:
        offer = max(open_offers, key=lambda o: urgency(o, choice[o.name]))
        following = next(
            (
                i
                for i in range(index[offer.name] + 1, len(offer.options))
                if offer.options[i].cost - choice[offer.name].cost <= left
            ),
            None,
        )
        if following is None:
            open_offers.remove(offer)
            continue
        left -= offer.options[following].cost - choice[offer.name].cost
        index[offer.name], choice[offer.name] = following, offer.options[following]
    return choice


def hull(offer: Offer) -> list[Option]:
    """Return the options on the lower convex hull of (cost, loss), by rising cost.

    Between two of them every option saves less per unit of cost, so that a greedy walk along the
    hulls of all layers is what one Lagrange multiplier would choose.
    """
    options = sorted(offer.options, key=lambda option: (option.cost, option.loss))
    kept: list[Option] = []
    for option in options:
        if kept and option.loss >= kept[-1].loss:
            continue
        while len(kept) >= 2 and _slope(kept[-1], option) >= _slope(kept[-2], kept[-1]):
            kept.pop()
        if kept and option.cost == kept[-1].cost:
            kept.pop()
        kept.append(option)
    return kept


def _slope(a: Option, b: Option) -> float:
    """Loss saved per unit of cost from `a` to `b`."""
    return (a.loss - b.loss) / (b.cost - a.cost) if b.cost > a.cost else math.inf


def solve_convex(offers: Sequence[Offer], budget: float) -> Choice:
    """Minimise the summed loss within the budget: greedy along convex hulls, then fill the rest.

    Raises:
        UserError: even rank 1 exceeds the budget.
    """
    check_budget(offers, budget)
    cheapest = {offer.name: min(offer.options, key=lambda o: o.cost) for offer in offers}
    choice = dict(cheapest)
    left = budget - total(choice)
    steps: list[tuple[float, str, Option, Option]] = []
    for offer in offers:
        path = hull(offer)
        path = [option for option in path if option.cost >= cheapest[offer.name].cost]
        if path[0] != cheapest[offer.name]:
            path.insert(0, cheapest[offer.name])
        steps.extend((_slope(a, b), offer.name, a, b) for a, b in pairwise(path))
    steps.sort(key=lambda step: -step[0])
    stuck: set[str] = set()
    for _, name, before, after in steps:
        if name in stuck:
            continue
        extra = after.cost - before.cost
        if extra > left:
            stuck.add(name)  # the fill below looks for a smaller step of this layer
            continue
        left -= extra
        choice[name] = after

    def urgency(offer: Offer, option: Option) -> float:
        i = offer.options.index(option)
        return _slope(option, offer.options[i + 1]) if i + 1 < len(offer.options) else -math.inf

    return _fill(offers, choice, budget, urgency)


SOLVERS: dict[str, Callable[[Sequence[Offer], float], Choice]] = {
    "fraction": solve_fraction,
    "energy": solve_convex,
    "sensitivity": solve_convex,
    "balanced": solve_convex,
}
