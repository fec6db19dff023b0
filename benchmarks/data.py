"""Data preparation and loading beside img2dataset and open_clip, on the same machine and cores.

    python benchmarks/data.py download --shards ../shared/data --peer-python /tmp/i2d/bin/python
    python benchmarks/data.py read     --shards ../shared/data --peer-python /tmp/oc/bin/python
    python benchmarks/data.py verify   --shards ../shared/data

The peers cannot live in our environment (their pins exclude our pandas and webdataset); `recipe`
prints how to build theirs. Without `--peer-python` only our own figure is measured, and that is
said. Runs alternate, and the best of each side counts: what else the machine does only slows.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BATCH = 64
RECIPE = """\
python3.11 -m venv /tmp/i2d && /tmp/i2d/bin/pip install img2dataset==1.47.0
python3.11 -m venv /tmp/oc  && /tmp/oc/bin/pip install 'open_clip_torch[training]==3.3.0' \\
    torch==2.14.1 torchvision==0.29.1
"""


# ------------------------------------------------------------------------------------- download


def serve(images: list[bytes]) -> None:
    """Serve any number of different files from a process of its own until its input closes.

    Every file has its number appended behind the end of the picture, so that all are different
    and none is taken for a duplicate.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            number = int(self.path.strip("/").split(".")[0])
            body = images[number % len(images)] + b"%08d" % number
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


def read_store(path: Path) -> list[bytes]:
    """Read back the images that were handed to the server's process."""
    data, images, place = path.read_bytes(), [], 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        images.append(data[place + 4 : place + 4 + size])
        place += 4 + size
    return images


def flickr_images(folder: Path) -> list[bytes]:
    """Return the images of the Flickr8k test shard, enlarged to what the web serves (500 px)."""
    from PIL import Image

    from data_prep.reader import ShardSet

    shards = ShardSet.find(folder, "flickr8k-test-000000.tar")
    images = []
    for index in range(200):
        image = Image.open(io.BytesIO(shards.read(index).image_bytes)).resize((500, 375))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        images.append(buffer.getvalue())
    return images


def our_download(url: str, count: int, folder: Path, cores: int) -> float:
    """Return the images per second of our downloader."""
    import pandas as pd

    from data_prep.captions import CaptionTable
    from data_prep.download import DownloadPlan, download
    from data_prep.fetch import FetchSettings

    frame = pd.DataFrame(
        {
            "key": [f"{n:09d}" for n in range(count)],
            "url": [f"{url}/{n}.jpg" for n in range(count)],
            "captions": [[f"caption {n}"] for n in range(count)],
        }
    )
    fetch = FetchSettings(allow_private=("127.0.0.1",), per_host=64)
    plan = DownloadPlan(
        CaptionTable(frame, {}, "benchmark"), folder, "x", rows_per_shard=1000, fetch=fetch,
        processes=cores, threads=32,
    )  # fmt: skip
    begin = time.perf_counter()
    result = download(plan)
    seconds = time.perf_counter() - begin
    assert result.manifest is not None
    assert result.manifest.num_samples == count, result.manifest.failures
    return count / seconds


PEER_DOWNLOAD = """
import glob, json, sys, time
from img2dataset import download
begin = time.perf_counter()
download(url_list=sys.argv[1], input_format="parquet", url_col="url", caption_col="caption",
         output_folder=sys.argv[2], output_format="webdataset", image_size=256,
         resize_mode="keep_ratio", resize_only_if_bigger=True, encode_quality=95,
         number_sample_per_shard=1000, processes_count=int(sys.argv[3]), thread_count=32,
         enable_wandb=False, compute_hash="sha256")
seconds = time.perf_counter() - begin
done = sum(json.load(open(p))["successes"] for p in glob.glob(sys.argv[2] + "/*_stats.json"))
print("RESULT", done, seconds)
"""


def peer_download(python: str, url: str, count: int, folder: Path, cores: int) -> float:
    """Return the images per second of img2dataset in its own environment."""
    import pandas as pd

    frame = pd.DataFrame(
        {"url": [f"{url}/{n}.jpg" for n in range(count)], "caption": ["a caption"] * count}
    )
    table = folder.with_suffix(".parquet")
    frame.to_parquet(table)
    done, seconds = run_peer(python, PEER_DOWNLOAD, str(table), str(folder), str(cores))
    assert done == count, f"img2dataset got {done:.0f} of {count}"
    return count / seconds


