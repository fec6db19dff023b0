"""A whole experiment small enough to run in seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.scenes import ScenesConfig, build_scenes
from tests.conftest import REPOSITORY


def tiny_model(width: int = 8, text_width: int = 32) -> dict[str, Any]:
    return {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "layers": [1, 1, 1, 1],
            "width": width,
            "head_width": width * 8,
            "patch_size": None,
        },
        "text_cfg": {
            "context_length": 24,
            "vocab_size": 1024,
            "width": text_width,
            "heads": 4,
            "layers": 2,
        },
    }


def tiny_experiment() -> dict[str, Any]:
    return {
        "name": "tiny",
        "device": "cpu",
        "data": {
            "scenes": {
                "image_size": 32,
                "train": 96,
                "val": 8,
                "test": 16,
                "zero_shot": 24,
                "samples_per_shard": 40,
            },
            "train": "scenes-train-*.tar",
        },
        "train": {"steps": 60, "batch_size": 16, "warmup": 2, "log_every": 3, "save_every": 20},
        "arms": {
            "teacher": {"kind": "scratch", "model": tiny_model()},
            "inherited": {
                "kind": "inherited",
                "teacher": "teacher",
                "budget": "params=0.5",
                "heads": 2,
                "calibration": 32,
            },
            "student": {"kind": "scratch", "model": tiny_model(4, 16)},
            "student_clipkd": {
                "kind": "scratch",
                "model": tiny_model(4, 16),
                "objective": "clip_kd",
                "teacher": "teacher",
            },
        },
        "eval": {
            "sets": [
                {"name": "scenes", "kind": "retrieval", "shards": "scenes-test-*.tar"},
                {
                    "name": "classes",
                    "kind": "zero_shot",
                    "shards": "scenes-classes-*.tar",
                    "classes": "classes.json",
                },
            ],
            "efficiency": False,
            "examples": 2,
        },
    }


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 96 training scenes of 32 pixels in three shards."""
    folder = tmp_path_factory.mktemp("scenes")
    config = ScenesConfig(image_size=32, train=96, val=8, test=8, zero_shot=8, samples_per_shard=40)
    build_scenes(config, folder)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the tiny experiment, with changes, and returns its path."""

    def write(change: Callable[[dict[str, Any]], None] | None = None, name: str = "tiny") -> Path:
        content = tiny_experiment()
        if change:
            change(content)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def inherclip(
    *args: object, code: int | None = 0, timeout: float = 600, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would; check its exit code unless `code` is None."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, args)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if code is not None:
        assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done
