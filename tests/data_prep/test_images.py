"""Images from strangers: every mode becomes upright RGB, every fault gets its name."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.images import (
    ImageFaultError,
    ImageSettings,
    decode_rgb,
    keep_image,
    near_pairs,
    perceptual_hash,
    store_image,
)
from tests.data_prep.misbehaving_server import bomb, picture


def drawing(quality: int = 90, mode: str = "RGB") -> bytes:
    """A drawing whose upper left is red and lower right is blue."""
    image = Image.new("RGB", (320, 300), "white")
    for place, colour in enumerate(["red", "black", "blue"]):
        ImageDraw.Draw(image).rectangle([place * 70, place * 40, place * 90 + 60, 200], colour)
    return encode(image.convert(mode), "JPEG", quality=quality)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def near(data: bytes, colour: tuple[int, int, int], at: tuple[int, int] = (5, 5)) -> bool:
    found = decode_rgb(data).getpixel(at)
    return bool(np.abs(np.subtract(found, colour)).max() <= 12)


def test_modes_become_rgb() -> None:
    red = Image.new("RGB", (40, 40), (200, 0, 0))
    clear = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    half = Image.new("LA", (40, 40), (0, 0))
    palette = red.convert("P")
    deep = Image.fromarray(np.full((40, 40), 0x8000, np.uint16))
    assert near(encode(red, "PNG"), (200, 0, 0))
    assert near(encode(red.convert("CMYK"), "JPEG"), (200, 0, 0))
    assert near(encode(red.convert("L"), "PNG"), (60, 60, 60))
    assert near(encode(red.convert("1"), "PNG"), decode_rgb(encode(red.convert("1"), "PNG"))
                .getpixel((5, 5)))  # fmt: skip
    assert near(encode(clear, "PNG"), (255, 255, 255)), "transparency is laid on white"
    assert near(encode(half, "PNG"), (255, 255, 255))
    assert near(encode(palette, "PNG", transparency=palette.getpixel((0, 0))), (255, 255, 255))
    assert near(encode(palette, "GIF"), (200, 0, 0))
    assert near(encode(deep, "PNG"), (128, 128, 128)), "16-bit values are scaled, not clipped"
    assert near(encode(deep, "TIFF"), (128, 128, 128))
    assert near(encode(red, "WEBP", lossless=True), (200, 0, 0))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], form, save_all=True, append_images=frames[1:])
        assert near(data, (255, 0, 0)), form


def test_exif_orientation_is_applied_and_gone_afterwards() -> None:
    image = Image.open(io.BytesIO(drawing()))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    stored = store_image(encode(image, "JPEG", exif=exif, quality=95), ImageSettings(size=256))
    assert (stored.original_width, stored.original_height) == (300, 320)
    assert (stored.width, stored.height) == (256, 273)
    again = Image.open(io.BytesIO(stored.data))
    assert not again.getexif().get(0x0112)
    assert near(stored.data, (255, 0, 0), (240, 10)), "the red corner is now at the upper right"


@pytest.mark.parametrize(
    ("size", "stored"),
    [((640, 480), (341, 256)), ((480, 1000), (256, 533)), ((100, 80), (100, 80)),
     ((5000, 300), (4267, 256))],
)  # fmt: skip
def test_the_shorter_side_is_reduced_and_never_enlarged(
    size: tuple[int, int], stored: tuple[int, int]
) -> None:
    result = store_image(picture(1, size), ImageSettings(size=256))
    assert (result.width, result.height) == stored
    assert Image.open(io.BytesIO(result.data)).size == stored
    assert (result.original_width, result.original_height) == size
    assert result.data == store_image(picture(1, size), ImageSettings(size=256)).data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"), (b"<!DOCTYPE html>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        (bomb(), "too_many_pixels"), (picture(1)[:2000], "truncated"),
        (picture(1, (20, 10)), "too_small"), (b"\x89PNG\r\n\x1a\n" + b"x" * 99, "not_an_image"),
        (picture(1, (640, 480)), "too_many_pixels"),
    ],
)  # fmt: skip
def test_faults_are_named(data: bytes, reason: str) -> None:
    with pytest.raises(ImageFaultError) as fault:
        store_image(data, ImageSettings(max_pixels=640 * 480 - 1))
    assert fault.value.reason == reason


def test_random_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    base = picture(5), encode(Image.open(io.BytesIO(picture(5))), "PNG")
    for trial in range(200):
        data = bytearray(base[trial % 2])
        for place in rng.integers(0, len(data), 8):
            data[place] = rng.integers(0, 256)
        try:
            store_image(bytes(data), ImageSettings(max_pixels=1_000_000))
        except ImageFaultError:
            continue


def test_kept_images_keep_their_bytes_and_type() -> None:
    for form, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        data = encode(Image.open(io.BytesIO(picture(2))), form)
        assert keep_image(data, ImageSettings(size=0)) == (data, extension)
    with pytest.raises(ImageFaultError):
        keep_image(picture(2)[:3000], ImageSettings(size=0))


def test_near_pairs_are_those_of_comparing_all() -> None:
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**63, 300, dtype=np.uint64)
    for _ in range(150):
        one, other = rng.integers(0, 300, 2)
        flips = rng.choice(64, rng.integers(0, 6), replace=False)
        hashes[one] = hashes[other] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0)
        )
    gaps = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = {
        later: min(np.flatnonzero(gaps[later, :later] <= 3))
        for later in range(300)
        if (gaps[later, :later] <= 3).any()
    }
    assert {later: earlier for later, earlier, _ in near_pairs(hashes)} == expected


def test_perceptual_hash_survives_recompression() -> None:
    pytest.importorskip("imagehash")
    one, other = (perceptual_hash(decode_rgb(drawing(quality))) for quality in (95, 60))
    assert (one ^ other).bit_count() <= 3
    assert (one ^ perceptual_hash(decode_rgb(picture(9)))).bit_count() > 10