def bench_download(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the downloaders on a local server."""
    images = flickr_images(args.shards)
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "images.bin"
        store.write_bytes(b"".join(len(i).to_bytes(4, "big") + i for i in images))
        command = [sys.executable, __file__, "serve", "--store", str(store)]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        fresh = itertools.count()

        def place() -> Path:
            return Path(scratch) / f"run-{next(fresh)}"

        try:
            return alternate(
                args,
                "images/s",
                lambda: our_download(url, args.count, place(), args.cores),
                lambda: peer_download(args.peer_python, url, args.count, place(), args.cores),
                target=1.0,
            )
        finally:
            server.kill()


# ----------------------------------------------------------------------------------------- read


def our_read(shards: Path, workers: int, epochs: int) -> float:
    """Return the samples per second of our training loader: normalised crops and tokens."""
    import open_clip
    import torch
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    from data_prep.reader import BatchSchedule, ShardSet
    from pipeline.train.loader import Normalise, TrainingPairs, training_batches
    from pipeline.train.settings import AugmentSettings

    torch.set_num_threads(1)
    found = ShardSet.find(shards, "flickr8k-train-{000000..000005}.tar")
    pairs = TrainingPairs(found, open_clip.get_tokenizer("RN50"), 224, AugmentSettings(), seed=0)
    schedule = BatchSchedule(found, BATCH, 0, 1, seed=0)
    normalise = Normalise(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, torch.device("cpu"))
    warm, end = schedule.batches_per_epoch, schedule.batches_per_epoch * (epochs + 1)
    batches = iter(training_batches(pairs, schedule, start=0, end=end, workers=workers, pin=False))
    for _ in range(warm):
        normalise(next(batches).images)
    seen, begin = 0, time.perf_counter()
    for batch in batches:
        assert normalise(batch.images).shape[1:] == (3, 224, 224)
        seen += len(batch.tokens)
    return seen / (time.perf_counter() - begin)


PEER_READ = """
import sys, time
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
import open_clip
from open_clip.transform import image_transform
from open_clip_train.data import get_wds_dataset
shards, workers, batch, epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
args = SimpleNamespace(
    train_data=shards, val_data=None, train_num_samples=6000, dataset_resampled=False, seed=0,
    train_data_upsampling_factors=None, batch_size=batch, workers=workers, world_size=1)
transform = image_transform(224, is_train=True, mean=open_clip.OPENAI_DATASET_MEAN,
                            std=open_clip.OPENAI_DATASET_STD)
data = get_wds_dataset(args, transform, True, tokenizer=open_clip.get_tokenizer("RN50"))
for image, text in data.dataloader:
    pass
seen, begin = 0, time.perf_counter()
for epoch in range(1, epochs + 1):
    data.set_epoch(epoch)
    for image, text in data.dataloader:
        assert image.shape[1:] == (3, 224, 224)
        seen += len(text)
print("RESULT", seen, time.perf_counter() - begin)
"""


def bench_read(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the training loaders on Flickr8k with random resized crops to 224."""
    pattern = str(args.shards.resolve() / "flickr8k-train-{000000..000005}.tar")

    def peer() -> float:
        arguments = (pattern, str(args.workers), str(BATCH), str(args.epochs))
        seen, seconds = run_peer(args.peer_python, PEER_READ, *arguments)
        return seen / seconds

    return alternate(
        args,
        "samples/s",
        lambda: our_read(args.shards, args.workers, args.epochs),
        peer,
        target=1.3,
    )


# --------------------------------------------------------------------------------------- verify


def bench_verify(args: argparse.Namespace) -> dict[str, Any]:
    """Measure verification without decoding; the files are read once before, so memory counts."""
    from data_prep.verify import verify

    rates = {}
    for name in ("flickr8k-*.tar", "imagenet-*.tar", "cifar*.tar"):
        found = verify(args.shards, [name], decode=False)
        assert found.clean, found.findings[:3]
        size = sum(report.bytes for report in found.reports) / 1e6
        best = 0.0
        for _ in range(args.repeats):
            begin = time.perf_counter()
            verify(args.shards, [name], decode=False, processes=args.cores)
            best = max(best, size / (time.perf_counter() - begin))
        rates[name] = round(best)
        print(f"{name}: {best:.0f} MB/s over {size:.0f} MB (target 200)")
    return {"MB/s": rates}


# --------------------------------------------------------------------------------------- common


def run_peer(python: str, script: str, *arguments: str) -> tuple[float, float]:
    """Run a script in a peer's environment; return the two numbers of its RESULT line."""
    done = subprocess.run(
        [python, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            count, seconds = line.split()[1:]
            return float(count), float(seconds)
    raise RuntimeError(f"the peer failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def alternate(
    args: argparse.Namespace,
    unit: str,
    ours: Callable[[], float],
    peer: Callable[[], float],
    target: float,
) -> dict[str, Any]:
    """Run both sides in turn and compare the best of each."""
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    if not args.peer_python:
        print("no --peer-python: only our own rate is measured. To build the peers' environments:")
        print(textwrap.indent(RECIPE, "    "))
    for _ in range(args.repeats):
        rates["ours"].append(ours())
        print(f"ours {rates['ours'][-1]:.0f} {unit}", flush=True)
        if args.peer_python:
            rates["peer"].append(peer())
            print(f"peer {rates['peer'][-1]:.0f} {unit}", flush=True)
    result: dict[str, Any] = {name: [round(r) for r in found] for name, found in rates.items()}
    if args.peer_python:
        result["ratio"] = round(max(rates["ours"]) / max(rates["peer"]), 2)
        print(f"best of {args.repeats}: {result['ratio']} times the peer (target {target})")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_RAW)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("download", "read", "verify"):
        part = commands.add_parser(name)
        part.add_argument("--shards", type=Path, required=True, help="folder of Flickr8k")
        part.add_argument("--repeats", type=int, default=3)
        part.add_argument("--cores", type=int, default=2, help="processes on both sides")
        part.add_argument("--peer-python", default="", help="python of the peer's environment")
        part.add_argument("--json", type=Path, help="also write the figures here")
        part.add_argument("--count", type=int, default=20_000, help="images to download")
        part.add_argument("--workers", type=int, default=2, help="loader processes")
        part.add_argument("--epochs", type=int, default=2, help="epochs that are timed")
    commands.add_parser("recipe")
    commands.add_parser("serve").add_argument("--store", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "recipe":
        print(RECIPE)
        return 0
    if args.command == "serve":
        serve(read_store(args.store))
        return 0
    if args.peer_python and not Path(args.peer_python).exists():
        parser.error(
            f"--peer-python {args.peer_python} does not exist; `recipe` says how to build it"
        )
    run = {"download": bench_download, "read": bench_read, "verify": bench_verify}[args.command]
    result = run(args)
    if args.json:
        args.json.write_text(json.dumps({args.command: result}, indent=1) + "\n")
    return 0


_RAW = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    sys.exit(main())
