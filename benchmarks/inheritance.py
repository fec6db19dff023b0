"""What inheritance keeps before any training, and what it costs: two quality tables, speed ratios.

    python benchmarks/inheritance.py [--only cifar demo speed] [--data ../shared/data]

It is shaped to end within half an hour on two free cores; --images, --calibration, --pairs and
--model make it shorter.

cifar: the CIFAR-100 ResNet-56, its 3x3 convolutions inherited at 0.8, 0.6, 0.4 of their weights.
demo:  the demo teacher at 0.4 of its heavy layers' weights (trained by the ordinary command if
missing).
speed: RN101 with random weights: time and memory of an inheritance, images per second against the
       teacher and against stacked heads, and a latency budget.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)
SHARES = (0.8, 0.6, 0.4)
BASELINE_IMAGES = 2000  # each pass over all 10,000 test images takes half a minute
DEMO = ROOT / "runs" / "demo"


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if width_in != width:
            shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet56(nn.Module):
    """The CIFAR network whose trained weights come with the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(16)
        widths = ((16, 16), (16, 32), (32, 64))
        for i, (before, width) in enumerate(widths, start=1):
            blocks = [Block(before, width, 1 if before == width else 2)]
            blocks += [Block(width, width, 1) for _ in range(8)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, 100)

    def forward(self, x: Tensor) -> Tensor:
        """Classify [B, 3, 32, 32] -> [B, 100]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(name)(x)
        return self.fc(x.mean(dim=(2, 3)))


def resnet56(data: Path) -> ResNet56:
    """Build the network with its trained weights."""
    from safetensors.torch import load_file

    model = ResNet56()
    found = model.load_state_dict(load_file(data / "cifar100-resnet56.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in found.missing_keys)
    return model.eval()


def cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Read a CIFAR-100 shard of class sheets: normalised images [N,3,32,32], labels [N]."""
    from PIL import Image

    files: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, kind = member.name.rpartition(".")
            files.setdefault(key, {})[kind] = tar.extractfile(member).read()  # type: ignore[union-attr]
    images, labels = [], []
    for parts in files.values():
        sheet = np.asarray(Image.open(io.BytesIO(parts["webp"])).convert("RGB"))
        tiles = sheet.reshape(10, 32, 10, 32, 3).swapaxes(1, 2).reshape(100, 32, 32, 3)
        images.append(torch.from_numpy(tiles))
        labels += [json.loads(parts["json"])["label"]] * 100
    x = torch.cat(images).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], torch.tensor(labels)[order]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 in per cent."""
    hits = sum(
        int((model(x).argmax(dim=1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return 100 * hits / len(images)


def bench_cifar(data: Path, count: int, calibration: int, heads: tuple[int, ...]) -> None:
    """Print top-1 of the ResNet-56 by arm, share and heads; the last rows are the defaults."""
    from pipeline.inherit import inherit

    teacher = resnet56(data)
    images, labels = cifar(data / "cifar100-test-000000.tar")
    images, labels = images[:count], labels[:count]
    seen = cifar(data / "cifar100-train-000000.tar")[0][:calibration]
    print(f"\nCIFAR-100 ResNet-56, top-1 % of {len(images)} test images before any training")
    print("(3x3 convolutions; arm, ranks, heads, calibration images of the training set;")
    print(f" the first three arms, for comparison, on the first {BASELINE_IMAGES} test images)")
    print(f"teacher {accuracy(teacher, images, labels):.2f}")
    plain = {"steps": 0, "dense": False, "ridge": 0.02}
    few = min(1024, calibration)
    rows: list[tuple[str, str, int, int, dict[str, Any]]] = [
        ("svd", "fraction", 1, 0, {}),
        ("activation", "fraction", 1, few, {}),
        ("sequential", "fraction", 1, few, plain | {"compensate": False}),
        *(("sequential", "balanced", h, len(seen), {}) for h in heads),
    ]
    for arm, allocator, h, images_seen, refit in rows:
        tested = slice(None if allocator == "balanced" else BASELINE_IMAGES)
        line = f"{arm:<11}{'plain' if refit else allocator:<10}H={h} {images_seen:>5}"
        for share in SHARES:
            start = time.perf_counter()
            new, _ = inherit(
                teacher, f"weights={share}", seen[:images_seen] if images_seen else None, h, arm,
                include=("conv1", "layer*.conv*"), allocator=allocator, refit=refit,
            )  # fmt: skip
            took = time.perf_counter() - start
            line += (
                f"  {share}: {accuracy(new, images[tested], labels[tested]):6.2f} ({took:.0f} s)"
            )
        print(line, flush=True)


def demo_teacher(run: Path) -> Any:
    """Load the demo's teacher; train it with the ordinary command if it is not there."""
    from pipeline.models import load_checkpoint

    folder = run / "arms" / "teacher" / "checkpoint"
    if run == DEMO and not (folder / "model.json").exists():
        command = [sys.executable, "-m", "pipeline.cli", "run", "configs/demo.yaml"]
        subprocess.run([*command, "--only", "teacher"], check=True, cwd=ROOT)
    return load_checkpoint(folder)


