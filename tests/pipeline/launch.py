"""Start `tests.pipeline.ranks` in processes of its own, and read what it left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.conftest import REPOSITORY


def start(out: Path, data: Path, ranks: int = 1, **options: object) -> subprocess.Popen[str]:
    out.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    pairs = [f"{key}={value}" for key, value in options.items()]
    return subprocess.Popen(
        [*launcher, "tests.pipeline.ranks", str(out), f"data={data}", *pairs],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(child: subprocess.Popen[str], code: int = 0) -> str:
    output = child.communicate(timeout=600)[0]
    assert child.returncode == code, output[-4000:]
    return output


def run(out: Path, data: Path, ranks: int = 1, code: int = 0, **options: object) -> str:
    return finish(start(out, data, ranks, **options), code)


def losses(out: Path) -> torch.Tensor:
    return torch.tensor(json.loads((out / "losses.json").read_text()))


def logged(out: Path, name: str) -> torch.Tensor:
    """Return one value of every record of a `train.jsonl`."""
    lines = (out / "train.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)[name] for line in lines])


def start_plainly(out: Path, data: Path, **options: object) -> list[subprocess.Popen[str]]:
    """Start two ranks as srun does: each on its own, with nobody who ends the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pairs = [f"{key}={value}" for key, value in options.items()]
    out.mkdir(parents=True, exist_ok=True)
    common = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.pipeline.ranks", str(out), f"data={data}", *pairs],
            cwd=REPOSITORY,
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in (0, 1)
    ]


def wait_for_step(out: Path, step: int, children: list[subprocess.Popen[str]]) -> None:
    """Wait until a training has logged a step."""
    log = out / "train.jsonl"
    while last_step(log) < step:
        assert all(child.poll() is None for child in children), children[0].communicate()[0]
        time.sleep(0.005)


def last_step(log: Path) -> int:
    """Return the last step in a `train.jsonl` that is being written, 0 if there is none."""
    lines = log.read_text().splitlines() if log.is_file() else []
    whole = [line for line in lines if line.endswith("}")]
    return int(json.loads(whole[-1])["step"]) if whole else 0
