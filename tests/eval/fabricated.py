"""A run folder as `inherclip run` leaves it, with made-up numbers; no model runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from eval.results import write_result

ARMS: dict[str, tuple[float, float]] = {
    "teacher": (0.9, 2.0e6),
    "inherited": (0.8, 0.8e6),
    "student": (0.5, 0.8e6),
    "student_clipkd": (0.6, 0.8e6),
}
"""arm -> (share of queries it gets right, parameters)."""
IMAGES, CAPTIONS = 60, 3


def ranks(share: float, count: int, seed: int) -> np.ndarray:
    """[count] ranks of which about `share` are 1."""
    draws = np.random.default_rng(seed).random(count)
    return np.where(draws < share, 1, 2 + (draws * 30).astype(int)).astype(np.int32)


def write_arm(folder: Path, arm: str, seed: int, share: float, params: float) -> None:
    """Write eval.json, queries.npz and train.jsonl of one arm."""
    folder.mkdir(parents=True, exist_ok=True)
    i2t, t2i = ranks(share, IMAGES, seed), ranks(share, IMAGES * CAPTIONS, seed + 1)
    classes = ranks(share, 40, seed + 2)
    metrics = {"params": params, "macs": 50 * params, "latency_ms_b1": 7.5, "images_per_s": 812.4}
    for k in (1, 5, 10):
        metrics[f"scenes/t2i_r{k}"] = float((t2i <= k).mean())
        metrics[f"scenes/i2t_r{k}"] = float((i2t <= k).mean())
    metrics |= {"shapes/top1": float((classes <= 1).mean()), "scenes/images": IMAGES}
    write_result(
        folder / "eval.json",
        arm=arm,
        checkpoint_sha256=f"{seed:064x}",
        metrics=metrics,
        seed=seed,
        steps=100,
        conditions={"device": "a processor", "threads": 2},
    )
    arrays = {
        "rank:scenes/i2t": i2t,
        "rank:scenes/t2i": t2i,
        "rank:shapes/class": classes,
        "owner:scenes": np.repeat(np.arange(IMAGES), CAPTIONS),
    }
    np.savez_compressed(folder / "queries.npz", allow_pickle=False, **arrays)
    lines = [
        {"step": step, "loss": 9 / step, "loss/task": 3 / step, "seconds": step * 0.6}
        for step in range(1, 101, 3)
    ]
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def write_run(run: Path, *, seeds: int = 1, examples: bool = False) -> Path:
    """Write a run with all arms done; `seeds` above 1 gives arms/ARM-seedN."""
    config: dict[str, Any] = {
        "name": "made-up",
        "seed": 0,
        "data": {"scenes": {"train": 12000, "image_size": 64}, "train": "scenes-train-*.tar"},
        "arms": {
            arm: {"kind": "inherited" if arm == "inherited" else "scratch"}
            for arm in reversed(ARMS)
        },
        "eval": {"sets": [{"name": "scenes"}, {"name": "shapes"}]},
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (run / "run.json").write_text(
        json.dumps(
            {"command": "inherclip run made-up.yaml", "seconds": 4000, "hardware": "2 cores"}
        )
    )
    for arm, (share, params) in ARMS.items():
        for seed in range(seeds):
            name = arm if seeds == 1 else f"{arm}-seed{seed}"
            write_arm(run / "arms" / name, arm, seed, share, params)
            if examples:
                write_example(run / "arms" / name)
    heir = run / "arms" / ("inherited" if seeds == 1 else "inherited-seed0")
    write_result(
        heir / "eval_before.json",
        arm="inherited",
        checkpoint_sha256="0" * 64,
        metrics={"scenes/i2t_r1": 0.5, "scenes/t2i_r1": 0.4, "shapes/top1": 0.3, "params": 0.8e6},
        stage="before_training",
        seed=0,
        steps=0,
    )
    (heir / "plan.json").write_text(json.dumps(plan()))
    return run


def plan() -> dict[str, Any]:
    """The inheritance report of three layers."""
    layers = [
        {"name": "visual.stem", "kind": "conv", "shape": [8, 3, 3, 3], "rank": None, "heads": 0,
         "params_before": 216, "params_after": 216, "macs_before": 9, "macs_after": 9.0,
         "reason": "not smaller"},
        {"name": "visual.body", "kind": "conv", "shape": [64, 64, 3, 3], "rank": 16, "heads": 3,
         "params_before": 36864, "params_after": 12304, "macs_before": None, "macs_after": None,
         "reason": ""},
        {"name": "token_embedding", "kind": "embedding", "shape": [49408, 32], "rank": 8,
         "heads": 1, "params_before": 1581056, "params_after": 395520, "reason": ""},
    ]  # fmt: skip
    return {"total_before": 2000000, "total_after": 800000, "towers": {}, "layers": layers}


def write_example(folder: Path) -> None:
    """Write examples whose texts would break a page that did not escape them."""
    (folder / "examples").mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (90 * number, 40, 200)).save(folder / f"examples/{number}.jpg")
    text = 'a <script>alert("x")</script> & a "quote"'
    shown = {"key": "k0", "image": "examples/0.jpg", "score": 0.5, "right": True}
    other = {"key": "k1", "image": "examples/1.jpg", "score": 0.4, "right": False}
    content = {
        "set": "scenes",
        "images": IMAGES,
        "captions": IMAGES * CAPTIONS,
        "text_to_image": [
            {"key": "k0", "image": "examples/0.jpg", "text": text, "results": [shown, other]}
        ],
        "image_to_text": [
            {
                "key": "k0",
                "image": "examples/0.jpg",
                "results": [{"key": "k0", "text": text, "score": 0.5, "right": True}],
            }
        ],
    }
    (folder / "examples.json").write_text(json.dumps(content))
