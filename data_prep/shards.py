"""Samples in, WebDataset tar shards and their manifest out.

The same samples always give the same bytes, a shard takes its final name only when it is whole,
and the manifest is written last. A build that was killed at any byte is continued by running it
again: finished shards are kept, the rest is written as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.errors import UserError
from data_prep.files import atomic_path, atomic_write

MANIFEST_SUFFIX = ".manifest.json"
_KEY = re.compile(r"[^./\x00][^.\x00]*\Z")
_PREFIX = re.compile(r"[\w+-]+\Z")


@dataclass(frozen=True)
class Sample:
    """One sample on its way into a shard.

    Attributes:
        key: Unique name without a dot; becomes the stem of the member names.
        files: Extension without its dot -> content, e.g. `jpg`, `txt`, `json`.
    """

    key: str
    files: dict[str, bytes]

    @classmethod
    def of(
        cls,
        key: str,
        image: bytes,
        extension: str = "jpg",
        *,
        captions: Sequence[str] = (),
        label: int | None = None,
        **extra: Any,
    ) -> Sample:
        """Build a sample the way the reader expects it: image, first caption as txt, json."""
        record: dict[str, Any] = dict(extra)
        if captions:
            record["captions"] = list(captions)
        if label is not None:
            record["label"] = label
        files = {extension: image, "json": to_json(record)}
        text = captions[0] if captions else extra.get("name")
        if text is not None:
            files["txt"] = str(text).encode()
        return cls(key, files)


class ShardEntry(BaseModel):
    """What the manifest knows of one shard.

    `bytes` is the size of the tar file, `sha256` its hash ("" where unknown), `failures` counts
    the rows that did not become a sample, by reason.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    samples: int
    bytes: int
    sha256: str = ""
    failures: dict[str, int] = {}


class Manifest(BaseModel):
    """The contents of `PREFIX.manifest.json`: which shards make up a set, and from what."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    source: str = ""
    settings: dict[str, Any] = {}
    shards: list[ShardEntry] = []

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(entry.samples for entry in self.shards)

    @property
    def num_bytes(self) -> int:
        """Size of all tar files."""
        return sum(entry.bytes for entry in self.shards)

    @property
    def failures(self) -> dict[str, int]:
        """Rows that did not become samples, by reason, over all shards."""
        total: dict[str, int] = {}
        for entry in self.shards:
            for reason, count in entry.failures.items():
                total[reason] = total.get(reason, 0) + count
        return dict(sorted(total.items()))

    def dump(self) -> str:
        """Return the JSON text, the same for the same manifest, with the totals for readers."""
        record = self.model_dump()
        record["totals"] = {
            "samples": self.num_samples,
            "bytes": self.num_bytes,
            "failures": self.failures,
        }
        return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the manifest atomically."""
        atomic_write(path, self.dump())

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read a manifest file.

        Raises:
            UserError: the file is missing, is no JSON or no manifest of a known format.
        """
        path = Path(path)
        try:
            return cls.parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the manifest ({error})", where=str(path)) from error

    @classmethod
    def parse(cls, text: str, where: str) -> Manifest:
        """Read a manifest from its text; `where` names it in errors."""
        todo = "delete it and run `inherclip prepare scan` on the folder to write it anew"
        try:
            record = json.loads(text)
        except ValueError as error:
            raise UserError(f"the manifest is no JSON ({error})", where=where, todo=todo) from error
        if not isinstance(record, dict) or record.get("format") != 1:
            found = record.get("format") if isinstance(record, dict) else None
            raise UserError(f"manifest format {found!r} is unknown (1 is)", where=where, todo=todo)
        totals = record.pop("totals", None)
        try:
            manifest = cls.model_validate(record)
        except ValidationError as error:
            raise UserError(f"the manifest is damaged: {error}", where=where, todo=todo) from error
        if totals is not None and totals.get("samples") != manifest.num_samples:
            raise UserError(
                f"the manifest's total of {totals.get('samples')} samples is not the sum of its "
                f"shards, {manifest.num_samples}",
                where=where,
                todo=todo,
            )
        return manifest


def to_json(record: Any) -> bytes:
    """Serialise to compact JSON whose bytes depend on the content only."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode()


