"""What our training loop costs, beside a bare PyTorch loop, open_clip's trainer and one big batch.

    python benchmarks/train.py overhead
    python benchmarks/train.py chunks
    python benchmarks/train.py open_clip --shards ../shared/data --peer-python /tmp/oc/bin/python

`overhead`: the same model, batches, precision and optimizer, in `train()` and in a loop of
a dozen lines. `chunks`: cached-feature accumulation in 4 chunks against the whole batch, time and
memory of activations. `open_clip`: RN50 on the same shards; the peer lives in its own environment,
see `benchmarks/data.py`. Sides take turns; each ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_prep.reader import BatchSchedule, ShardSet  # noqa: E402
from data_prep.scenes import ScenesConfig, build_scenes  # noqa: E402
from pipeline.models import Clip, build, preprocessing, read_architecture  # noqa: E402
from pipeline.objectives.objective import build as build_objective  # noqa: E402
from pipeline.train.job import Job  # noqa: E402
from pipeline.train.loader import Normalise, TrainingPairs, training_batches  # noqa: E402
from pipeline.train.loop import train  # noqa: E402
from pipeline.train.processes import Processes, join  # noqa: E402
from pipeline.train.settings import TrainSettings  # noqa: E402
from pipeline.train.step import Lesson, Trainee, cached_step, plain_step  # noqa: E402

WARM = 3  # steps that no side counts


def scenes(folder: Path) -> ShardSet:
    """Render the embedded data once."""
    config = ScenesConfig(image_size=64, train=4096, val=8, test=8, zero_shot=8)
    build_scenes(config, folder)
    return ShardSet.find(folder, "scenes-train-*.tar")


def teacher() -> Clip:
    """Return the demo's teacher, untrained."""
    architecture = read_architecture("models/demo_teacher.json", ROOT / "configs")
    return Clip(build(architecture, seed=0), architecture)


def seconds_of_ours(shards: ShardSet, settings: TrainSettings, processes: Processes) -> float:
    """Return the seconds a step takes in `train()`, with its log, checks and saving."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job("bench", teacher(), None, build_objective("task", 128), shards, settings, 0,
                  Path(folder), "bench", lambda _: None)  # fmt: skip
        train(job, processes)
        lines = [json.loads(x) for x in (Path(folder) / "train.jsonl").read_text().splitlines()]
    first, last = (x for x in lines if x["step"] in (WARM, settings.steps))
    return float((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))


def seconds_of_bare(shards: ShardSet, settings: TrainSettings, processes: Processes) -> float:
    """Return the seconds a step takes in a plain loop over the same batches."""
    clip, steps = teacher(), settings.steps
    assert steps is not None
    model: Any = clip.model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=settings.betas)
    pairs = TrainingPairs(shards, clip.tokenizer(), clip.image_size, settings.augment, 0)
    schedule = BatchSchedule(shards, settings.batch_size, 0, 1, 0)
    loader = training_batches(pairs, schedule, start=0, end=steps, workers=0, pin=False)
    shape = preprocessing(clip.architecture)
    normalise = Normalise(shape["mean"], shape["std"], processes.device, channels_last=True)
    started = 0.0
    for step, batch in enumerate(loader):
        if step == WARM:
            started = time.perf_counter()
        image = F.normalize(model.encode_image(normalise(batch.images)), dim=-1)
        text = F.normalize(model.encode_text(batch.tokens), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T
        target = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return (time.perf_counter() - started) / (steps - WARM)


def overhead(args: argparse.Namespace) -> None:
    """Print our step's time as a ratio of a bare loop's."""
    processes = join("cpu")
    settings = TrainSettings(
        steps=args.steps, batch_size=args.batch, log_every=WARM, save_every=args.steps + 1
    )
    with tempfile.TemporaryDirectory() as folder:
        shards = scenes(Path(folder))
        ratios = []
        for number in range(args.rounds):
            bare = seconds_of_bare(shards, settings, processes)
            ours = seconds_of_ours(shards, settings, processes)
            ratios.append(ours / bare)
            print(f"round {number + 1}: bare {bare:.4f} s, ours {ours:.4f} s, x {ours / bare:.3f}")
    print(f"overhead of our loop: x {statistics.median(ratios):.3f} (asked: at most 1.05)")


class _Engine:
    """What a step needs of an engine, without DeepSpeed: the measurement is of the step alone."""

    def __init__(self, module: Trainee) -> None:
        self.module = module

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        pass


class _Saved:
    """Bytes that autograd keeps for the backward pass: their peak, parameters left out."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.alive: dict[int, list[int]] = {}
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        where = storage.data_ptr()
        if where in self.parameters:
            return tensor, None
        entry = self.alive.setdefault(where, [0, storage.nbytes()])
        if entry[0] == 0:
            self.now += entry[1]
            self.peak = max(self.peak, self.now)
        entry[0] += 1
        return tensor, _Release(self, where)

    def drop(self, where: int) -> None:
        entry = self.alive[where]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= entry[1]
            del self.alive[where]


class _Release:
    """Tells a `_Saved` when autograd lets go of a tensor."""

    def __init__(self, owner: _Saved, where: int) -> None:
        self.owner, self.where = owner, where

    def __del__(self) -> None:
        self.owner.drop(self.where)


