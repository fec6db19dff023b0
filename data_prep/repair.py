"""Rewrites shards without their broken samples and brings the manifests up to date."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.files import atomic_write, sha256_file
from data_prep.shards import Manifest, Sample, ShardEntry, to_json, write_tar
from data_prep.tar_index import BLOCK, TarDamageError, find_header, parse_members, split_name
from data_prep.verify import Verification
from data_prep.verify_shard import ShardReport

# Faults that only the manifest has: its entry is written anew from the shard.
_ENTRY_FAULTS = frozenset({"bytes", "samples", "checksum", "unlisted"})
# Faults that nothing here can mend.
_BEYOND = frozenset(
    {"missing", "unreadable", "compressed", "not a tar file", "empty file", "no samples",
     "unfinished", "damaged manifest", "listed twice"}
)  # fmt: skip


@dataclass(frozen=True)
class Repair:
    """What was done to one shard: samples kept, keys dropped."""

    shard: str
    kept: int
    dropped: list[str]


def repair(result: Verification) -> list[Repair]:
    """Mend what a verification found; verify again to see what is left.

    A shard with broken samples is rewritten without them under its own name, atomically; of a
    damaged or truncated tar the samples that are whole are saved. Then its manifest entry, its
    `stats.json` and the status of its rows are updated. Leaks are only removed from training
    sets.
    """
    repairs = []
    for report in result.reports:
        findings = [item for item in result.findings if item.shard == report.path.name]
        kinds = {item.kind for item in findings}
        if not kinds or kinds & _BEYOND:
            continue
        bad = {
            item.position
            for item in findings
            if item.position is not None and (item.kind != "leak" or "train" in report.path.name)
        }
        if bad or kinds - _ENTRY_FAULTS - {"leak"}:
            entry, dropped = _rewrite(report, bad)
        else:
            size = report.path.stat().st_size
            entry = ShardEntry(
                name=report.path.name, samples=report.samples, bytes=size, sha256=report.sha256
            )
            dropped = []
        if dropped or kinds - {"leak"}:
            _update(result, entry, len(dropped))
            _update_rows(report.path, entry, set(dropped))
            repairs.append(Repair(entry.name, entry.samples, dropped))
    for path, manifest in result.manifests.items():
        manifest.save(path)
    return repairs


def _rewrite(report: ShardReport, bad: set[int]) -> tuple[ShardEntry, list[str]]:
    """Write a shard again without the samples at some positions."""
    dropped: list[str] = []

    def whole() -> Iterator[Sample]:
        seen: set[str] = set()
        with report.path.open("rb") as handle:
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        with data:
            for position, sample in enumerate(salvage(data)):
                name = sample.key.lstrip("/").replace("../", "").replace("..", "_")
                if position in bad or (position >= report.samples and _broken(sample)):
                    dropped.append(sample.key)
                elif name not in seen:
                    seen.add(name)
                    yield Sample(name, sample.files)

    return write_tar(whole(), report.path), dropped


def _broken(sample: Sample) -> bool:
    """Judge a sample behind a damaged place, which verification did not reach."""
    from data_prep.samples import RawSample
    from data_prep.verify_shard import sample_faults

    return any(True for _ in sample_faults(RawSample(sample.key, sample.files, "")))


def salvage(data: mmap.mmap) -> Iterator[Sample]:
    """Yield the samples of a tar in order, going on behind damaged places and early end marks.

    The first samples are those that verification counted, in the same order.
    """
    key = ""
    files: dict[str, bytes] = {}
    start: int | None = 0
    while start is not None:
        end = start
        try:
            for member in parse_members(data, start):
                end = member.offset + (member.size + BLOCK - 1) // BLOCK * BLOCK
                stem, extension = split_name(member.name)
                if not stem:
                    continue
                if stem != key and files:
                    yield Sample(key, files)
                    files = {}
                key = stem
                files[extension] = data[member.offset : member.offset + member.size]
        except TarDamageError:
            # A sample that was under way ends here; what follows cannot be trusted to be its own.
            end += BLOCK
        if files:
            yield Sample(key, files)
            key, files = "", {}
        start = find_header(data, max(end, start + BLOCK))


def _update(result: Verification, entry: ShardEntry, dropped: int) -> None:
    """Put a shard's new entry into the manifest that lists it, or into the only one there is."""
    for manifest in result.manifests.values():
        for number, old in enumerate(manifest.shards):
            if old.name == entry.name:
                entry.failures = _failures(old.failures, dropped)
                manifest.shards[number] = entry
                return
    if len(result.manifests) == 1:
        manifest = next(iter(result.manifests.values()))
        entry.failures = _failures({}, dropped)
        manifest.shards = sorted([*manifest.shards, entry], key=lambda item: item.name)
    elif not result.manifests:
        return
    else:
        path = result.folder / "manifest.json"
        result.manifests[path] = Manifest(source="repair", shards=[entry])


def _failures(before: dict[str, int], dropped: int) -> dict[str, int]:
    after = dict(before)
    if dropped:
        after["broken"] = after.get("broken", 0) + dropped
    return dict(sorted(after.items()))


def _update_rows(path: Path, entry: ShardEntry, dropped: set[str]) -> None:
    """Mark dropped rows as broken, so that `--retry-failed` asks for them again."""
    rows_path, stats_path = path.with_suffix(".rows.parquet"), path.with_suffix(".stats.json")
    if not rows_path.is_file() or not stats_path.is_file():
        return
    import pandas as pd

    rows = pd.read_parquet(rows_path)
    present = _keys(path)
    lost = (rows["status"] == "ok") & ~rows["key"].isin(present)
    rows.loc[lost, "status"] = "broken"
    rows.loc[lost, "detail"] = "dropped by verify --repair"
    entry.failures = {
        str(status): int(count)
        for status, count in sorted(rows["status"].value_counts().items())
        if status != "ok"
    }
    temporary = rows_path.with_name(f".{rows_path.name}.tmp")
    rows.to_parquet(temporary, index=False)
    temporary.replace(rows_path)
    record = json.loads(stats_path.read_text("utf-8"))
    record.update(entry=entry.model_dump(), rows_sha256=sha256_file(rows_path))
    atomic_write(stats_path, to_json(record))


def _keys(path: Path) -> set[str]:
    with path.open("rb") as handle:
        data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    with data:
        return {sample.key for sample in salvage(data)}
