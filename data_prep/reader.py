"""Shards in, samples out: one path for training and evaluation.

Uncompressed tars are read by offset, so a sample is reached by its number alone, and order,
ranks, workers and resuming are arithmetic on numbers instead of state kept in pipelines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from data_prep import counts, locations, tar_index
from data_prep.errors import UserError
from data_prep.shards import ShardEntry

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
MAX_OPEN = 64  # per process; a window of shards is far smaller, the usual limit of 1024 far larger


class CorruptSampleError(ValueError):
    """A sample that is there but unusable; `CorruptionBudget` decides whether that ends the run."""


@dataclass(frozen=True)
class RawSample:
    """One sample as its shard holds it, undecoded.

    Attributes:
        key: The sample's name.
        files: Extension without its dot -> content.
        shard: File name of the shard, for messages.
    """

    key: str
    files: dict[str, bytes] = field(repr=False)
    shard: str

    def _corrupt(self, what: str) -> CorruptSampleError:
        return CorruptSampleError(f"{self.shard}, sample {self.key!r}: {what}")

    @property
    def image_extension(self) -> str:
        """Extension of the image, "" where there is none."""
        return next((name for name in IMAGE_EXTENSIONS if name in self.files), "")

    @property
    def image_bytes(self) -> bytes:
        """The encoded image.

        Raises:
            CorruptSampleError: the sample has no image or an empty one.
        """
        data = self.files.get(self.image_extension, b"")
        if not data:
            raise self._corrupt("no image")
        return data

    @cached_property
    def record(self) -> dict[str, Any]:
        """The sample's json, empty where it has none.

        Raises:
            CorruptSampleError: the json cannot be read.
        """
        if "json" not in self.files:
            return {}
        try:
            record = json.loads(self.files["json"])
        except ValueError as error:
            raise self._corrupt(f"unreadable json ({error})") from None
        if not isinstance(record, dict):
            raise self._corrupt("the json is no object")
        return record

    @property
    def captions(self) -> list[str]:
        """The captions: `captions` of the json, else the txt, else the json's `caption`.

        Raises:
            CorruptSampleError: there is none, or all are empty.
        """
        found = self.record.get("captions")
        if found is None and "txt" in self.files:
            try:
                found = [self.files["txt"].decode("utf-8")]
            except UnicodeDecodeError:
                raise self._corrupt("the txt is not UTF-8") from None
        if found is None:
            found = [self.record.get("caption")]
        if not isinstance(found, list):
            raise self._corrupt("`captions` is no list")
        texts = [text.strip() for text in found if isinstance(text, str) and text.strip()]
        if not texts:
            raise self._corrupt("no caption")
        return texts

    @property
    def label(self) -> int | None:
        """The class: `label` of the json, else the cls file, else None.

        Raises:
            CorruptSampleError: there is one that is no whole number.
        """
        found = self.record.get("label")
        if found is None and "cls" in self.files:
            found = self.files["cls"].decode("ascii", "replace").strip()
        try:
            return None if found is None else int(found)
        except (TypeError, ValueError):
            raise self._corrupt(f"label {found!r} is no number") from None


class ShardSet:
    """The samples of a list of shards, by number.

    Picklable: a worker process opens the files it reads itself.

    Attributes:
        shards: What is known of each shard, in order.
        num_samples: Samples in all of them.
        fingerprint: Changes with any name, count, size or known hash; kept with checkpoints so
            that a resumed run notices other data.
    """

    def __init__(
        self,
        paths: Sequence[str],
        entries: Sequence[ShardEntry],
        *,
        cache: Path | None = None,
        bounds: dict[int, np.ndarray] | None = None,
    ) -> None:
        """Use `find` instead, which counts and checks."""
        self.shards = tuple(entries)
        self._paths = tuple(paths)
        self._cache = cache or locations.default_cache()
        self._starts = np.cumsum([0, *(entry.samples for entry in entries)], dtype=np.int64)
        self.num_samples = int(self._starts[-1])
        known = [[e.name, e.samples, e.bytes, e.sha256] for e in entries]
        self.fingerprint = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        self._bounds: dict[int, np.ndarray] = dict(bounds or {})
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    @classmethod
    def find(
        cls,
        root: str | Path,
        pattern: str | list[str],
        *,
        allow_pipe: bool = False,
        cache: str | Path | None = None,
    ) -> ShardSet:
        """Find shards and how many samples each holds.

        Counts come from a manifest beside the shards (sizes are compared), else from scanning
        the headers of the tars. A shard that its manifest knows to be empty (every download
        failed) is left out.

        Args:
            root: Folder, or URL of any fsspec protocol (`s3://`, `https://`, `hf://`, ...).
            pattern: Braces, globs or names below `root`, or a list of these.
            allow_pipe: Whether `pipe:COMMAND` may run.
            cache: Where copies of remote shards are kept.

        Raises:
            UserError: a missing folder or shard, no match, an empty or damaged shard, or one
                whose size is not the manifest's.
        """
        found = locations.expand(root, pattern, allow_pipe=allow_pipe)
        folder = Path(cache) if cache else locations.default_cache()
        known = counts.known_counts(found)
        paths: list[str] = []
        entries: list[ShardEntry] = []
        bounds: dict[int, np.ndarray] = {}
        for location in found:
            entry = known.get(location)
            if entry is None:
                path = locations.local_path(location, folder)
                offsets = tar_index.sample_bounds(path)
                entry = ShardEntry(
                    name=location.rsplit("/", 1)[-1],
                    samples=len(offsets) - 1,
                    bytes=path.stat().st_size,
                )
                if not entry.samples:
                    raise UserError("the shard holds no samples", where=location)
                bounds[len(paths)] = offsets
            if entry.samples:
                paths.append(location)
                entries.append(entry)
        if not paths:
            raise UserError("all of the shards are empty", where=f"{root} {pattern}")
        return cls(paths, entries, cache=folder, bounds=bounds)

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_bounds": {}}

    def locate(self, index: int) -> tuple[int, int]:
        """Return the shard and the position in it of a sample number.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def read(self, index: int) -> RawSample:
        """Return a sample by its number in shard order.

        Raises:
            IndexError: there is no such sample.
            UserError: its shard cannot be read or no longer is what was found at the start.
            CorruptSampleError: the sample's part of the tar is damaged.
        """
        shard, position = self.locate(index)
        handle = self._open(shard)
        begin, end = (int(x) for x in self._bounds[shard][position : position + 2])
        data = os.pread(handle.fileno(), end - begin, begin)
        name = self.shards[shard].name
        if len(data) != end - begin:
            raise UserError("the shard became shorter while it was read", self._paths[shard])
        try:
            members = list(tar_index.parse_members(data))
        except tar_index.TarDamageError as error:
            raise CorruptSampleError(f"{name}, sample {position}: {error}") from None
        key, files = "", {}
        for member in members:
            stem, extension = tar_index.split_name(member.name)
            if stem:
                key = stem
                files[extension] = data[member.offset : member.offset + member.size]
        return RawSample(key, files, name)

    def _open(self, shard: int) -> BinaryIO:
        """Return the open file of a shard, its offsets at hand; the least used one is let go."""
        handle = self._files.get(shard)
        if handle is None:
            path = locations.local_path(self._paths[shard], self._cache)
            if shard not in self._bounds:
                self._bounds[shard] = self._checked_bounds(shard, path)
            handle = path.open("rb", buffering=0)
            self._files[shard] = handle
            while len(self._files) > MAX_OPEN:
                # Not closed here: another thread may be reading; it closes with its last user.
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(shard)
        return handle

    def _checked_bounds(self, shard: int, path: Path) -> np.ndarray:
        bounds, entry = tar_index.sample_bounds(path), self.shards[shard]
        if len(bounds) - 1 != entry.samples or path.stat().st_size != entry.bytes:
            raise UserError(
                f"the shard holds {len(bounds) - 1} samples in {path.stat().st_size} bytes, "
                f"expected were {entry.samples} in {entry.bytes}",
                where=self._paths[shard],
                todo="run `inherclip verify` on the folder; a remote shard that changed is "
                f"fetched again after deleting {path.parent}"
                if locations.is_remote(self._paths[shard])
                else "run `inherclip verify` on the folder",
            )
        return bounds

    def epoch_order(self, seed: int, epoch: int, window: int = 8) -> np.ndarray:
        """Return the shuffled order of one epoch, the same for the same seed and epoch.

        Shards are shuffled, then the samples within each `window` of consecutive shards, so that
        few shards are read at a time.

        Returns:
            int64 [num_samples], a permutation.
        """
        if window < 1:
            raise UserError("the shuffle window must be at least 1 shard")
        # Raw generator output is what numpy promises to keep between versions; `permutation`
        # is not, and a resumed run must find the order it left.
        bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))

        def shuffled(values: np.ndarray) -> np.ndarray:
            ranks = np.atleast_1d(bits.random_raw(len(values)))
            return values[np.argsort(ranks, kind="stable")]

        shards = shuffled(np.arange(len(self.shards)))
        parts = []
        for start in range(0, len(shards), window):
            group = [
                np.arange(self._starts[shard], self._starts[shard + 1], dtype=np.int64)
                for shard in shards[start : start + window]
            ]
            parts.append(shuffled(np.concatenate(group)))
        return np.concatenate(parts)


