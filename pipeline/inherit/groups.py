"""What a budget asks for: one share of the whole teacher, or a share for each group of layers.

    "params=0.5"                                  half of all parameters
    {"visual.*": "params=0.6", "*": "params=0.4"} 0.6 of the image tower's, 0.4 of the rest's

A group is a shell glob on full names; the first that matches a name owns it, and its share counts
against that group's own part of the teacher. No torch here: configurations are read without it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from data_prep.errors import UserError

UNITS = ("params", "weights", "macs", "latency", "fidelity", "rank")
WHOLE_UNITS = ("latency", "fidelity")  # only a whole model has a speed or an embedding

Budget = str | Sequence[str] | Mapping[str, str]


@dataclass(frozen=True)
class Group:
    """A share, in some unit, of the layers whose names match a glob; "*" alone is the teacher."""

    pattern: str
    unit: str
    share: float

    def __str__(self) -> str:
        text = f"{self.unit}={self.share:g}"
        return text if self.pattern == "*" else f"{self.pattern}:{text}"


def parse_budget(text: str) -> tuple[str, float]:
    """Split `params=0.4` into its unit and its share.

    Raises:
        UserError: unknown unit, or a share that is not in (0, 1].
    """
    unit, _, value = text.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if unit not in UNITS or not 0.0 < share <= 1.0:
        raise UserError(
            f"{text!r} is not a budget",
            where="budget",
            todo=f"write UNIT=SHARE, UNIT one of {', '.join(UNITS)}, SHARE above 0 and at most 1",
        )
    return unit, share


def parse_groups(budget: Budget) -> list[Group]:
    """Read a budget in any of its forms.

    Args:
        budget: `UNIT=SHARE`, `GLOB:UNIT=SHARE`, several of them, or a mapping GLOB -> UNIT=SHARE.

    Raises:
        UserError: no or a wrong share, a glob given twice, or a unit that has no parts.
    """
    if isinstance(budget, str):
        pairs: list[tuple[str, str]] = [_split(budget)]
    elif isinstance(budget, Mapping):
        pairs = [(str(pattern), str(text)) for pattern, text in budget.items()]
    else:
        pairs = [_split(text) for text in budget]
    groups = [Group(pattern, *parse_budget(text)) for pattern, text in pairs]
    patterns = [group.pattern for group in groups]
    if not groups or len(set(patterns)) < len(patterns):
        raise UserError(
            "every group of layers needs exactly one share",
            where="budget",
            todo="write each glob once, e.g. 'visual.*:params=0.6' and '*:params=0.4'",
        )
    for group in groups:
        if group.unit in WHOLE_UNITS and patterns != ["*"]:
            raise UserError(
                f"{group.unit} belongs to a whole model, not to the group {group.pattern!r}",
                where="budget",
                todo=f"give groups shares of params, weights or macs, or '{group.unit}=...' alone",
            )
    return groups


def _split(text: str) -> tuple[str, str]:
    pattern, colon, rest = text.rpartition(":")
    return (pattern, rest) if colon else ("*", text)


def owner(name: str, groups: Iterable[Group]) -> Group | None:
    """Return the group of a parameter's full name: the first that matches it or its module's."""
    module = name.rpartition(".")[0]
    for group in groups:
        if any(fnmatch.fnmatchcase(part, group.pattern) for part in (name, module) if part):
            return group
    return None


def describe(groups: Sequence[Group]) -> str:
    """Return a budget as one line of text."""
    return ", ".join(str(group) for group in groups)
