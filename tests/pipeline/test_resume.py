"""Exact resume: killed, told to stop or torn, a training ends with the same weights.

Everything that a step depends on takes part: dropout (the generators of every rank), an average of
the weights, parameters of the losses, BatchNorm statistics of every rank.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from data_prep.files import sha256_file
from pipeline.train.signals import RESUME_ME
from tests.pipeline.in_process import train_here
from tests.pipeline.launch import (
    last_step,
    losses,
    run,
    start,
    start_plainly,
    wait_for_step,
)

COMMON = {
    "steps": 200, "save_every": 10, "objective": "clip_kd", "dropout": 0.1, "ema_samples": 200,
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("resume")]


@pytest.fixture(scope="module")
def undisturbed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return the folder of an undisturbed training with so many ranks."""
    made: dict[int, Path] = {}

    def make(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp(f"undisturbed-{ranks}")
            run(made[ranks], scenes, ranks, **COMMON)
        return made[ranks]

    return make


def same(out: Path, reference: Path, ranks: int = 1) -> bool:
    names = [f"rank-{rank}.safetensors" for rank in range(ranks)]
    assert torch.equal(losses(out), losses(reference))
    return all(sha256_file(out / name) == sha256_file(reference / name) for name in names)


@pytest.mark.parametrize(
    ("ranks", "workers", "kills"), [(1, 0, 3), (1, 2, 3), (2, 0, 2), (2, 2, 2)]
)
def test_killed_at_random_moments_it_ends_with_the_same_weights(
    undisturbed: Callable[[int], Path],
    scenes: Path,
    tmp_path: Path,
    ranks: int,
    workers: int,
    kills: int,
) -> None:
    """The random moments are drawn anew in every run of the test."""
    seed = random.randrange(1 << 30)
    moments = random.Random(seed)
    for kill in range(kills):
        child = start(tmp_path, scenes, ranks, workers=workers, **COMMON)
        target = 1 + moments.randrange(190 * kill // kills, 190 * (kill + 1) // kills)
        while last_step(tmp_path / "train.jsonl") < target:
            assert child.poll() is None, f"seed {seed}: over early\n{child.communicate()[0]}"
            time.sleep(0.002)
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    output = run(tmp_path, scenes, ranks, workers=workers, **COMMON)
    assert "resuming after step" in output
    assert same(tmp_path, undisturbed(ranks), ranks), f"seed {seed}"


def test_usr1_saves_once_and_the_next_start_ends_with_the_same_weights(
    undisturbed: Callable[[int], Path], scenes: Path, tmp_path: Path
) -> None:
    children = start_plainly(tmp_path, scenes, **{**COMMON, "save_every": 1000})
    wait_for_step(tmp_path, 30, children)
    children[1].send_signal(signal.SIGUSR1)  # one rank is told; all agree
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [RESUME_ME, RESUME_ME], outputs
    assert "stopped on request after step" in outputs[0]
    assert len(list((tmp_path / "resume/same").glob("step-*/state.json"))) == 1
    run(tmp_path, scenes, 2, **COMMON)
    assert same(tmp_path, undisturbed(2), 2)


def test_a_second_signal_ends_at_once(scenes: Path, tmp_path: Path) -> None:
    child = start(tmp_path, scenes, pause=5, steps=9)  # the step boundary is seconds away
    while not (tmp_path / "train.jsonl").is_file():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=3)
    assert child.returncode == 128 + signal.SIGTERM


def test_a_damaged_or_torn_checkpoint_is_passed_over_for_the_one_before(
    undisturbed: Callable[[int], Path], scenes: Path, tmp_path: Path
) -> None:
    child = start(tmp_path, scenes, pause=0.05, **COMMON)
    while not (tmp_path / "resume/same/step-00000020/state.json").is_file():
        assert child.poll() is None
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    torn = sorted((tmp_path / "resume/same").glob("step-*"))[-1]
    damaged = tmp_path / "resume/same/step-00000020"
    for folder in {torn, damaged}:
        model = next(folder.glob("*model_states.pt"), None)
        if model is not None:
            model.write_bytes(model.read_bytes()[:-10])
    output = run(tmp_path, scenes, **COMMON)
    assert "step-00000020 is damaged" in output
    assert "resuming after step 10" in output
    assert same(tmp_path, undisturbed(1))


def test_optimizer_parts_of_another_stage_or_world_are_refused_by_name(
    scenes: Path, tmp_path: Path
) -> None:
    options = {"steps": 8, "save_every": 4, "warmup": 2}
    run(tmp_path, scenes, 2, zero_stage=1, **options)
    with pytest.raises(UserError, match="2 processes at ZeRO stage 1; there are 1 now"):
        train_here(tmp_path, scenes, zero_stage=1, **options)
    with pytest.raises(UserError, match="written at ZeRO stage 1, this is stage 0"):
        train_here(tmp_path, scenes, zero_stage=0, **options)


def test_without_zero_any_number_of_processes_goes_on(scenes: Path, tmp_path: Path) -> None:
    """BatchNorm is frozen, so that two ranks and one process are the same model."""
    options = {"steps": 8, "save_every": 4, "batchnorm": "frozen", "warmup": 2}
    run(tmp_path / "moved", scenes, 2, **options)
    whole = train_here(tmp_path / "whole", scenes, **options)
    moved = train_here(tmp_path / "moved", scenes, **options)
    assert "resuming after step 4" in " ".join(moved.said)
    torch.testing.assert_close(moved.losses, whole.losses, rtol=1e-5, atol=1e-5)