class BatchSchedule:
    """Which samples each rank gets in each step: a function of its arguments and nothing else.

    Step t of an epoch takes `order[t * B : (t + 1) * B]` with B = batch_size * world_size, and
    each rank its slice of that, so that for an equal B the ranks together see the same samples
    whatever their number. All ranks have equally many full batches, so none waits for another.

    Attributes:
        batches_per_epoch: Steps per epoch.
        dropped_per_epoch: Samples that an epoch leaves out (`tail="drop"`; others each epoch
            when shuffled).
        padded_per_epoch: Samples that an epoch repeats from its own beginning (`tail="pad"`).
    """

    def __init__(
        self,
        shards: ShardSet,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        tail: Literal["drop", "pad"] = "drop",
        window: int = 8,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch size {batch_size}, rank {rank} of {world_size}")
        if tail not in ("drop", "pad"):
            raise ValueError(f"tail {tail!r} is neither 'drop' nor 'pad'")
        self.shards, self.batch_size, self.rank, self.world_size = (
            shards, batch_size, rank, world_size,
        )  # fmt: skip
        self.seed, self.shuffle, self.window = seed, shuffle, window
        total = batch_size * world_size
        whole, rest = divmod(shards.num_samples, total)
        padded = tail == "pad" and rest > 0
        self.batches_per_epoch = whole + padded
        self.dropped_per_epoch = 0 if tail == "pad" else rest
        self.padded_per_epoch = total - rest if padded else 0
        if not self.batches_per_epoch:
            raise UserError(
                f"{shards.num_samples} samples do not fill one global batch of {total} "
                f"({batch_size} on each of {world_size} ranks)",
                todo="use a smaller batch size or more data",
            )

    def order(self, epoch: int) -> np.ndarray:
        """Return the sample numbers of an epoch over all ranks, tail dropped or padded.

        Returns:
            int64 [batches_per_epoch * batch_size * world_size].
        """
        if self.shuffle:
            order = self.shards.epoch_order(self.seed, epoch, self.window)
        else:
            order = np.arange(self.shards.num_samples, dtype=np.int64)
        return np.resize(order, self.batches_per_epoch * self.batch_size * self.world_size)

    def batches(self, start: int = 0) -> Iterator[list[int]]:
        """Yield this rank's batches for ever, epoch after epoch, from global batch `start` on."""
        total = self.batch_size * self.world_size
        epoch, step = divmod(start, self.batches_per_epoch)
        while True:
            order = self.order(epoch)
            for number in range(step, self.batches_per_epoch):
                begin = number * total + self.rank * self.batch_size
                yield order[begin : begin + self.batch_size].tolist()
            epoch, step = epoch + 1, 0


class CorruptionBudget:
    """Counts corrupt samples and ends the run where they are more than a share of all.

    One bad sample must not end a night's training, and a broken data set must not be trained on.

    Args:
        share: Greatest tolerated share of corrupt samples, 0 to 1.
        grace: Samples before the share is judged; up to then `share * grace` may be corrupt.
    """

    def __init__(self, share: float = 0.01, grace: int = 1000) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"the share of corrupt samples is {share}, it must lie in 0 to 1")
        self.share, self.grace = share, grace
        self.seen, self.corrupt = 0, 0
        self.examples: list[str] = []

    def count(self, seen: int, corrupt: Iterable[str] = ()) -> None:
        """Add samples read, and the messages of those among them that were corrupt.

        Raises:
            UserError: more than the tolerated share was corrupt.
        """
        self.seen += seen
        for message in corrupt:
            self.corrupt += 1
            if len(self.examples) < 5:
                self.examples.append(message)
        if self.corrupt > self.share * max(self.seen, self.grace):
            raise UserError(
                f"{self.corrupt} of {self.seen} samples are corrupt, more than the tolerated "
                f"{self.share:.2%}: {'; '.join(self.examples)}",
                todo="run `inherclip verify --repair` on the shards, or raise the tolerated share",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, JSON-able."""
        return {"seen": self.seen, "corrupt": self.corrupt, "examples": list(self.examples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the counts of `state_dict`."""
        self.seen, self.corrupt = int(state["seen"]), int(state["corrupt"])
        self.examples = list(state["examples"])
