"""One shard's rows in, its tar, `rows.parquet` and `stats.json` out, all three or none."""

from __future__ import annotations

import json
import random
import threading
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict

from data_prep.errors import UserError
from data_prep.fetch import Fetcher, FetchError, FileReader
from data_prep.files import atomic_write, explain_full_disk, sha256_file, sync
from data_prep.images import (
    ImageFaultError,
    ImageSettings,
    decode_rgb,
    perceptual_hash,
    store_image,
)
from data_prep.queueing import HostSlots, RowQueue
from data_prep.shards import Sample, ShardEntry, to_json, write_tar_file
from data_prep.tar_index import parse_members, sample_bounds, split_name

# Rows in these states are not asked for again: what they have will not change, or they said no.
SETTLED = frozenset({"ok", "duplicate", "opted_out"})


class StoreSettings(BaseModel):
    """What determines the samples of a downloaded set; kept in its manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: ImageSettings = ImageSettings()
    keep_duplicates: bool = False
    near_duplicates: bool = False


@dataclass(frozen=True)
class ShardTask:
    """One shard to download: its name and the captions of its rows, in order."""

    name: str
    keys: list[str]
    urls: list[str]
    captions: list[list[str]]
    retry: bool = False


@dataclass
class Row:
    """What became of one row; the columns of `rows.parquet`."""

    key: str
    url: str
    status: str = "pending"
    detail: str = ""
    attempts: int = 0
    width: int = 0
    height: int = 0
    original_width: int = 0
    original_height: int = 0
    sha256: str = ""
    phash: int | None = None
    tries: int = field(default=0, repr=False)  # in this run; `attempts` counts all runs
    sample: Sample | None = field(default=None, repr=False)


COLUMNS = [name for name in Row.__dataclass_fields__ if name not in ("sample", "tries")]


@dataclass(frozen=True)
class ShardFiles:
    """The files of one shard. `stats` is written last and means that the others are whole."""

    folder: Path
    name: str

    @property
    def tar(self) -> Path:
        """The samples."""
        return self.folder / self.name

    @property
    def rows(self) -> Path:
        """A line per row of the caption list."""
        return self.tar.with_suffix(".rows.parquet")

    @property
    def stats(self) -> Path:
        """The shard's manifest entry and the hash of its rows."""
        return self.tar.with_suffix(".stats.json")

    def fresh(self, path: Path) -> Path:
        """Where the next version of a file waits until all are written."""
        return path.parent / f".{path.name}.new"

    def recover(self) -> None:
        """Finish or forget what a killed process left: all three files change, or none does."""
        files = (self.tar, self.rows, self.stats)
        if self.fresh(self.stats).exists():
            for path in files:
                if self.fresh(path).exists():
                    self.fresh(path).replace(path)
        else:
            for path in files:
                self.fresh(path).unlink(missing_ok=True)
            for path in self.folder.glob(f".{self.stats.name}.new.*.tmp"):
                path.unlink(missing_ok=True)
            for path in self.folder.glob(f"..{self.stats.name}.new.*.tmp"):
                path.unlink(missing_ok=True)

    def entry(self) -> ShardEntry | None:
        """Return the manifest entry of a finished shard, None where there is none yet.

        Raises:
            UserError: the tar is not the one that was finished.
        """
        if not self.stats.is_file():
            return None
        try:
            record = json.loads(self.stats.read_text("utf-8"))
            entry = ShardEntry.model_validate(record["entry"])
        except (ValueError, KeyError) as error:
            raise UserError(
                f"damaged: {error}", str(self.stats), "delete it; the shard is then redone"
            ) from error
        if not self.tar.is_file() or self.tar.stat().st_size != entry.bytes:
            raise UserError(
                "the shard is missing or not the one that was finished",
                where=str(self.tar),
                todo=f"delete {self.stats.name}; the same command then makes the shard again",
            )
        return entry

    def read_rows(self) -> pd.DataFrame:
        """Return `rows.parquet`."""
        return pd.read_parquet(self.rows)