def chunks(args: argparse.Namespace) -> None:
    """Print time and activation memory of 4 chunks as ratios of the whole batch's."""
    clip = teacher()
    trainee = Trainee(clip.model.train(), build_objective("task", 128), 100.0)
    engine = _Engine(trainee)
    images = torch.randn(args.batch, 3, 64, 64).to(memory_format=torch.channels_last)
    tokens = clip.tokenizer()([f"a photo of {i} things" for i in range(args.batch)])

    def plain() -> None:
        plain_step(engine, images, tokens, Lesson(), torch.Generator())

    def chunked() -> None:
        cached_step(engine, images, tokens, Lesson(), torch.Generator(), 4)

    times: dict[str, list[float]] = {"whole": [], "chunks": []}
    for number in range(args.rounds + 1):
        for name, body in (("whole", plain), ("chunks", chunked)):
            started = time.perf_counter()
            body()
            if number:
                times[name].append(time.perf_counter() - started)
            trainee.zero_grad()
    ratio = statistics.median(c / w for c, w in zip(times["chunks"], times["whole"], strict=True))
    peaks = {name: _peak(trainee, body) for name, body in (("whole", plain), ("chunks", chunked))}
    share = peaks["chunks"] / peaks["whole"]
    print(f"4 chunks of a batch of {args.batch}: x {ratio:.2f} the time (asked: at most 1.5), "
          f"x {share:.2f} the activation memory (asked: at most 0.45; "
          f"{peaks['whole'] / 1e6:.0f} -> {peaks['chunks'] / 1e6:.0f} MB)")  # fmt: skip


def _peak(trainee: Trainee, body: Callable[[], None]) -> int:
    saved = _Saved(trainee)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda packed: packed[0]):
        body()
    trainee.zero_grad()
    return saved.peak


def open_clip(args: argparse.Namespace) -> None:
    """Print samples per second of `open_clip_train.main` and ours on RN50, the same shards."""
    train_shards = sorted(args.shards.glob("flickr8k-train-*.tar"))
    with tempfile.TemporaryDirectory() as folder:
        ratios = []
        for number in range(args.rounds):
            ours = _our_rate(args, Path(folder) / f"ours-{number}")
            theirs = _their_rate(args, train_shards, Path(folder) / f"theirs-{number}")
            ratios.append(ours / theirs)
            print(f"round {number + 1}: ours {ours:.2f}, open_clip {theirs:.2f} samples/s, "
                  f"x {ours / theirs:.2f}", flush=True)  # fmt: skip
    print(f"RN50, batch {args.batch}: x {statistics.median(ratios):.2f} (asked: at least 1.0)")


def _our_rate(args: argparse.Namespace, out: Path) -> float:
    out.mkdir(parents=True)
    train_section = {"steps": args.steps, "batch_size": args.batch, "workers": 1, "log_every": 1,
                     "warmup": 1}  # fmt: skip
    sets = [{"name": "flickr8k", "kind": "retrieval", "shards": "flickr8k-test-000000.tar"}]
    content = {
        "name": "bench", "device": "cpu",
        "data": {"root": str(args.shards.resolve()), "train": "flickr8k-train-*.tar"},
        "train": train_section, "arms": {"rn50": {"kind": "scratch", "model": "RN50"}},
        "eval": {"sets": sets},
    }  # fmt: skip
    config = out / "bench.yaml"
    config.write_text(json.dumps(content))  # JSON is YAML
    command = [sys.executable, "-m", "pipeline.cli"]
    for stage in (["run", str(config), "--stage", "data"], ["train", str(config), "--arm", "rn50"]):
        subprocess.run([*command, *stage, "--out", str(out)], check=True, cwd=ROOT,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    log = (out / "arms/rn50/train.jsonl").read_text().splitlines()
    seconds = {line["step"]: line["seconds"] for line in map(json.loads, log)}
    return float((args.steps - WARM) * args.batch / (seconds[args.steps] - seconds[WARM]))


def _their_rate(args: argparse.Namespace, shards: list[Path], out: Path) -> float:
    command = [
        str(args.peer_python), "-m", "open_clip_train.main", "--model", "RN50", "--device", "cpu",
        "--train-data", "::".join(map(str, shards)), "--dataset-type", "webdataset",
        "--train-num-samples", str(args.steps * args.batch), "--batch-size", str(args.batch),
        "--epochs", "1", "--workers", "1", "--precision", "fp32", "--log-every-n-steps", "1",
        "--warmup", "1", "--logs", str(out), "--save-frequency", "0",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    rates = [float(x) for x in re.findall(r"([\d.]+)/s, [\d.]+/s/gpu", done.stdout + done.stderr)]
    if done.returncode or len(rates) <= WARM:
        sys.exit(f"open_clip_train failed:\n{(done.stdout + done.stderr)[-3000:]}")
    kept = rates[WARM:]
    return len(kept) / sum(1 / rate for rate in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parts = parser.add_subparsers(required=True)
    for name, body, batch, steps, rounds in (
        ("overhead", overhead, 64, 40, 5), ("chunks", chunks, 128, 0, 7),
        ("open_clip", open_clip, 16, 12, 2),
    ):  # fmt: skip
        part = parts.add_parser(name, help=(body.__doc__ or "").strip())
        part.add_argument("--batch", type=int, default=batch)
        part.add_argument("--steps", type=int, default=steps)
        part.add_argument("--rounds", type=int, default=rounds)
        part.add_argument("--shards", type=Path, help="folder of the Flickr8k shards")
        part.add_argument(
            "--peer-python", type=Path, help="Python that has open_clip_torch[training]"
        )
        part.set_defaults(body=body)
    args = parser.parse_args()
    args.body(args)


if __name__ == "__main__":
    main()
