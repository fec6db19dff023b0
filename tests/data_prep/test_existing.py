"""Shards of others: img2dataset's folders, plain tars, and a mirror on the hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.existing import scan
from data_prep.reader import ShardSet
from data_prep.shards import Manifest, write_shards
from data_prep.verify import verify
from tests.data_prep.conftest import samples

REPOSITORY = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def img2dataset(tmp_path: Path) -> Path:
    """A folder as img2dataset leaves it: 00000.tar, 00000_stats.json, 00000.parquet."""
    write_shards(samples(10), tmp_path, "x", samples_per_shard=5)
    for number in range(2):
        (tmp_path / f"x-{number:06d}.tar").rename(tmp_path / f"{number:05d}.tar")
        (tmp_path / f"{number:05d}.parquet").write_bytes(b"")
        stats = {"count": 8, "successes": 5, "status_dict": {"success": 5, "HTTP Error 404": 3}}
        (tmp_path / f"{number:05d}_stats.json").write_text(json.dumps(stats))
    (tmp_path / "x.manifest.json").unlink()
    return tmp_path


def test_a_scan_takes_over_img2datasets_failures(img2dataset: Path) -> None:
    manifest = scan(img2dataset)
    assert manifest.num_samples == 10
    assert manifest.failures == {"HTTP Error 404": 6}
    assert len(ShardSet.find(img2dataset, "{00000..00001}.tar")) == 10
    assert verify(img2dataset, processes=1).clean


def test_a_scan_again_reads_only_what_changed(
    img2dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scan(img2dataset)
    from data_prep import existing

    monkeypatch.setattr(existing, "sha256_file", lambda path: pytest.fail(f"read {path} again"))
    assert scan(img2dataset) == first


def test_unfinished_shards_are_named(img2dataset: Path) -> None:
    stats = img2dataset / "00001_stats.json"
    stats.write_text(stats.read_text().replace('"successes": 5', '"successes": 6'))
    with pytest.raises(UserError, match="wrote 6 samples, the tar holds 5"):
        scan(img2dataset)
    stats.unlink()
    with pytest.raises(UserError, match="did not finish this shard"):
        scan(img2dataset)
    (img2dataset / "00001.tar").write_bytes((img2dataset / "00001.tar").read_bytes()[:9000])
    with pytest.raises(UserError, match="cut short"):
        scan(img2dataset)


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as fetching a data set needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        files: dict[str, bytes] = self.server.files  # type: ignore[attr-defined]
        path = self.path.split("?")[0]
        self.server.asked[self.command, path] += 1  # type: ignore[attr-defined]
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/api/datasets/pixparse/cc3m-wds"):
            siblings = [{"rfilename": n, "size": len(d)} for n, d in files.items()]
            record = {"id": "pixparse/cc3m-wds", "sha": COMMIT, "siblings": siblings, "tags": [],
                      "private": False, "downloads": 0, "likes": 0}  # fmt: skip
            listing = [{"type": "file", "path": n, "size": len(d), "oid": "0"}
                       for n, d in files.items()]  # fmt: skip
            body = json.dumps(listing if "/tree/" in path else record).encode()
            self.reply(body, "application/json")
        elif name in files:
            self.reply(files[name], "application/x-tar")
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def reply(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    write_shards(samples(12), tmp_path / "hub", "cc3m-train", samples_per_shard=4)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.files = {p.name: p.read_bytes() for p in (tmp_path / "hub").glob("*.tar")}  # type: ignore[attr-defined]
    server.files["README.md"] = b"read me"  # type: ignore[attr-defined]
    server.asked = Counter()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True, args=(0.05,)).start()
    yield server
    server.shutdown()
    server.server_close()


def mirror(
    server: ThreadingHTTPServer, out: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Run `prepare mirror` in a process of its own: the hub's address is read at import."""
    script = (
        "import argparse, sys\n"
        "from data_prep.commands import add_prepare_arguments, run_prepare\n"
        "parser = argparse.ArgumentParser(); add_prepare_arguments(parser)\n"
        "sys.exit(run_prepare(parser.parse_args(sys.argv[1:])))"
    )
    address = f"http://127.0.0.1:{server.server_address[1]}"
    return subprocess.run(
        [sys.executable, "-c", script, "mirror", "--out", str(out), *options],
        capture_output=True, text=True, check=False, cwd=REPOSITORY, timeout=120,
        env={"HF_ENDPOINT": address, "HF_HOME": str(out / "home"), "HF_HUB_DISABLE_XET": "1",
             "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def test_the_mirror_is_fetched_scanned_and_continued(
    hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    out = tmp_path / "cc3m"
    done = mirror(hub, out, "--pattern", "cc3m-train-*.tar")
    assert done.returncode == 0, done.stdout + done.stderr
    assert Manifest.load(out / "manifest.json").num_samples == 12
    assert not (out / "README.md").exists()
    assert len(ShardSet.find(out, "cc3m-train-{000000..000002}.tar")) == 12
    (out / "cc3m-train-000001.tar").unlink()
    (out / "manifest.json").unlink()
    hub.asked.clear()  # type: ignore[attr-defined]
    done = mirror(hub, out, "--pattern", "cc3m-train-*.tar")
    assert done.returncode == 0, done.stdout + done.stderr
    fetched = [p for kind, p in hub.asked if kind == "GET" and p.endswith(".tar")]  # type: ignore[attr-defined]
    assert [path.rsplit("/", 1)[-1] for path in fetched] == ["cc3m-train-000001.tar"]
    whole = mirror(hub, out)
    assert whole.returncode == 1
    assert "not the whole mirror" in whole.stderr


def test_slices_fetch_their_shards_only(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    done = mirror(hub, tmp_path / "s", "--slice", "1/2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "s").glob("*.tar")] == ["cc3m-train-000001.tar"]


def test_a_hub_that_does_not_answer_is_a_message(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    done = mirror(hub, tmp_path / "s", "someone/nothing")
    assert "the hub did not deliver" in done.stderr
