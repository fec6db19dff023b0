"""Sentences about rendered scenes: several templates, word orders, synonyms, levels of detail."""

from __future__ import annotations

import random

from data_prep.scene_content import Scene, Thing

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "hoop"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "heart": ("heart",),
    "hexagon": ("hexagon", "hexagon", "six-sided shape"),
    "crescent": ("crescent", "crescent", "moon"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "grey": ("grey", "gray"),
    "purple": ("purple", "purple", "violet"),
    "turquoise": ("turquoise", "turquoise", "teal"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium-sized", "", "", ""),
    "large": ("large", "large", "big", "huge"),
}
TEXTURE_BEFORE: dict[str, tuple[str, ...]] = {
    "plain": ("", "", "", "plain"),
    "striped": ("striped",),
    "dotted": ("dotted", "dotted", "spotted"),
    "checkered": ("checkered", "checkered", "chequered"),
}
TEXTURE_AFTER: dict[str, tuple[str, ...]] = {
    "striped": ("with stripes",),
    "dotted": ("with dots", "with spots"),
    "checkered": ("with checks", "with a checkerboard pattern"),
}
NUMBERS = {2: ("two", "two", "a pair of"), 3: ("three",), 4: ("four",)}
PLURALS = {"box": "boxes", "cross": "crosses", "rhombus": "rhombuses"}
PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "middle": ("in the middle", "in the centre", "at the centre"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "this shows ", "here we see ")
PAIRS: dict[str, tuple[str, ...]] = {
    "side": (
        "{a} to the left of {b}",
        "{a} left of {b}",
        "{b} to the right of {a}",
        "{b} right of {a}",
        "on the left {a}, on the right {b}",
        "{a} and, to its right, {b}",
    ),
    "stack": (
        "{a} above {b}",
        "{a} over {b}",
        "{b} below {a}",
        "{b} under {a}",
        "{b} with {a} above it",
        "at the top {a}, at the bottom {b}",
    ),
    "inside": (
        "{b} inside {a}",
        "{b} in front of {a}",
        "{a} with {b} inside",
        "{a} containing {b}",
    ),
    "row": (
        "{a}, {b} and {c} from left to right",
        "from left to right: {a}, {b} and {c}",
        "in a row, {a}, {b} and {c}",
        "{b} between {a} on the left and {c} on the right",
    ),
    "column": (
        "{a}, {b} and {c} from top to bottom",
        "from top to bottom: {a}, {b} and {c}",
        "in a column, {a}, {b} and {c}",
        "{b} between {a} at the top and {c} at the bottom",
    ),
}
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("on a {} background", "on {}", "against a {} wall", "on a {} backdrop"),
    "shaded": ("on a shaded {} background", "against a {} wall with a shadow"),
    "grid": ("on a {} grid", "on a {} background with grid lines", "on {} squared paper"),
}


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeio" else "a ") + phrase


def _noun(rng: random.Random, thing: Thing, *, full: bool, plural: bool = False) -> str:
    """Name a thing without its article; colour and shape always, the rest mostly."""
    colour = rng.choice(COLOUR_WORDS.get(thing.colour, (thing.colour,)))
    shape = rng.choice(SHAPE_WORDS[thing.shape])
    if plural:
        shape = PLURALS.get(shape, shape + "s")
    size = rng.choice(SIZE_WORDS[thing.size]) if full or rng.random() < 0.75 else ""
    after = ""
    before = ""
    if full or rng.random() < 0.85:
        if thing.texture != "plain" and rng.random() < 0.25:
            after = rng.choice(TEXTURE_AFTER[thing.texture])
        else:
            before = rng.choice(TEXTURE_BEFORE[thing.texture])
    middle = [colour, before] if before and rng.random() < 0.5 else [before, colour]
    return " ".join(word for word in (size, *middle, shape, after) if word)


def _body(rng: random.Random, scene: Scene, *, full: bool) -> str:
    if scene.layout == "group":
        number = rng.choice(NUMBERS[scene.count])
        return f"{number} {_noun(rng, scene.things[0], full=full, plural=True)}"
    things = [_article(_noun(rng, thing, full=full)) for thing in scene.things]
    if scene.layout == "single":
        place = rng.choice(PLACE_WORDS[scene.place])
        if not full and rng.random() < 0.2:
            return things[0]
        return f"{place}, {things[0]}" if rng.random() < 0.2 else f"{things[0]} {place}"
    return rng.choice(PAIRS[scene.layout]).format(**dict(zip("abc", things, strict=False)))


def caption(rng: random.Random, scene: Scene, *, full: bool = False) -> str:
    """Say one true sentence about a scene.

    Args:
        rng: Chooses template, word order, synonyms and, unless `full`, what is left unsaid.
        scene: What the image shows.
        full: Say everything that the signature of the scene holds.

    Returns:
        One line in lower case.
    """
    body = _body(rng, scene, full=full)
    ground = rng.choice(BACKGROUND_WORDS[scene.pattern]).format(scene.background)
    if not full and rng.random() < (0.1 if scene.layout in ("single", "group") else 0.35):
        ground = ""
    if ground and rng.random() < 0.15:
        return f"{ground}, {body}"
    # Only what starts with its subject can be opened: not "here we see on the left a ...".
    subject = body.startswith(("a ", "an ", "two ", "three ", "four "))
    opening = rng.choice(OPENINGS) if subject else ""
    return f"{opening}{body} {ground}".rstrip()


def captions(rng: random.Random, scene: Scene, number: int) -> list[str]:
    """Return `number` different sentences about a scene; the first one is complete."""
    sentences = [caption(rng, scene, full=True)]
    while len(sentences) < number:
        sentence = caption(rng, scene)
        if sentence not in sentences:
            sentences.append(sentence)
    return sentences
