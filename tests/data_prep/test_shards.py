"""Shards: the bytes, the manifest, and builds that are killed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.reader import ShardSet
from data_prep.shards import Manifest, Sample, manifest_path, write_shards
from tests.data_prep.conftest import samples

REPOSITORY = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def test_bytes_are_those_of_webdataset_and_webdataset_reads_them(tmp_path: Path) -> None:
    import webdataset

    made = samples(12)
    write_shards(made, tmp_path, "x", samples_per_shard=12)
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as tar:
        for sample in made:
            tar.write({"__key__": sample.key, **sample.files})
    assert (tmp_path / "x-000000.tar").read_bytes() == buffer.getvalue()
    read = list(webdataset.WebDataset(str(tmp_path / "x-000000.tar"), shardshuffle=False))
    assert [item["__key__"] for item in read] == [sample.key for sample in made]
    assert read[3]["jpg"] == made[3].files["jpg"]


def test_manifest_totals_and_round_trip(small_set: tuple[Path, Manifest]) -> None:
    folder, manifest = small_set
    record = json.loads(manifest_path(folder, "set").read_text())
    assert record["totals"]["samples"] == 20
    assert [entry["samples"] for entry in record["shards"]] == [8, 8, 4]
    assert Manifest.load(manifest_path(folder, "set")) == manifest
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_sequence_is_not_asked_for_what_is_finished(tmp_path: Path) -> None:
    made = samples(20)
    asked: list[int] = []

    class Counting(Sequence[Sample]):
        def __len__(self) -> int:
            return len(made)

        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            if index == 13 and 13 not in asked:
                asked.append(index)
                raise KeyboardInterrupt
            asked.append(index)
            return made[index]

    with pytest.raises(KeyboardInterrupt):
        write_shards(Counting(), tmp_path, "x", samples_per_shard=4)
    assert not manifest_path(tmp_path, "x").exists()
    asked.clear()
    asked.append(13)
    manifest = write_shards(Counting(), tmp_path, "x", samples_per_shard=4)
    assert min(asked[1:]) == 12
    assert manifest == write_shards(made, tmp_path / "y", "x", samples_per_shard=4)


def test_other_settings_replace_all_of_an_earlier_build(tmp_path: Path) -> None:
    write_shards(samples(20), tmp_path, "x", samples_per_shard=4)
    write_shards(samples(6), tmp_path, "x", samples_per_shard=4, settings={"other": 1})
    assert sorted(contents(tmp_path)) == ["x-000000.tar", "x-000001.tar", "x.manifest.json"]
    assert len(ShardSet.find(tmp_path, "x-*.tar")) == 6


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no samples"),
        ([Sample("a.b", {"txt": b"x"})], "dots"),
        ([Sample("a", {"txt": b"x"}), Sample("a", {"txt": b"y"})], "twice"),
        ([Sample("a", {})], "no files"),
        ([Sample("a", {"JPG": b"x"})], "lower-case"),
        ([Sample("a" * 300, {"txt": b"x"})], "cannot store"),
    ],
)
def test_what_could_not_be_read_back_is_refused(
    tmp_path: Path, bad: list[Sample], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write_shards(bad, tmp_path, "x")
    assert not list(tmp_path.glob("*.tar")), "a half-written shard under its final name"


def test_a_key_twice_in_different_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="twice"):
        write_shards([*samples(5), *samples(1)], tmp_path, "x", samples_per_shard=5)


def test_a_full_disk_is_said_plainly_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        write_shards(samples(3), tmp_path, "x")
    assert not list(tmp_path.glob("*.tar")) + list(tmp_path.glob(".*.tmp"))


def test_killed_at_20_random_moments_the_build_ends_with_the_same_bytes(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(script), "shards", str(tmp_path), "20"],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["killed"], report["identical"]) == (20, 20)
