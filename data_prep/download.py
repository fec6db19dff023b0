"""A caption frame with URLs or paths in, checked shards out: concurrent, polite, resumable.

Each process works on some shards at a time with its own threads. A shard is finished when its
`stats.json` is there; the manifest is written when all shards are. What was killed is continued
by the same command, shard by shard.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep.addresses import AddressPolicy
from data_prep.captions import CaptionTable
from data_prep.download_shard import SETTLED, ShardFiles, ShardTask, StoreSettings
from data_prep.download_workers import Jobs, run_all
from data_prep.errors import UserError
from data_prep.fetch import FetchSettings
from data_prep.files import atomic_write, explain_full_disk
from data_prep.images import near_pairs
from data_prep.shards import Manifest, ShardEntry, manifest_path, shard_name, to_json

_LOCK_ATTEMPTS = 15


@dataclass(frozen=True)
class DownloadPlan:
    """What to download and how.

    Attributes:
        table: Captions with a `url` column, or a `path` column for files that are here already.
        folder: Where the shards go.
        prefix: Shards are `PREFIX-000000.tar`, ...
        rows_per_shard: Rows of the caption list per shard (dead links make shards smaller).
        fetch: Bounds of the network.
        store: How samples are stored.
        processes: Worker processes; 1 stays in this one.
        threads: Per process.
        part: (i, n): only shards i, i + n, ... for the i-th of n jobs of an array, i from 0.
        retry_failed: Also ask again for the failed rows of finished shards.
    """

    table: CaptionTable
    folder: Path
    prefix: str
    rows_per_shard: int = 5000
    fetch: FetchSettings = field(default_factory=FetchSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    processes: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    threads: int = 64
    part: tuple[int, int] = (0, 1)
    retry_failed: bool = False

    @property
    def num_shards(self) -> int:
        """Shards of the whole set, over all parts."""
        return -(-len(self.table) // self.rows_per_shard)

    def identity(self) -> dict[str, Any]:
        """What determines the bytes of the set; where it lies or how it is fetched does not."""
        return {
            "rows": len(self.table),
            "captions_sha256": self._captions_sha256(),
            "rows_per_shard": self.rows_per_shard,
            "respect_opt_out": self.fetch.respect_opt_out,
            "max_bytes": self.fetch.max_bytes,
            **json.loads(self.store.model_dump_json()),
        }

    def _captions_sha256(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, len(self.table), 1 << 16):
            part = self.table.frame.iloc[start : start + (1 << 16)]
            lists = [list(texts) for texts in part["captions"]]
            digest.update(
                to_json([part["key"].tolist(), part[self.table.location].tolist(), lists])
            )
        return digest.hexdigest()

    def task(self, number: int) -> ShardTask:
        """Return the rows of one shard."""
        part = self.table.frame.iloc[
            number * self.rows_per_shard : (number + 1) * self.rows_per_shard
        ]
        return ShardTask(
            shard_name(self.prefix, number),
            part["key"].tolist(),
            part[self.table.location].tolist(),
            [list(texts) for texts in part["captions"]],
            retry=ShardFiles(self.folder, shard_name(self.prefix, number)).stats.is_file(),
        )


@dataclass(frozen=True)
class DownloadResult:
    """What a run ended with.

    Attributes:
        manifest: Of the whole set, None while other parts are unfinished.
        entries: Of the shards of this part.
        worked: Shards that were downloaded or retried by this run.
        missing: Shards of other parts that are not finished.
    """

    manifest: Manifest | None
    entries: list[ShardEntry]
    worked: int
    missing: int


class Progress:
    """Receives the state of a running download; the command line shows it."""

    def start(self, rows: int) -> None:
        """Announce how many rows will be asked for."""

    def update(self, rows: int, ok: int, stored: int) -> None:
        """Report rows finished, rows that gave a sample, and bytes stored, so far."""


def download(plan: DownloadPlan, progress: Progress | None = None) -> DownloadResult:
    """Download the shards of a plan's part, or continue doing so.

    Raises:
        UserError: the folder holds something else, another run works in it, the disk is full,
            or a worker process was killed.
    """
    progress = progress or Progress()
    AddressPolicy(plan.fetch.allow_private)  # a mistake in it is said before anything is done
    index, parts = plan.part
    if not 0 <= index < parts:
        raise UserError(f"slice {index}/{parts} does not exist", todo=f"use 0/{parts} and so on")
    with explain_full_disk(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
        with _locked(plan.folder / f".{plan.prefix}.slice-{index}-of-{parts}.lock"):
            if parts == 1:  # nobody else writes here: what a killed run began is of no use
                for path in plan.folder.glob(f".*{plan.prefix}*.tmp"):
                    path.unlink(missing_ok=True)
            identity = plan.identity()
            _check_identity(plan, identity)
            return _download_part(plan, identity, progress)


def _download_part(
    plan: DownloadPlan, identity: dict[str, Any], progress: Progress
) -> DownloadResult:
    index, parts = plan.part
    todo, done, rows = [], {}, 0
    for number in range(index, plan.num_shards, parts):
        files = ShardFiles(plan.folder, shard_name(plan.prefix, number))
        files.recover()
        entry = files.entry()
        failed = 0 if entry is None else _retriable(entry)
        if entry is None or (plan.retry_failed and failed):
            todo.append(number)
            size = min(plan.rows_per_shard, len(plan.table) - number * plan.rows_per_shard)
            rows += size if entry is None else failed
        if entry is not None:
            done[number] = entry
    if todo:
        # A manifest beside shards that are being changed would vouch for the wrong bytes.
        manifest_path(plan.folder, plan.prefix).unlink(missing_ok=True)
        progress.start(rows)
        jobs = Jobs(
            plan.folder, plan.fetch, plan.store, plan.processes, plan.threads,
            local=plan.table.location == "path",
        )  # fmt: skip
        done.update(run_all(jobs, todo, plan.task, progress.update))
    manifest, missing = _finish(plan, identity)
    return DownloadResult(manifest, [done[n] for n in sorted(done)], len(todo), missing)


def _retriable(entry: ShardEntry) -> int:
    return sum(count for status, count in entry.failures.items() if status not in SETTLED)


def _check_identity(plan: DownloadPlan, identity: dict[str, Any]) -> None:
    """Refuse to mix two sets under one prefix."""
    path = plan.folder / f".{plan.prefix}.plan.json"
    if not path.exists():
        if manifest_path(plan.folder, plan.prefix).exists():
            raise UserError(
                f"the folder already holds a set called {plan.prefix!r} from another source",
                where=str(plan.folder),
                todo="choose another --out or --prefix",
            )
        atomic_write(path, to_json(identity))
        return
    try:
        before = json.loads(path.read_text("utf-8"))
    except ValueError:
        before = {}
    if before != identity:
        changed = [key for key in identity if before.get(key) != identity[key]]
        raise UserError(
            f"the folder holds shards that were made with other {', '.join(changed)}",
            where=str(plan.folder),
            todo="repeat the command as it was, choose another --out or --prefix, or delete the "
            f"{plan.prefix}-* files and {path.name} to start over",
        )


def _finish(plan: DownloadPlan, identity: dict[str, Any]) -> tuple[Manifest | None, int]:
    """Write the manifest if all shards of all parts are finished."""
    entries = [
        ShardFiles(plan.folder, shard_name(plan.prefix, number)).entry()
        for number in range(plan.num_shards)
    ]
    whole = [entry for entry in entries if entry is not None]
    if len(whole) < len(entries):
        return None, len(entries) - len(whole)
    settings = {**identity, "dropped_captions": plan.table.dropped}
    manifest = Manifest(source=Path(plan.table.source).name, settings=settings, shards=whole)
    path = manifest_path(plan.folder, plan.prefix)
    if plan.store.near_duplicates:
        _flag_near_duplicates(plan)
    if not path.exists() or path.read_text("utf-8") != manifest.dump():
        manifest.save(path)
    return manifest, 0


def _flag_near_duplicates(plan: DownloadPlan) -> None:
    """List images of the set that look like an earlier one, in `PREFIX.near-duplicates.csv`."""
    frames = [
        ShardFiles(plan.folder, shard_name(plan.prefix, n)).read_rows()[["key", "status", "phash"]]
        for n in range(plan.num_shards)
    ]
    rows = pd.concat(frames, ignore_index=True)
    rows = rows[(rows["status"] == "ok") & rows["phash"].notna()].reset_index(drop=True)
    keys = rows["key"].tolist()
    lines = ["key,near_duplicate_of,differing_bits"]
    pairs = near_pairs(rows["phash"].to_numpy(dtype="uint64"))
    lines += [f"{keys[later]},{keys[earlier]},{gap}" for later, earlier, gap in pairs]
    path = plan.folder / f"{plan.prefix}.near-duplicates.csv"
    atomic_write(path, "\n".join(lines) + "\n")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep a second run of the same part out; the lock falls with the process that holds it."""
    with path.open("w") as handle:
        # A run that was just killed may have a process left for a moment that holds it.
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt < _LOCK_ATTEMPTS - 1:
                    time.sleep(0.2)
            except OSError as error:  # Lustre without the flock option, some NFS
                warnings.warn(
                    f"{path.parent} cannot lock files ({error.strerror}): make sure that no second "
                    "run works on the same slice",
                    stacklevel=2,
                )
                break
        else:
            raise UserError(
                "another run is working on the same slice of this folder",
                where=str(path.parent),
                todo="wait for it, or give the jobs of an array different slices",
            )
        yield
