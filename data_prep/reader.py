"""Shards in, samples out: one path for training and evaluation.

Uncompressed tars are read by offset, so a sample is reached by its number alone, and order,
ranks, workers and resuming are arithmetic on numbers instead of state kept in pipelines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from data_prep import counts, locations, tar_index
from data_prep.errors import UserError
from data_prep.samples import CorruptionBudget, CorruptSampleError, RawSample
from data_prep.shards import ShardEntry

__all__ = ["BatchSchedule", "CorruptSampleError", "CorruptionBudget", "RawSample", "ShardSet"]

MAX_OPEN = 64  # per process; a window of shards is far smaller, the usual limit of 1024 far larger


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