@torch.no_grad()
def recall(model: Any, images: Tensor, tokens: Tensor, owner: Tensor) -> tuple[float, float]:
    """Return R@1 image to text and text to image."""
    from eval.retrieval import recall_at_k

    model.eval()
    v = torch.cat([model.encode_image(x, normalize=True) for x in images.split(128)])
    t = torch.cat([model.encode_text(x, normalize=True) for x in tokens.split(512)])
    found = recall_at_k(v, t, owner)
    return found["i2t_r1"], found["t2i_r1"]


def bench_demo(run: Path) -> None:
    """Print R@1 of the demo teacher's descendants."""
    from PIL import Image

    from data_prep.reader import ShardSet
    from pipeline.inherit import inherit
    from pipeline.stages import calibration_pairs

    clip = demo_teacher(run)
    test = ShardSet.find(run / "data", "scenes-test-*.tar")
    train = ShardSet.find(run / "data", "scenes-train-*.tar")
    calibration = calibration_pairs(train, clip, 512, 0)
    transform, tokenizer = clip.transform(), clip.tokenizer()
    images, captions, owner = [], [], []
    for i in range(test.num_samples):
        raw = test.read(i)
        with Image.open(io.BytesIO(raw.image_bytes)) as image:
            images.append(transform(image.convert("RGB")))
        captions += raw.captions
        owner += [i] * len(raw.captions)
    pixels, tokens, owners = torch.stack(images), tokenizer(captions), torch.tensor(owner)
    base = recall(clip.model, pixels, tokens, owners)
    print(f"\nDemo teacher, {len(images)} test pairs, R@1 I2T / T2I {base[0]:.3f} / {base[1]:.3f}")
    print("descendants at 0.4 of the heavy layers' weights, before any training:")
    for arm, allocator, heads in (
        ("svd", "fraction", 1),
        ("activation", "fraction", 1),
        ("activation", "energy", 1),
        ("activation", "sensitivity", 1),
        ("sequential", "fraction", 1),
        ("sequential", "energy", 1),
        ("sequential", "sensitivity", 1),
        ("sequential", "balanced", 1),
        ("sequential", "balanced", 3),
    ):
        new, _ = inherit(clip.model, "weights=0.4", calibration, heads, arm, allocator=allocator)
        r = recall(new, pixels, tokens, owners)
        share = f"{r[0] / base[0]:.3f} / {r[1] / base[1]:.3f} of the teacher's"
        print(f"{arm:<11}{allocator:<12} H={heads}  {r[0]:.3f} / {r[1]:.3f}  ({share})", flush=True)


