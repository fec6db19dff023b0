"""Bytes from anywhere in, a plain JPEG out: safe decoding, resizing, perceptual hashes."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field

# Only formats that photographs come in: others have decoders that run programs or rarely tested
# code (EPS starts Ghostscript), and these bytes come from strangers.
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF")
    if name in Image.OPEN  # Pillow raises KeyError for what it was built without
)
# `max_pixels` is checked below, before pixels are decoded; Pillow's warning at half of its own
# limit would only fill the logs. (`catch_warnings` is not safe with threads.)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


class ImageFaultError(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: The status it gets in `rows.parquet`: not_an_image, truncated, too_many_pixels
            or too_small.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class ImageSettings(BaseModel):
    """How images are stored; part of a set's settings, as it determines its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(256, ge=0, description="shorter side in pixels; 0 keeps the size")
    quality: int = Field(95, ge=1, le=100, description="JPEG quality")
    min_side: int = Field(32, ge=1, description="shorter side below which an image is refused")
    max_pixels: int = Field(
        100_000_000, ge=1, le=178_000_000, description="decompression bomb limit"
    )


@dataclass(frozen=True)
class StoredImage:
    """A re-encoded image.

    Attributes:
        data: JPEG bytes.
        width: Stored width in pixels; `height` likewise.
        original_width: Width before resizing, upright; `original_height` likewise.
        sha256: Hash of the bytes that came in.
    """

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    sha256: str


def open_image(data: bytes, max_pixels: int = 100_000_000) -> Image.Image:
    """Open an image without decoding its pixels.

    Raises:
        ImageFaultError: no image of a known format, or more pixels than allowed.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageFaultError("too_many_pixels", str(error)) from None
    except Exception as error:
        # Pillow's parsers raise nearly anything on hostile input; all of it means the same.
        start = data[:16].lstrip().lower()
        kind = "an HTML page" if start.startswith((b"<!doc", b"<html")) else type(error).__name__
        raise ImageFaultError("not_an_image", kind if data else "empty") from None
    if image.width * image.height > max_pixels:
        raise ImageFaultError("too_many_pixels", f"{image.width}x{image.height}")
    return image


def decode_rgb(data: bytes, *, max_pixels: int = 100_000_000, shorter: int = 0) -> Image.Image:
    """Decode an image to upright RGB.

    The first frame of an animation is taken, transparency is laid on white, 16-bit values are
    scaled to 8, EXIF orientation is applied.

    Args:
        data: Encoded image.
        max_pixels: Refuse larger images before their pixels are decoded.
        shorter: Where above 0, a JPEG may be decoded at a fraction of its size whose shorter
            side is still at least this; much quicker for large photographs.

    Raises:
        ImageFaultError: see `ImageFaultError.reason`.
    """
    return _decode(open_image(data, max_pixels), shorter)


def _decode(image: Image.Image, shorter: int) -> Image.Image:
    try:
        if shorter and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            image.draft(image.mode, _fit(image.width, image.height, shorter))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies even upright images
        return _to_rgb(image)
    except Exception as error:
        if "truncated" in str(error).lower() or "unexpected end" in str(error).lower():
            raise ImageFaultError("truncated", str(error)) from None
        raise ImageFaultError("not_an_image", f"{type(error).__name__}: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit greys; Pillow would clip them
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if values.max(initial=0) > 255 or image.mode != "F" else 255.0
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        layers = image.convert("RGBA")
        image = Image.new("RGBA", layers.size, "white")
        image.alpha_composite(layers)
    return image.convert("RGB")


def _fit(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Return the size with the given shorter side, same aspect ratio, never enlarged."""
    scale = shorter / min(width, height)
    if scale >= 1:
        return width, height
    return max(shorter, round(width * scale)), max(shorter, round(height * scale))


def store_image(data: bytes, settings: ImageSettings) -> StoredImage:
    """Decode, resize and re-encode an image for a shard.

    Raises:
        ImageFaultError: see `ImageFaultError.reason`.
    """
    header = open_image(data, settings.max_pixels)
    if min(header.size) < settings.min_side:
        raise ImageFaultError("too_small", f"{header.width}x{header.height}")
    original = header.size
    image = _decode(header, settings.size)
    if (image.width > image.height) != (original[0] > original[1]):  # turned by its orientation
        original = original[1], original[0]
    if settings.size:
        target = _fit(image.width, image.height, settings.size)
        if target != image.size:
            # Hamming: made for reducing, as sharp as bicubic there at two thirds of its cost.
            image = image.resize(target, Image.Resampling.HAMMING, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.quality)
    digest = hashlib.sha256(data).hexdigest()
    return StoredImage(buffer.getvalue(), *image.size, *original, digest)


def keep_image(data: bytes, settings: ImageSettings) -> tuple[bytes, str]:
    """Check an image that is stored as it is; return its bytes and its extension.

    Raises:
        ImageFaultError: see `ImageFaultError.reason`.
    """
    image = open_image(data, settings.max_pixels)
    kind = image.format or ""
    _decode(image, 0)
    return data, _EXTENSIONS.get(kind, kind.lower())


def perceptual_hash(image: Image.Image) -> int:
    """Return the 64-bit perceptual hash (pHash) of an image, as ImageHash computes it.

    Raises:
        ImportError: the extra `near-duplicates` is not installed.
    """
    import imagehash

    bits = imagehash.phash(image).hash.flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(hashes: np.ndarray, distance: int = 3) -> list[tuple[int, int, int]]:
    """Find pairs of hashes that differ in few bits, exactly and without comparing all.

    Two 64-bit words that differ in at most 3 bits agree in at least one of their four 16-bit
    quarters, so only words that share a quarter are compared.

    Args:
        hashes: uint64 [N].
        distance: Greatest number of differing bits, 0 to 3.

    Returns:
        (later, earlier, distance) for each later item, with its earliest near relative.
    """
    if not 0 <= distance <= 3:
        raise ValueError("distances of 0 to 3 bits are found exactly")
    best: dict[int, tuple[int, int]] = {}
    for shift in (0, 16, 32, 48):
        quarter = (hashes >> np.uint64(shift)) & np.uint64(0xFFFF)
        order = np.argsort(quarter, kind="stable")
        edges = np.flatnonzero(np.diff(quarter[order])) + 1
        for group in np.split(order, edges):
            for place in range(1, len(group)):
                gaps = np.bitwise_count(hashes[group[:place]] ^ hashes[group[place]])
                near = np.flatnonzero(gaps <= distance)
                if len(near):
                    found = (int(group[near[0]]), int(gaps[near[0]]))
                    later = int(group[place])
                    best[later] = min(best.get(later, found), found)
    return [(later, earlier, gap) for later, (earlier, gap) in sorted(best.items())]
