"""Runs a build in forked children, kills each at a random moment, runs it again, compares bytes.

A process of its own without threads, so that forking is safe and the imports are paid once.
Usage: kill_driver.py shards|download FOLDER TRIALS [SERVER_URL]
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd

from data_prep.captions import CaptionTable
from data_prep.download import DownloadPlan, download
from data_prep.fetch import FetchSettings
from data_prep.shards import Sample, write_shards


def make_samples() -> Iterator[Sample]:
    for number in range(240):
        yield Sample.of(f"k{number:04d}", random.Random(number).randbytes(3000), captions=["x"])
        time.sleep(0.0005)


def build_shards(folder: Path) -> None:
    write_shards(make_samples(), folder, "x", samples_per_shard=20, source="kill test")


def build_download(folder: Path, url: str) -> None:
    cases = ["ok"] * 9 + ["404"]
    rows = range(60)
    frame = pd.DataFrame(
        {
            "key": [f"{n:04d}" for n in rows],
            "url": [f"{url}/{cases[n % 10]}/{n}" for n in rows],
            "captions": [[f"caption {n}"] for n in rows],
        }
    )
    address = url.removeprefix("http://")
    download(
        DownloadPlan(
            CaptionTable(frame, {}, "kill test"), folder, "x", rows_per_shard=10, processes=1,
            threads=8, fetch=FetchSettings(allow_private=(address,), backoff=0.01),
        )
    )  # fmt: skip


def child(build: Callable[[Path], None], folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            build(folder)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def finals(folder: Path) -> dict[str, bytes]:
    wanted = (".tar", ".manifest.json")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name.endswith(wanted)}


def main() -> int:
    kind, base, trials = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    build = build_shards if kind == "shards" else lambda f: build_download(f, sys.argv[4])
    start = time.monotonic()
    assert os.waitpid(child(build, base / "undisturbed"), 0)[1] == 0
    duration = time.monotonic() - start
    expected, killed, identical, chance = finals(base / "undisturbed"), 0, 0, random.Random()
    trial = 0
    while killed < trials and trial < 2 * trials:
        folder, trial = base / f"trial-{trial}", trial + 1
        pid = child(build, folder)
        time.sleep(chance.uniform(0.01, duration * 0.8))
        os.kill(pid, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            continue  # it had ended before its moment came
        killed += 1
        for name, data in finals(folder).items() if folder.exists() else ():
            assert expected[name] == data, f"{name} under its final name is not whole"
        assert os.waitpid(child(build, folder), 0)[1] == 0
        left = [p.name for p in folder.iterdir() if p.name.endswith((".tmp", ".new"))]
        assert not left, left
        identical += finals(folder) == expected
    print(json.dumps({"killed": killed, "identical": identical, "seconds": round(duration, 2)}))
    return 0


sys.exit(main())
