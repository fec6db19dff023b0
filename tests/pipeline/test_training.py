"""Training: ranks against one process, chunks against one batch, exact resume, signals, faults."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.files import sha256_file
from data_prep.scenes import ScenesConfig, build_scenes
from pipeline.train.settings import TrainSettings
from pipeline.train.update import learning_rate_factor
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    config = ScenesConfig(image_size=32, train=96, val=8, test=8, zero_shot=8, samples_per_shard=40)
    build_scenes(config, folder)
    return folder


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


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one_process(data: Path, tmp_path: Path) -> None:
    """BatchNorm is frozen: a rank normalises by its own rows, which is another model."""
    common = {"batchnorm": "frozen", "objective": "clip_kd"}
    run(tmp_path / "one", data, **common)
    reference = losses(tmp_path / "one")
    assert reference[-1] < reference[0]
    for stage in (0, 1, 2):
        out = tmp_path / f"two-{stage}"
        run(out, data, 2, zero_stage=stage, **common)
        assert (losses(out) - reference).abs().max() < 1e-4 * reference.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_chunks_take_the_same_steps_as_the_whole_batch(
    data: Path, tmp_path: Path, ranks: int
) -> None:
    common = {"batchnorm": "frozen", "objective": "clip_kd", "steps": 10}
    run(tmp_path / "whole", data, ranks, **common)
    run(tmp_path / "chunks", data, ranks, accumulate=4, **common)
    whole, chunks = losses(tmp_path / "whole"), losses(tmp_path / "chunks")
    assert (whole - chunks).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.slow
def test_both_ranks_end_with_the_batchnorm_buffers_that_are_saved(
    data: Path, tmp_path: Path
) -> None:
    run(tmp_path, data, 2, steps=4)
    zero, one = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    means = [name for name in zero if name.endswith("running_mean")]
    assert means
    for name in zero:
        assert torch.equal(zero[name], one[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "workers", "kills"), [(1, 0, 2), (1, 2, 1), (2, 0, 1), (2, 2, 1)]
)
def test_killed_at_random_moments_it_ends_with_the_same_weights(
    data: Path, tmp_path: Path, ranks: int, workers: int, kills: int
) -> None:
    """The random moments are drawn anew in every run of the test."""
    steps = {"steps": 80, "save_every": 10, "objective": "clip_kd"}
    run(tmp_path / "whole", data, ranks, workers=workers, **steps)
    seed = random.randrange(1 << 30)
    moments = random.Random(seed)
    out = tmp_path / "killed"
    for kill in range(kills):
        child = start(out, data, ranks, workers=workers, pause=0.02, **steps)
        log = out / "train.jsonl"
        target = 1 + moments.randrange(50 * kill // kills, 50 * (kill + 1) // kills)
        deadline = time.monotonic() + 400
        while child.poll() is None and time.monotonic() < deadline:
            lines = log.read_text().splitlines() if log.is_file() else []
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= target:
                break
            time.sleep(0.005)
        assert child.poll() is None, f"seed {seed}: ended before the kill\n{child.communicate()[0]}"
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    output = run(out, data, ranks, workers=workers, **steps)
    assert "resuming after step" in output
    whole = tmp_path / "whole/rank-0.safetensors"
    assert sha256_file(out / "rank-0.safetensors") == sha256_file(whole), f"seed {seed}"
    assert (losses(out) == losses(tmp_path / "whole")).all()


@pytest.mark.slow
def test_usr1_saves_once_and_the_next_start_ends_with_the_same_weights(
    data: Path, tmp_path: Path
) -> None:
    common = {"steps": 30, "pause": 0.05, "save_every": 1000}
    run(tmp_path / "whole", data, 2, **common)
    out = tmp_path / "stopped"
    child = start(out, data, 2, **common)
    while (
        not (out / "train.jsonl").is_file() or '"step": 5' not in (out / "train.jsonl").read_text()
    ):
        assert child.poll() is None
        time.sleep(0.01)
    ranks = subprocess.run(
        ["pgrep", "-P", str(child.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGUSR1)  # one rank is told; all agree
    child.communicate(timeout=300)
    assert child.returncode != 0
    saved = list((out / "resume/same").glob("step-*/state.json"))
    assert len(saved) == 1
    run(out, data, 2, **common)
    for rank in (0, 1):
        name = f"rank-{rank}.safetensors"
        assert sha256_file(out / name) == sha256_file(tmp_path / "whole" / name)


@pytest.mark.slow
def test_a_damaged_or_torn_checkpoint_is_passed_over_for_the_one_before(
    data: Path, tmp_path: Path
) -> None:
    options = {"steps": 30, "save_every": 10}
    run(tmp_path / "whole", data, **options)
    out = tmp_path / "torn"
    child = start(out, data, pause=0.05, **options)
    while not (out / "resume/same/step-00000020/state.json").is_file():
        assert child.poll() is None
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    model = next((out / "resume/same/step-00000020").glob("*model_states.pt"))
    model.write_bytes(model.read_bytes()[:-10])
    output = run(out, data, **options)
    assert "step-00000020 is damaged" in output
    assert "resuming after step 10" in output
    name = "rank-0.safetensors"
    assert sha256_file(out / name) == sha256_file(tmp_path / "whole" / name)


@pytest.mark.slow
def test_a_nan_batch_stops_before_the_update_and_names_step_and_samples(
    data: Path, tmp_path: Path
) -> None:
    output = run(tmp_path, data, code=2, steps=6, poison=3, save_every=2)
    assert "step 4: loss or gradient is not finite" in output
    assert "samples: " in output
    assert "Traceback" not in output
    assert "step-00000002" in {p.name for p in (tmp_path / "resume/same").iterdir()}


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    settings = TrainSettings(steps=100, batch_size=8, warmup=10)
    factors = [learning_rate_factor(step, settings) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert factors[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[-1] < 0.001
    constant = settings.model_copy(update={"schedule": "constant"})
    assert learning_rate_factor(99, constant) == 1.0
