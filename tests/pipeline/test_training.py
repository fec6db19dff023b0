"""Training: ranks against one process, chunks against one batch, BatchNorm over ranks, faults."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.train.settings import TrainSettings
from pipeline.train.update import learning_rate_factor
from tests.pipeline.launch import logged, losses, run


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one_process(scenes: Path, tmp_path: Path) -> None:
    """An inherited student with gates, and losses on embeddings, layers and gates.

    BatchNorm is frozen: a rank normalises by its own rows, which is another model.
    """
    objective = "{preset: clip_kd, balance: 1, layers: {weight: 1, modules: [visual.layer4]}}"
    common = {"batchnorm": "frozen", "objective": objective, "inherit": 1}
    run(tmp_path / "one", scenes, **common)
    reference = losses(tmp_path / "one")
    assert len(reference) == 20
    assert reference[-1] < reference[0]
    for stage in (0, 1, 2):
        out = tmp_path / f"two-{stage}"
        run(out, scenes, 2, zero_stage=stage, **common)
        torch.testing.assert_close(losses(out), reference, rtol=1e-6, atol=1e-6)
        norms = [logged(folder, "grad_norm") for folder in (out, tmp_path / "one")]
        torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_chunks_take_the_same_steps_as_the_whole_batch(
    scenes: Path, tmp_path: Path, ranks: int
) -> None:
    common = {"batchnorm": "frozen", "objective": "clip_kd", "steps": 10}
    run(tmp_path / "whole", scenes, ranks, **common)
    run(tmp_path / "chunks", scenes, ranks, accumulate=4, **common)
    whole, chunks = losses(tmp_path / "whole"), losses(tmp_path / "chunks")
    torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_both_ranks_end_with_the_batchnorm_buffers_that_are_saved(
    scenes: Path, tmp_path: Path
) -> None:
    run(tmp_path, scenes, 2, steps=4)
    zero, one = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    means = [name for name in zero if name.endswith("running_mean")]
    assert means
    for name in zero:
        assert torch.equal(zero[name], one[name]), name


@pytest.mark.slow
def test_a_nan_batch_stops_before_the_update_and_names_step_and_samples(
    scenes: Path, tmp_path: Path
) -> None:
    output = run(tmp_path, scenes, code=2, steps=6, poison=3, save_every=2)
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
