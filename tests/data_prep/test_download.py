"""Downloading from a server that misbehaves: every row accounted for, retried, resumed, sliced."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image, ImageDraw

from data_prep.captions import CaptionTable, read_captions
from data_prep.download import DownloadPlan, download
from data_prep.download_shard import StoreSettings
from data_prep.errors import UserError
from data_prep.fetch import FetchSettings
from data_prep.reader import ShardSet
from data_prep.shards import Manifest
from data_prep.verify import verify
from tests.data_prep.misbehaving_server import CASES, MisbehavingServer, picture

REPOSITORY = Path(__file__).resolve().parents[2]
# What each case of the server has to end as.
EXPECTED = {
    "ok": "ok", "404": "http_404", "429": "ok", "500-once": "ok", "slow": "timeout",
    "endless": "too_large", "truncated": "truncated", "wrong-type": "not_an_image",
    "loop": "redirects", "to-private": "private_address", "huge": "too_large",
    "bomb": "too_many_pixels", "html": "not_an_image", "tiny": "too_small",
    "robots": "opted_out", "robots-other": "ok", "hop": "ok", "drip": "timeout",
    "same": "duplicate", "cut-jpeg": "truncated", "gone": "http_410", "empty": "not_an_image",
    "chunked": "ok",
}  # fmt: skip


def quick(server: MisbehavingServer, **changes: object) -> FetchSettings:
    """Bounds that make the misbehaviour show soon."""
    return FetchSettings(
        allow_private=(f"127.0.0.1:{server.port}",), connect_timeout=2, read_timeout=1.5,
        total_timeout=2.5, max_bytes=2 << 20, retries=1, backoff=0.05, per_host=64,
    ).model_copy(update=changes)  # fmt: skip


def table(server: MisbehavingServer, cases: list[str]) -> CaptionTable:
    frame = pd.DataFrame(
        {
            "key": [f"{n:05d}" for n in range(len(cases))],
            "url": [f"{server.url}/{case}/{n}" for n, case in enumerate(cases)],
            "captions": [[f"caption {n}"] for n in range(len(cases))],
        }
    )
    return CaptionTable(frame, {}, "test")


def all_rows(folder: Path) -> pd.DataFrame:
    rows = pd.concat([pd.read_parquet(path) for path in sorted(folder.glob("*.rows.parquet"))])
    rows["case"] = rows["url"].str.split("/").str[3]
    return rows


def finals(folder: Path) -> dict[str, bytes]:
    wanted = (".tar", ".manifest.json")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name.endswith(wanted)}


@pytest.mark.slow
def test_two_thousand_captions_end_with_every_row_accounted_for(
    server: MisbehavingServer, shared_data: Path, tmp_path: Path
) -> None:
    captions = read_captions(shared_data / "cc3m-validation.tsv.gz", limit=2000)
    frame = captions.frame.copy()
    cases = [CASES[n // 5 % len(CASES)] if n % 5 == 0 else "ok" for n in range(len(frame))]
    frame["url"] = [f"{server.url}/{case}/{n}" for n, case in enumerate(cases)]
    plan = DownloadPlan(
        CaptionTable(frame, captions.dropped, captions.source), tmp_path, "cc3m",
        rows_per_shard=500, processes=2, threads=48, fetch=quick(server),
    )  # fmt: skip
    result = download(plan)

    rows = all_rows(tmp_path)
    assert len(rows) == 2000
    assert rows["key"].tolist() == frame["key"].tolist()
    statuses = rows.groupby("case")["status"].agg(lambda column: sorted(set(column)))
    for case, expected in EXPECTED.items():
        # The first placeholder of each shard is kept, its repetitions are not.
        assert set(statuses[case]) <= ({expected, "ok"} if case == "same" else {expected}), case
    manifest = result.manifest
    assert manifest is not None
    assert manifest.num_samples == (rows["status"] == "ok").sum()
    assert manifest.num_samples + sum(manifest.failures.values()) == 2000
    assert not server.inner.counts, "a redirect reached the inner network"  # type: ignore[attr-defined]
    assert all("inherclip" in agent for agent in server.agents)
    assert verify(tmp_path).clean

    before = sum(server.counts.values())
    assert download(plan).worked == 0
    assert sum(server.counts.values()) == before, "a finished set is left alone"

    server.counts.clear()
    download(replace(plan, retry_failed=True))
    asked = {path for path in server.counts if "/ok/" not in path}
    failed = rows[~rows["status"].isin(["ok", "duplicate", "opted_out"])]
    assert asked == {url.removeprefix(server.url) for url in failed["url"]}


def test_retrying_gives_the_bytes_of_a_run_without_faults(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    cases = ["ok", "429", "404", "500-once"] * 10
    once = quick(server, retries=0)
    plan = DownloadPlan(table(server, cases), tmp_path / "a", "x", 16, once, processes=1, threads=8)
    first = download(plan)
    assert first.manifest is not None
    assert first.manifest.failures == {"http_404": 10, "http_429": 10, "http_503": 10}
    second = download(replace(plan, retry_failed=True))
    assert second.manifest is not None
    assert second.manifest.failures == {"http_404": 10}
    clean = replace(plan, folder=tmp_path / "b")
    download(clean)  # the server has got over its faults by now
    assert finals(tmp_path / "a") == finals(tmp_path / "b")
    assert verify(tmp_path / "a").clean


def test_retry_after_is_obeyed_and_a_host_is_spared(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    plan = DownloadPlan(
        table(server, ["429"] * 4), tmp_path, "x", 4, quick(server), processes=1, threads=4
    )
    begin = time.monotonic()
    result = download(plan)
    assert result.manifest is not None
    assert result.manifest.num_samples == 4
    assert time.monotonic() - begin >= 1
    assert max(server.counts.values()) == 2


def test_the_limit_per_host_holds_over_processes(server: MisbehavingServer, tmp_path: Path) -> None:
    server.slowness = 0.15
    busy, most = [0], [0]
    original = server.RequestHandlerClass.do_slow  # type: ignore[attr-defined]

    def watched(handler: object, n: int) -> None:
        with server.lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        try:
            original(handler, n)
        finally:
            with server.lock:
                busy[0] -= 1

    server.RequestHandlerClass.do_slow = watched  # type: ignore[attr-defined]
    try:
        plan = DownloadPlan(
            table(server, ["slow"] * 24), tmp_path, "x", 4, quick(server, per_host=3),
            processes=2, threads=16,
        )  # fmt: skip
        result = download(plan)
    finally:
        server.RequestHandlerClass.do_slow = original  # type: ignore[attr-defined]
    assert result.manifest is not None
    assert result.manifest.num_samples == 24
    assert most[0] <= 3


def test_slices_make_together_what_one_run_makes(server: MisbehavingServer, tmp_path: Path) -> None:
    cases = ["ok", "ok", "404"] * 12
    plan = DownloadPlan(
        table(server, cases), tmp_path / "one", "x", 8, quick(server), processes=1, threads=8
    )
    download(plan)
    for part in ((2, 3), (0, 3), (1, 3)):
        result = download(replace(plan, folder=tmp_path / "many", part=part))
        assert (result.manifest is None) == (part != (1, 3))
    assert finals(tmp_path / "one") == finals(tmp_path / "many")
    with pytest.raises(UserError, match="does not exist"):
        download(replace(plan, part=(3, 3)))


def test_other_captions_or_settings_are_not_mixed_in(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    plan = DownloadPlan(table(server, ["ok"] * 6), tmp_path, "x", 4, quick(server), processes=1)
    download(plan)
    with pytest.raises(UserError, match="rows_per_shard"):
        download(replace(plan, rows_per_shard=3))
    with pytest.raises(UserError, match="captions_sha256"):
        download(replace(plan, table=table(server, ["ok"] * 5 + ["404"])))
    with pytest.raises(UserError, match="keep_duplicates"):
        download(replace(plan, store=StoreSettings(keep_duplicates=True)))


def test_duplicates_and_lookalikes(server: MisbehavingServer, tmp_path: Path) -> None:
    pytest.importorskip("imagehash")
    drawing = Image.new("RGB", (320, 300), "white")
    for place, colour in enumerate(["red", "black", "blue"]):
        ImageDraw.Draw(drawing).rectangle([place * 70, place * 40, place * 90 + 60, 200], colour)
    for number, quality in ((3, 70), (4, 90)):  # the same picture in other bytes
        buffer = io.BytesIO()
        drawing.save(buffer, "JPEG", quality=quality)
        server.images[number] = buffer.getvalue()
    plan = DownloadPlan(
        table(server, ["same", "same", "ok", "ok", "ok", "same"]), tmp_path, "x", 6, quick(server),
        StoreSettings(near_duplicates=True), processes=1,
    )  # fmt: skip
    result = download(plan)
    assert result.manifest is not None
    assert result.manifest.failures == {"duplicate": 2}
    lines = (tmp_path / "x.near-duplicates.csv").read_text().splitlines()
    assert lines[0] == "key,near_duplicate_of,differing_bits"
    assert [line.split(",")[:2] for line in lines[1:]] == [["00004", "00003"]]


def test_files_instead_of_urls_are_read_the_same_way(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for number, name in enumerate(["a.jpg", "sub/b.jpg", "c.jpg"]):
        (images / name).write_bytes(picture(number))
        (images / name).with_suffix(".txt").write_text(f"caption {number}\nsecond {number}")
    (images / "c.jpg").write_bytes(b"broken")
    plan = DownloadPlan(read_captions(images), tmp_path / "out", "x", processes=1, threads=4)
    result = download(plan)
    assert result.manifest is not None
    assert result.manifest.failures == {"not_an_image": 1}
    shards = ShardSet.find(tmp_path / "out", "x-*.tar")
    assert shards.read(1).captions == ["caption 1", "second 1"]


def test_a_list_of_urls_cannot_name_local_files(server: MisbehavingServer, tmp_path: Path) -> None:
    lines = table(server, ["ok", "ok"])
    lines.frame["url"] = ["file:///etc/hostname", f"{server.url}/ok/1"]
    result = download(DownloadPlan(lines, tmp_path, "x", fetch=quick(server), processes=1))
    assert result.manifest is not None
    assert result.manifest.failures == {"bad_url": 1}


def test_killed_at_20_random_moments_a_download_ends_with_the_same_bytes(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(script), "download", str(tmp_path), "20", server.url],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["killed"], report["identical"]) == (20, 20)


@pytest.mark.parametrize("moment", range(1, 8))
def test_killed_between_any_two_steps_of_a_commit_nothing_is_half_changed(
    server: MisbehavingServer, tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit of a retried shard changes three files; it is stopped after each rename."""
    cases = ["ok", "500-once"] * 4
    plan = DownloadPlan(
        table(server, cases), tmp_path, "x", 8, quick(server, retries=0), processes=1, threads=4
    )
    download(plan)
    renames = [0]
    replace_file = Path.replace

    def stopping(path: Path, target: Path) -> Path:
        renames[0] += 1
        if renames[0] == moment:
            raise KeyboardInterrupt
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", stopping)
    with contextlib.suppress(KeyboardInterrupt, RuntimeError):  # the latter from a worker thread
        download(replace(plan, retry_failed=True))
    monkeypatch.undo()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    download(replace(plan, retry_failed=True))
    assert verify(tmp_path).clean
    assert Manifest.load(tmp_path / "x.manifest.json").num_samples == 8


@pytest.mark.slow
def test_workers_end_with_their_parent_and_a_second_run_is_kept_out(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    server.slowness = 1.0
    plan = DownloadPlan(
        table(server, ["slow"] * 60), tmp_path, "x", 10, quick(server, per_host=2),
        processes=2, threads=4,
    )  # fmt: skip
    parent = multiprocessing.get_context("spawn").Process(target=download, args=(plan,))
    parent.start()
    lock = tmp_path / ".x.slice-0-of-1.lock"
    deadline = time.monotonic() + 60
    while not server.counts and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lock.exists()
    with pytest.raises(UserError, match="another run"):
        download(plan)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    assert len(children) >= 2
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    alive = [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert not alive, "workers outlived their parent"
    server.slowness = 0.0
    result = download(replace(plan, processes=1, fetch=quick(server)))
    assert result.manifest is not None
    assert result.manifest.num_samples == 60