def shard_name(prefix: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{prefix}-{number:06d}.tar"


def manifest_path(folder: str | Path, prefix: str) -> Path:
    """Return where the manifest of a set lies."""
    return Path(folder) / f"{prefix}{MANIFEST_SUFFIX}"


class _Hashing:
    """A write-only file that hashes and counts what passes through it."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle, self.digest, self.count = handle, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.count += len(data)
        return self.handle.write(data)


def write_tar(
    samples: Iterable[Sample], path: Path, failures: dict[str, int] | None = None
) -> ShardEntry:
    """Write one shard atomically and return its manifest entry.

    Raises:
        UserError: a key that a WebDataset cannot hold or that comes twice, or a full disk.
    """
    with atomic_path(path) as temporary:
        entry = write_tar_file(samples, temporary, path.name)
    entry.failures = dict(sorted((failures or {}).items()))
    return entry


def write_tar_file(samples: Iterable[Sample], path: Path, name: str) -> ShardEntry:
    """Write one shard in place at `path`; the entry is made out to `name`.

    The bytes are those of `webdataset.TarWriter(mtime=0)` (a test compares them): no time, no
    machine, so identical samples give identical files. Its own import brings torch, 4 s and
    300 MB to each download process, which is why `tarfile` is called here directly.

    Raises:
        UserError: a key that a WebDataset cannot hold or that comes twice.
    """
    keys: set[str] = set()
    with path.open("wb") as handle:
        stream = _Hashing(handle)
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for sample in samples:
                _check_sample(sample, keys, name)
                _add_members(tar, sample, name)
    return ShardEntry(
        name=name, samples=len(keys), bytes=stream.count, sha256=stream.digest.hexdigest()
    )


def _add_members(tar: tarfile.TarFile, sample: Sample, name: str) -> None:
    for extension in sorted(sample.files):
        data = sample.files[extension]
        member = tarfile.TarInfo(f"{sample.key}.{extension}")
        member.size, member.mtime, member.mode = len(data), 0, 0o444
        member.uname, member.gname = "bigdata", "bigdata"  # as webdataset has them
        try:
            tar.addfile(member, io.BytesIO(data))
        except ValueError as error:  # a name longer than USTAR can hold
            raise UserError(f"cannot store {sample.key!r}: {error}", name) from error


def _check_sample(sample: Sample, keys: set[str], name: str) -> None:
    """Refuse what would be read back as another sample than was written."""
    where = f"{name}, sample {sample.key!r}"
    if not all(_KEY.match(part) for part in sample.key.split("/")):
        raise UserError("a key needs characters other than dots", where, "rename the sample")
    if sample.key in keys:
        raise UserError("the key comes twice", where, "make the keys of the source unique")
    if not sample.files:
        raise UserError("the sample has no files", where)
    for extension in sample.files:
        if not extension or extension != extension.lower() or extension[0] in "._":
            raise UserError(f"{extension!r} is no lower-case extension", where)
    keys.add(sample.key)


def write_shards(
    samples: Iterable[Sample],
    folder: str | Path,
    prefix: str,
    *,
    samples_per_shard: int = 1000,
    source: str = "",
    settings: dict[str, Any] | None = None,
) -> Manifest:
    """Write samples to `folder/PREFIX-000000.tar`, ... and `folder/PREFIX.manifest.json`.

    Killed at any time, the same call continues: shards that were finished under the same source
    and settings are kept. Where `samples` is a sequence, the samples of finished shards are not
    even asked for, so a sequence that makes its samples on access resumes cheaply. What an
    earlier build with other settings left under this prefix is replaced.

    Args:
        samples: In their final order; keys unique over the whole set.
        folder: Created where missing.
        prefix: Letters, digits, `-`, `_` and `+`.
        samples_per_shard: Samples of every shard but the last.
        source: Where the samples come from, for the manifest.
        settings: What determined the samples, JSON-able, for the manifest.

    Raises:
        UserError: no samples, an unusable or repeated key, a full disk.
    """
    if not _PREFIX.match(prefix):
        raise UserError(f"{prefix!r} is no shard prefix", todo="use letters, digits, - and _")
    if samples_per_shard < 1:
        raise UserError("samples_per_shard must be at least 1", todo="1000 to 10000 is usual")
    folder = Path(folder)
    identity = json.loads(
        to_json({"source": source, "settings": settings or {}, "per_shard": samples_per_shard})
    )
    progress = _Progress(folder, prefix, identity)
    final = manifest_path(folder, prefix)
    entries: list[ShardEntry] = []
    keys: set[str] = set()
    for number, group in enumerate(_groups(samples, samples_per_shard, progress.done(final))):
        if isinstance(group, ShardEntry):
            entries.append(group)
            continue
        for sample in group:
            if sample.key in keys:
                raise UserError(f"the key {sample.key!r} comes twice", f"{folder}/{prefix}")
            keys.add(sample.key)
        entries.append(write_tar(group, folder / shard_name(prefix, number)))
        progress.save(entries)
    if not entries:
        raise UserError("there are no samples to write", where=f"{folder}/{prefix}")
    _remove_stale(folder, prefix, len(entries))
    manifest = Manifest(source=source, settings=identity["settings"], shards=entries)
    manifest.save(final)
    progress.path.unlink(missing_ok=True)
    return manifest


def _groups(
    samples: Iterable[Sample], size: int, done: Sequence[ShardEntry]
) -> Iterator[ShardEntry | list[Sample]]:
    """Yield per shard its samples, or its entry where it need not be written again."""
    start = 0
    if isinstance(samples, Sequence):
        for entry in done:
            # A shorter last shard is only final if the sequence really ends there.
            if entry.samples != min(size, len(samples) - start):
                break
            yield entry
            start += entry.samples
    rest: Iterable[Sample] = samples
    if isinstance(samples, Sequence):
        rest = (samples[i] for i in range(start, len(samples)))
    group: list[Sample] = []
    for sample in rest:
        group.append(sample)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class _Progress:
    """The finished shards of a build under way, so that the next attempt can continue it."""

    def __init__(self, folder: Path, prefix: str, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.path = folder / f".{prefix}.progress.json"

    def done(self, final: Path) -> list[ShardEntry]:
        """Return the leading shards that are finished and still whole, then forget the manifest.

        A manifest beside shards that are being rewritten would vouch for the wrong bytes.
        """
        entries: list[ShardEntry] = []
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            if record["identity"] == self.identity:
                entries = [ShardEntry.model_validate(entry) for entry in record["shards"]]
        except (OSError, ValueError, KeyError, TypeError):
            entries = []  # no build under way, or a record nobody can read: start over
        final.unlink(missing_ok=True)
        whole: list[ShardEntry] = []
        for entry in entries:
            path = self.folder / entry.name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                break
            whole.append(entry)
        return whole

    def save(self, entries: list[ShardEntry]) -> None:
        record = {"identity": self.identity, "shards": [entry.model_dump() for entry in entries]}
        atomic_write(self.path, to_json(record))


def _remove_stale(folder: Path, prefix: str, count: int) -> None:
    """Remove what an earlier, longer or killed build left under the same prefix."""
    name = re.compile(re.escape(prefix) + r"-(\d{6,})\.tar\Z")
    part = r"(-\d{6,}\.tar|\.manifest\.json|\.progress\.json)"
    temporary = re.compile(r"\.{1,2}" + re.escape(prefix) + part + r"\.[0-9a-f]{8}\.tmp\Z")
    for path in folder.iterdir():
        match = name.match(path.name)
        if (match and int(match[1]) >= count) or temporary.match(path.name):
            path.unlink()
