"""Scenes to pixels: drawn at twice the size, averaged down, and a little noise added."""

from __future__ import annotations

import io
import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from data_prep.scene_content import BACKGROUNDS, COLOURS, RGB, Scene, Thing

# Radius of a thing as a fraction of the image side.
_RADIUS = {
    "small": 0.105,
    "medium": 0.155,
    "large": 0.215,
}
_NOISE_SIDE = 512  # a field of noise is drawn once per seed; every image takes a window of it
_JPEG_QUALITY = 92


@lru_cache(maxsize=4)
def _noise_field(seed: int) -> Image.Image:
    """Normal noise of 5 grey levels around 128, as an RGB image."""
    generator = np.random.default_rng(seed)
    field = generator.normal(128.0, 5.0, (_NOISE_SIDE, _NOISE_SIDE, 3))
    return Image.fromarray(np.clip(np.rint(field), 0, 255).astype(np.uint8))


def _regular(corners: int, radius: float, turn: float) -> list[tuple[float, float]]:
    angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _outline(shape: str, r: float) -> list[tuple[float, float]]:
    """Corners of a shape around the origin; x to the right, y down, `r` its radius in pixels."""
    up = -math.pi / 2
    if shape == "square":
        return _regular(4, 1.2 * r, math.pi / 4)
    if shape == "triangle":
        return [(x, y + 0.2 * r) for x, y in _regular(3, 1.25 * r, up)]
    if shape == "diamond":
        return [(0, -1.25 * r), (0.8 * r, 0), (0, 1.25 * r), (-0.8 * r, 0)]
    if shape == "hexagon":
        return _regular(6, 1.1 * r, 0.0)
    if shape == "star":
        outer = _regular(5, 1.25 * r, up)
        inner = _regular(5, 0.5 * r, up + math.pi / 5)
        return [corner for pair in zip(outer, inner, strict=True) for corner in pair]
    if shape == "cross":
        a, b = 1.1 * r, 0.38 * r
        return [
            (-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
            (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b),
        ]  # fmt: skip
    # heart: the curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t
    steps = [2 * math.pi * k / 32 for k in range(32)]
    return [
        (
            r * 16 * math.sin(t) ** 3 / 14,
            -r
            * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
            / 14,
        )
        for t in steps
    ]


def _shape_mask(shape: str, r: float, turn: float) -> Image.Image:
    """An `L` image of side `3 r` with the shape in its middle, turned by `turn` radians."""
    half = 1.5 * r
    mask = Image.new("L", (math.ceil(2 * half), math.ceil(2 * half)))
    draw = ImageDraw.Draw(mask)

    def disc(x: float, y: float, radius: float, fill: int) -> None:
        draw.ellipse(
            (half + x - radius, half + y - radius, half + x + radius, half + y + radius), fill
        )

    if shape in ("circle", "ring", "crescent"):
        disc(0, 0, 1.05 * r, 255)
        if shape == "ring":
            disc(0, 0, 0.58 * r, 0)
        elif shape == "crescent":
            disc(0.5 * r * math.cos(turn), 0.5 * r * math.sin(turn), 0.85 * r, 0)
        return mask
    cos, sin = math.cos(turn), math.sin(turn)
    points = [(half + x * cos - y * sin, half + x * sin + y * cos) for x, y in _outline(shape, r)]
    draw.polygon(points, 255)
    return mask


@lru_cache(maxsize=256)
def _texture(kind: str, side: int, variant: int) -> Image.Image:
    """An `L` image that is 255 where the second colour of a texture shows; 4 variants."""
    y, x = np.mgrid[0:side, 0:side]
    period = 8 + 2 * (variant % 2)
    if kind == "striped":
        phase = (x + y if variant < 2 else x - y) if variant % 2 else (x if variant < 2 else y)
        spot = phase % period < period // 2
    elif kind == "dotted":
        spot = (x % period - period // 2) ** 2 + (y % period - period // 2) ** 2 < (period / 3) ** 2
    else:
        half = period // 2 + 1
        spot = (x // half + y // half) % 2 == 0
    return Image.fromarray((spot * 255).astype(np.uint8))


def _second_colour(rgb: RGB) -> RGB:
    light = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]
    weight, target = (0.75, 255) if light < 130 else (0.7, 0)
    r, g, b = (round(c + weight * (target - c)) for c in rgb)
    return r, g, b


def _jitter(rng: random.Random, rgb: RGB, by: int) -> RGB:
    r, g, b = (min(255, max(0, channel + rng.randint(-by, by))) for channel in rgb)
    return r, g, b


@lru_cache(maxsize=64)
def _ramp(side: int, variant: int) -> Image.Image:
    """A linear ramp from 0 to 90 over the image, in one of 4 directions."""
    line = np.linspace(0, 90, side)
    ramp = np.broadcast_to(line if variant % 2 else line[:, None], (side, side))
    return Image.fromarray((ramp[::-1, ::-1] if variant > 1 else ramp).astype(np.uint8))


def _background(rng: random.Random, scene: Scene, side: int) -> Image.Image:
    rgb = _jitter(rng, BACKGROUNDS[scene.background], 8)
    canvas = Image.new("RGB", (side, side), rgb)
    other = _second_colour(rgb)
    if scene.pattern == "shaded":
        canvas.paste(other, (0, 0), _ramp(side, rng.randrange(4)))
    elif scene.pattern == "grid":
        r, g, b = (round(0.65 * c + 0.35 * o) for c, o in zip(rgb, other, strict=True))
        draw = ImageDraw.Draw(canvas)
        step = side // 8
        start = rng.randrange(step)
        for at in range(start, side, step):
            draw.line((at, 0, at, side), (r, g, b), 2)
            draw.line((0, at, side, at), (r, g, b), 2)
    return canvas


def _centres(rng: random.Random, scene: Scene) -> list[tuple[float, float]]:
    """Centres (x, y) of all things as fractions of the side, before they are kept inside."""

    def near(x: float, y: float, by: float = 0.05) -> tuple[float, float]:
        return x + rng.uniform(-by, by), y + rng.uniform(-by, by)

    if scene.layout == "single":
        places = {
            "middle": (0.5, 0.5),
            "left": (0.2, 0.5),
            "right": (0.8, 0.5),
            "top": (0.5, 0.2),
            "bottom": (0.5, 0.8),
        }
        return [near(*places[scene.place])]
    if scene.layout == "inside":
        centre = near(0.5, 0.5, 0.12)
        return [centre, centre]
    if scene.layout == "group":
        corners = [(0.27, 0.27), (0.73, 0.73), (0.73, 0.27), (0.27, 0.73)]
        rng.shuffle(corners)
        return [near(*corner) for corner in corners[: scene.count]]
    if scene.layout in ("side", "stack"):
        drift = rng.uniform(-0.12, 0.12)
        line = [(0.26, 0.5 + drift), (0.74, 0.5 - drift)]
    else:
        line = [(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)]
    if scene.layout in ("stack", "column"):
        line = [(y, x) for x, y in line]
    return [near(x, y, 0.035) for x, y in line]


def _draw_thing(
    rng: random.Random, canvas: Image.Image, thing: Thing, centre: tuple[float, float], r: float
) -> None:
    side = canvas.width
    turn = rng.uniform(-0.2, 0.2)
    if thing.shape == "crescent":
        turn = rng.uniform(0, 2 * math.pi)
    mask = _shape_mask(thing.shape, r, turn)
    # Nothing may be cut off by the border: keep the drawn extent (1.25 r) inside.
    x, y = (min(max(c * side, 1.25 * r), side - 1.25 * r) for c in centre)
    at = (round(x - mask.width / 2), round(y - mask.height / 2))
    rgb = _jitter(rng, COLOURS[thing.colour], 12)
    canvas.paste(rgb, at, mask)
    if thing.texture != "plain":
        texture = _texture(thing.texture, 160, rng.randrange(4))
        texture = (
            texture.resize(mask.size) if mask.width > 160 else texture.crop((0, 0, *mask.size))
        )
        canvas.paste(_second_colour(rgb), at, ImageChops.darker(mask, texture))


def render(rng: random.Random, scene: Scene, size: int, noise_seed: int = 0) -> Image.Image:
    """Draw a scene.

    Args:
        rng: Chooses what the captions do not speak of: exact place, tilt, shade, noise.
        scene: What to draw.
        size: Side of the square image in pixels (32 to 512).
        noise_seed: Seed of the noise field that all images of a data set share.

    Returns:
        An RGB image of `size` x `size` pixels.
    """
    side = 2 * size
    canvas = _background(rng, scene, side)
    centres = _centres(rng, scene)
    things = scene.things * scene.count if scene.layout == "group" else scene.things
    for thing, centre in zip(things, centres, strict=True):
        r = _RADIUS[thing.size] * side * rng.uniform(0.94, 1.06)
        if scene.layout == "inside" and thing is scene.things[0]:
            r *= 1.35
        _draw_thing(rng, canvas, thing, centre, r)
    room = _NOISE_SIDE - size
    left, top = rng.randint(0, room), rng.randint(0, room)
    noise = _noise_field(noise_seed).crop((left, top, left + size, top + size))
    return ImageChops.add(canvas.reduce(2), noise, offset=-128)


def encode(image: Image.Image) -> bytes:
    """Encode an image as JPEG (the same bytes for the same pixels and Pillow)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
