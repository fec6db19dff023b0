"""What is in a rendered scene: the vocabulary, the random draw, and the signature of a scene."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (214, 36, 36),
    "orange": (245, 135, 20),
    "yellow": (246, 220, 40),
    "green": (40, 150, 55),
    "turquoise": (35, 195, 190),
    "blue": (35, 75, 215),
    "purple": (125, 45, 170),
    "pink": (250, 130, 185),
    "brown": (120, 72, 35),
    "white": (250, 250, 250),
    "black": (18, 18, 18),
    "grey": (135, 135, 135),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (247, 247, 247),
    "grey": (160, 160, 160),
    "black": (15, 15, 15),
    "beige": (233, 215, 176),
    "pale green": (190, 228, 180),
    "light blue": (170, 210, 245),
    "dark blue": (20, 32, 88),
    "maroon": (92, 18, 30),
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "diamond",
    "heart",
    "hexagon",
    "crescent",
)
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
PATTERNS = ("plain", "shaded", "grid")
PLACES = ("middle", "left", "right", "top", "bottom")
LAYOUTS = ("single", "side", "stack", "inside", "row", "column", "group")
_LAYOUT_WEIGHTS = (28, 20, 16, 8, 8, 6, 14)
# Squared RGB distance under which two colours are taken for one on a 64-pixel JPEG.
_CONTRAST = 85**2


@dataclass(frozen=True)
class Thing:
    """One object: its shape, colour, size and texture, all from the lists above."""

    shape: str
    colour: str
    size: str
    texture: str

    @property
    def name(self) -> str:
        """The class name used by the zero-shot set, for example `red circle`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Everything that a full caption could say about an image.

    Attributes:
        layout: One of `LAYOUTS`. `side`: left, right; `stack`: upper, lower; `inside`: outer,
            inner; `row`: left to right; `column`: top to bottom; `group`: `count` equal things.
        things: 1, 2 or 3 objects in the order that the layout names.
        background: A key of `BACKGROUNDS`.
        pattern: One of `PATTERNS`.
        place: Where a `single` thing is, one of `PLACES`; empty in other layouts.
        count: How many copies a `group` shows (2 to 4); 1 in other layouts.
    """

    layout: str
    things: tuple[Thing, ...]
    background: str
    pattern: str
    place: str = ""
    count: int = 1

    @property
    def signature(self) -> str:
        """A text that is equal for two scenes exactly if no caption can tell them apart."""
        things = ";".join(f"{t.size} {t.colour} {t.texture} {t.shape}" for t in self.things)
        return f"{self.layout}{self.place}{self.count}|{things}|{self.pattern} {self.background}"


def distinct(first: RGB, second: RGB) -> bool:
    """Whether two RGB colours (0..255) can be told apart on a small, noisy image."""
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) > _CONTRAST


@lru_cache(maxsize=1024)
def _colours_against(forbidden: tuple[RGB, ...]) -> tuple[str, ...]:
    return tuple(
        name for name, rgb in COLOURS.items() if all(distinct(rgb, other) for other in forbidden)
    )


def _draw_thing(rng: random.Random, forbidden: tuple[RGB, ...], sizes: tuple[str, ...]) -> Thing:
    colours = _colours_against(forbidden)
    texture = rng.choices(TEXTURES, weights=(40, 20, 20, 20))[0]
    return Thing(rng.choice(SHAPES), rng.choice(colours), rng.choice(sizes), texture)


def draw_scene(rng: random.Random, layout: str | None = None) -> Scene:
    """Draw a scene; `layout` fixes the arrangement, the rest is random."""
    if layout is None:
        layout = rng.choices(LAYOUTS, weights=_LAYOUT_WEIGHTS)[0]
    background = rng.choice(list(BACKGROUNDS))
    pattern = rng.choices(PATTERNS, weights=(60, 20, 20))[0]
    behind = (BACKGROUNDS[background],)
    if layout == "single":
        things = [_draw_thing(rng, behind, SIZES)]
        return Scene(layout, tuple(things), background, pattern, place=rng.choice(PLACES))
    if layout == "group":
        things = [_draw_thing(rng, behind, ("small", "medium"))]
        return Scene(layout, tuple(things), background, pattern, count=rng.randint(2, 4))
    if layout == "inside":
        outer = _draw_thing(rng, behind, ("large",))
        # A textured or hollow outer shape would hide what is drawn on it.
        solid = rng.choice(("circle", "square", "hexagon", "diamond", "heart"))
        outer = Thing(solid, outer.colour, "large", "plain")
        inner = _draw_thing(rng, (*behind, COLOURS[outer.colour]), ("small",))
        return Scene(layout, (outer, inner), background, pattern)
    number = 3 if layout in ("row", "column") else 2
    sizes = ("small", "large") if number == 2 else ("small", "medium")
    drawn = tuple(_draw_thing(rng, behind, sizes) for _ in range(number))
    if drawn[0] == drawn[1] or drawn[-1] == drawn[-2]:
        return draw_scene(rng, layout)  # equal neighbours would be a group, said otherwise
    return Scene(layout, drawn, background, pattern)


def class_names() -> list[str]:
    """The zero-shot classes: every colour with every shape, in the order of the vocabulary."""
    return [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]


def draw_scene_of_class(rng: random.Random, label: int) -> Scene:
    """Draw a one-object scene of class number `label` in `class_names()`."""
    shape = SHAPES[label // len(COLOURS)]
    colour = list(COLOURS)[label % len(COLOURS)]
    grounds = [name for name, rgb in BACKGROUNDS.items() if distinct(rgb, COLOURS[colour])]
    thing = Thing(shape, colour, rng.choice(SIZES), rng.choice(TEXTURES))
    return Scene(
        "single",
        (thing,),
        rng.choice(grounds),
        rng.choice(PATTERNS),
        place=rng.choice(PLACES),
    )