def untrained(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return an architecture with random weights, 16 images and captions."""
    from pipeline.teachers import load_teacher

    clip = load_teacher(name, untrained=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, clip.image_size, clip.image_size, generator=generator)
    tokens = clip.tokenizer()([f"a photo of {i} things on a table" for i in range(16)])
    return clip.model.eval(), images, tokens


def worker(arm: str, name: str, pairs: int) -> None:
    """Inherit a model and print seconds and peak memory as JSON (run in a process of its own)."""
    from pipeline.inherit import inherit

    model, images, tokens = untrained(name)
    batches = None
    if arm != "svd":
        count = max(1, pairs // len(images))
        batches = [(torch.randn_like(images), tokens) for _ in range(count)]
    start = time.perf_counter()
    _, plan = inherit(model, "params=0.5", batches, 3, arm)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    achieved = plan.total_after / plan.total_before
    print(json.dumps({"arm": arm, "seconds": seconds, "peak_gb": peak, "params": achieved}))


def stack_heads(model: nn.Module) -> None:
    """Evaluate every layer by the definition: all H outputs, then their gated sum."""
    from pipeline.inherit.layers import InheritedConv2d, InheritedLinear

    def conv(layer: InheritedConv2d, x: Tensor) -> Tensor:
        h = layer.down(x)
        gates = layer.gates(h.mean(dim=(2, 3)))
        outputs = [F.conv2d(h, up[:, :, None, None], groups=layer.groups) for up in layer.up]
        y = (torch.stack(outputs, dim=1) * gates[:, :, None, None, None]).sum(dim=1)
        return y if layer.bias is None else y + layer.bias[:, None, None]

    def linear(layer: InheritedLinear, x: Tensor) -> Tensor:
        h = layer.down(x)
        outputs = torch.stack([h @ up.T for up in layer.up], dim=-1)
        y = (outputs * layer.gates(h).unsqueeze(-2)).sum(dim=-1)
        return y if layer.bias is None else y + layer.bias

    for module in model.modules():
        if isinstance(module, InheritedConv2d):
            module.forward = conv.__get__(module)  # type: ignore[method-assign]
        elif isinstance(module, InheritedLinear):
            module.forward = linear.__get__(module)  # type: ignore[method-assign]


@torch.inference_mode()
def image_rates(models: dict[str, Any], images: Tensor, rounds: int = 5) -> dict[str, float]:
    """Return images per second; the models take turns, so that a busy machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for step in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model.encode_image(images)
            if step:
                times[name].append(time.perf_counter() - start)
    return {name: len(images) / float(np.median(seconds)) for name, seconds in times.items()}


def bench_speed(name: str, pairs: int) -> None:
    """Print time and memory of an inheritance (RN101 by default), and the speed of the result."""
    from pipeline.inherit import inherit
    from pipeline.inherit.latency import compare_latency

    print(f"\n{name}, random weights, {torch.get_num_threads()} threads")
    for arm in ("svd", "activation"):
        command = [sys.executable, __file__, "--worker", arm, "--model", name]
        command += ["--pairs", str(pairs)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        r = json.loads(done.stdout.splitlines()[-1])
        print(
            f"inherit {arm:<10} params={r['params']:.4f} of the teacher: {r['seconds']:.0f} s, "
            f"peak {r['peak_gb']:.1f} GB",
            flush=True,
        )
    model, images, tokens = untrained(name)
    new, plan = inherit(model, "params=0.5", None, 3, "svd")
    stacked = copy.deepcopy(new)
    stack_heads(stacked)
    rates = image_rates({"teacher": model, "inherited": new, "stacked": stacked}, images)
    print(f"images/s at batch 16: {', '.join(f'{n} {v:.1f}' for n, v in rates.items())}")
    print(f"  inherited / teacher {rates['inherited'] / rates['teacher']:.2f}")
    print(f"  inherited / stacked {rates['inherited'] / rates['stacked']:.2f}", flush=True)
    batch = (images, tokens)
    fast, plan = inherit(model, "latency=0.5", [batch], 3, "svd")
    before, after = compare_latency(model, fast, batch, None, rounds=9)
    print(
        f"latency=0.5: measured {after / before:.3f} of the teacher's "
        f"(params {plan.total_after / plan.total_before:.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parts = ("cifar", "demo", "speed")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--images", type=int, default=10_000, help="CIFAR test images")
    parser.add_argument("--calibration", type=int, default=4096, help="CIFAR training images")
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--demo", type=Path, default=DEMO, help="run folder of configs/demo.yaml")
    parser.add_argument(
        "--pairs", type=int, default=256, help="calibration pairs of the speed part"
    )
    parser.add_argument("--model", default="RN101", help="architecture of the speed part")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.model, args.pairs)
        return
    if "cifar" in args.only:
        bench_cifar(args.data, args.images, args.calibration, tuple(args.heads))
    if "demo" in args.only:
        bench_demo(args.demo)
    if "speed" in args.only:
        bench_speed(args.model, args.pairs)


if __name__ == "__main__":
    main()