class ShardDownloader:
    """Downloads shards with one set of threads each; one of these per process.

    Args:
        folder: Where the shards go.
        fetcher: Shared by all shards of the process.
        store: How samples are stored.
        slots: Places per host, shared by all processes.
        counters: Shared integers [rows finished, rows ok, bytes stored], for the progress bar.
        threads: Per shard.
    """

    def __init__(
        self,
        folder: Path,
        fetcher: Fetcher | FileReader,
        store: StoreSettings,
        slots: HostSlots,
        counters: Any,
        threads: int,
    ) -> None:
        self.folder, self.fetcher, self.store = folder, fetcher, store
        self.slots, self.counters, self.threads = slots, counters, threads

    def run(self, task: ShardTask) -> ShardEntry:
        """Download one shard, or the failed rows of a finished one, and put it in place."""
        files = ShardFiles(self.folder, task.name)
        rows = [Row(key, url) for key, url in zip(task.keys, task.urls, strict=True)]
        if task.retry:
            self._load_finished(files, rows)
        wanted = [number for number, row in enumerate(rows) if row.status == "pending"]
        self._fetch_all(rows, wanted, task.captions)
        if not self.store.keep_duplicates:
            mark_duplicates(rows)
        return self._commit(files, rows)

    def _load_finished(self, files: ShardFiles, rows: list[Row]) -> None:
        """Take over the rows of a finished shard that need no further attempt."""
        frame = files.read_rows()
        if list(frame["key"]) != [row.key for row in rows]:
            raise UserError(
                "the shard was made from other captions",
                where=str(files.rows),
                todo="give the caption list it was made from, or another --out",
            )
        samples = read_samples(files.tar)
        for row, record in zip(rows, frame.to_dict("records"), strict=True):
            row.attempts = int(record["attempts"])
            if record["status"] in SETTLED:
                for name in COLUMNS:
                    setattr(row, name, None if pd.isna(record[name]) else record[name])
                row.sample = samples.get(row.key)

    def _fetch_all(self, rows: list[Row], wanted: list[int], captions: list[list[str]]) -> None:
        hosts = [urllib.parse.urlsplit(rows[i].url).netloc.lower() for i in wanted]
        queue = RowQueue(hosts, self.slots)
        faults: list[BaseException] = []

        def work() -> None:
            try:
                while (place := queue.take()) is not None:
                    number = wanted[place]
                    self._attempt(queue, place, rows[number], captions[number])
            except BaseException as error:  # a fault of ours must not leave the others waiting
                faults.append(error)
                with queue.changed:
                    queue.open = 0
                    queue.changed.notify_all()

        threads = [
            threading.Thread(target=work, daemon=True)
            for _ in range(min(self.threads, len(wanted)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]

    def _attempt(self, queue: RowQueue, place: int, row: Row, captions: list[str]) -> None:
        """Ask for one row once; a passing fault sends it back into the queue."""
        settings = self.fetcher.settings
        row.attempts += 1
        row.tries += 1
        try:
            self._store(row, self.fetcher.fetch(row.url), captions)
        except FetchError as error:
            row.status, row.detail = error.status, error.detail[:200]
            wait = error.wait
            if wait is None:
                # Half of it by chance, so that rows that failed together do not return together.
                wait = settings.backoff * 2 ** (row.tries - 1) * (0.5 + random.random() / 2)
            if error.passing and row.tries <= settings.retries and wait <= settings.max_wait:
                queue.again(place, wait, pause_host=error.wait is not None)
                return
        except ImageFaultError as error:
            row.status, row.detail = error.reason, error.detail[:200]
        queue.finish(place)
        with self.counters.get_lock():
            self.counters[0] += 1
            self.counters[1] += row.status == "ok"
            self.counters[2] += len(row.sample.files["jpg"]) if row.sample else 0

    def _store(self, row: Row, data: bytes, captions: list[str]) -> None:
        image = store_image(data, self.store.image)
        row.width, row.height = image.width, image.height
        row.original_width, row.original_height = image.original_width, image.original_height
        row.sha256, row.status, row.detail = image.sha256, "ok", ""
        if self.store.near_duplicates:
            row.phash = perceptual_hash(decode_rgb(image.data))
        row.sample = Sample.of(
            row.key,
            image.data,
            captions=captions,
            url=row.url,
            width=image.width,
            height=image.height,
            original_width=image.original_width,
            original_height=image.original_height,
            sha256=image.sha256,
        )

    def _commit(self, files: ShardFiles, rows: list[Row]) -> ShardEntry:
        """Write the three files beside their places; once the last is whole, put them there."""
        files.recover()
        failures: dict[str, int] = {}
        for row in rows:
            if row.status != "ok":
                failures[row.status] = failures.get(row.status, 0) + 1
        samples = [row.sample for row in rows if row.status == "ok" and row.sample]
        with explain_full_disk(files.tar):
            entry = write_tar_file(samples, files.fresh(files.tar), files.name)
            entry.failures = dict(sorted(failures.items()))
            frame = pd.DataFrame([[getattr(row, name) for name in COLUMNS] for row in rows])
            frame.columns = pd.Index(COLUMNS)
            frame["phash"] = frame["phash"].astype("UInt64")
            frame.to_parquet(files.fresh(files.rows), index=False)
            sync(files.fresh(files.tar))
            sync(files.fresh(files.rows))
        record = {
            "entry": entry.model_dump(),
            "rows": len(rows),
            "rows_sha256": sha256_file(files.fresh(files.rows)),
        }
        atomic_write(files.fresh(files.stats), to_json(record))
        files.recover()
        return entry


def mark_duplicates(rows: list[Row]) -> None:
    """Mark rows whose image has the very bytes of an earlier one in the shard.

    "This picture is no longer available" comes as the same file from thousands of dead links.
    """
    first: dict[str, str] = {}
    for row in rows:
        if row.status not in ("ok", "duplicate") or not row.sha256:
            continue
        other = first.setdefault(row.sha256, row.key)
        if other != row.key:
            row.status, row.detail, row.sample = "duplicate", f"of {other}", None


def read_samples(path: Path) -> dict[str, Sample]:
    """Return the samples of a shard by key."""
    bounds = sample_bounds(path)
    data = path.read_bytes()
    samples = {}
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        part, files, key = data[begin:end], {}, ""
        for member in parse_members(part):
            key, extension = split_name(member.name)
            files[extension] = part[member.offset : member.offset + member.size]
        samples[key] = Sample(key, files)
    return samples
