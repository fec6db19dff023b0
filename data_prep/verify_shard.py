"""One shard in, everything that is wrong with it out."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.images import ImageFaultError, decode_rgb, open_image, perceptual_hash
from data_prep.samples import IMAGE_EXTENSIONS, CorruptSampleError, RawSample
from data_prep.tar_index import BLOCK, Member, TarDamageError, split_name, walk_tar

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
_MAGIC = {"jpg": b"\xff\xd8\xff", "jpeg": b"\xff\xd8\xff", "png": b"\x89PNG", "gif": b"GIF8"}


_Run = list[tuple[str, Member]]  # the members of one sample with their extensions


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        shard: File name of the shard, or of the manifest.
        kind: Short name of the fault, e.g. `no image`, `checksum`.
        detail: The particulars.
        position: Which sample of the shard, counted from 0; None where it is not one sample.
        key: The sample's key, "" where it is not one sample.
    """

    shard: str
    kind: str
    detail: str = ""
    position: int | None = None
    key: str = ""


@dataclass
class ShardReport:
    """What a shard holds and what is wrong with it.

    Attributes:
        samples: Samples that were reached.
        keys: Their keys, in order.
        image_hashes: uint64 [samples], the beginning of each image's SHA-256, 0 without image.
        looks: uint64 [samples] of perceptual hashes, empty unless asked for.
    """

    path: Path
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    findings: list[Finding] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    image_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    looks: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def add(self, kind: str, detail: str = "", position: int | None = None, key: str = "") -> None:
        """Note a fault."""
        self.findings.append(Finding(self.path.name, kind, detail, position, key))


def check_shard(path: Path, *, decode: bool = True, looks: bool = False) -> ShardReport:
    """Check a shard from its first byte to its last.

    Args:
        path: A tar.
        decode: Decode every image; without it, only the first bytes of images are looked at.
        looks: Compute perceptual hashes too.
    """
    report = ShardReport(path)
    try:
        report.bytes = path.stat().st_size
        if not report.bytes:
            report.add("empty file")
            return report
        with path.open("rb") as handle:
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        report.add("unreadable", error.strerror or str(error))
        return report
    with data:
        report.sha256 = hashlib.sha256(data).hexdigest()
        _check_members(data, report, decode, looks)
    return report


def _check_members(data: mmap.mmap, report: ShardReport, decode: bool, looks: bool) -> None:
    hashes: list[int] = []
    seen: dict[str, int] = {}
    perceptual: list[int] = []
    for key, members in _samples(data, report):
        position = report.samples
        report.samples += 1
        report.keys.append(key)
        if key in seen:
            report.add("members apart", f"also sample {seen[key]}", position, key)
        seen[key] = position
        files: dict[str, bytes] = {}
        for extension, member in members:
            if extension in files:
                report.add("member twice", member.name, position, key)
            files[extension] = data[member.offset : member.offset + member.size]
        sample = RawSample(key, files, report.path.name)
        for kind, detail in sample_faults(sample):
            report.add(kind, detail, position, key)
        image = files.get(sample.image_extension, b"")
        digest = hashlib.sha256(image).digest() if image else bytes(8)
        hashes.append(int.from_bytes(digest[:8], "big"))
        if image and (decode or looks):
            look = _check_image(sample, image, report, position, looks)
            if looks:
                perceptual.append(look)
    report.image_hashes = np.asarray(hashes, dtype=np.uint64)
    if looks:
        report.looks = np.asarray(perceptual, dtype=np.uint64)
    if not report.samples and not report.findings:
        report.add("no samples")


def _samples(
    data: mmap.mmap, report: ShardReport
) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
    """Yield runs of members with one key; faults of the tar itself go to the report."""
    key, end = "", 0
    run: _Run = []
    try:
        for member in walk_tar(data):
            end = member.offset + (member.size + BLOCK - 1) // BLOCK * BLOCK
            stem, extension = split_name(member.name)
            if not stem:
                report.add("stray member", f"{member.name!r} belongs to no sample")
                continue
            if "/" in member.name and _unsafe(member.name):
                report.add("unsafe name", member.name, report.samples + (stem != key), stem)
            if stem != key and run:
                yield key, run
                run = []
            key = stem
            run.append((extension, member))
    except TarDamageError as error:
        if run:
            yield key, run
        report.add(_damage_kind(str(error)), str(error))
        return
    if run:
        yield key, run
    if data[end:].strip(b"\0"):
        report.add("data after the end", f"bytes follow the end-of-archive mark at {end}")
    if len(data) % BLOCK:
        report.add("ragged end", f"{len(data)} bytes are no multiple of {BLOCK}")


def _unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


def _damage_kind(message: str) -> str:
    for start in ("cut short", "it is compressed", "not a tar file"):
        if message.startswith(start):
            return start.removeprefix("it is ")
    return "damaged header"


def sample_faults(sample: RawSample) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a sample short of decoding its image."""
    images = [name for name in IMAGE_EXTENSIONS if name in sample.files]
    if len(images) != 1:
        yield ("several images" if images else "no image"), ", ".join(sample.files)
    elif not sample.files[images[0]]:
        yield "empty image", images[0]
    elif not sample.files[images[0]].startswith(_MAGIC.get(images[0], b"")):
        yield "wrong image type", f"the content is no {images[0]}"
    try:
        record = sample.record
    except CorruptSampleError as error:
        yield "unreadable json", str(error)
        return
    try:
        label = sample.label
        if label is not None and label < 0:
            yield "bad label", str(label)
    except CorruptSampleError as error:
        label = -1
        yield "bad label", str(error)
    if label is None or "captions" in record:
        yield from _caption_faults(sample)
    elif "txt" in sample.files and not sample.files["txt"].strip():
        yield "empty caption", "the txt"


def _caption_faults(sample: RawSample) -> Iterator[tuple[str, str]]:
    listed = sample.record.get("captions")
    if isinstance(listed, list) and not all(isinstance(t, str) and t.strip() for t in listed):
        yield "empty caption", "in the json"
        return
    try:
        captions = sample.captions
    except CorruptSampleError as error:
        text = str(error)
        yield ("caption encoding" if "UTF-8" in text else "no caption"), text
        return
    if any(not t.isprintable() and _CONTROL.search(t) for t in captions):
        yield "control characters", repr(captions)[:80]
    if isinstance(listed, list) and "txt" in sample.files:
        text = sample.files["txt"].decode("utf-8", "replace").strip()
        if not text:
            yield "empty caption", "the txt"
        elif text != captions[0]:
            yield "captions differ", f"txt {text[:40]!r}, json {captions[0][:40]!r}"


def _check_image(
    sample: RawSample, image: bytes, report: ShardReport, position: int, looks: bool
) -> int:
    """Decode an image; return its perceptual hash, or 0."""
    extension = sample.image_extension
    try:
        found = open_image(image).format
        decoded = decode_rgb(image)
    except ImageFaultError as error:
        report.add("broken image", str(error)[:120], position, sample.key)
        return 0
    if extension in _FORMATS and found not in (_FORMATS[extension], "MPO"):
        report.add("wrong image type", f"a {found} called {extension}", position, sample.key)
    try:
        size = sample.record.get("width"), sample.record.get("height")
    except CorruptSampleError:
        size = None, None  # noted already
    if isinstance(size[0], int) and isinstance(size[1], int) and size != decoded.size:
        report.add("wrong size", f"{decoded.size}, the json says {size}", position, sample.key)
    return perceptual_hash(decoded) if looks else 0
