"""Two gloo ranks with half of the batch each against one process with all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import objective_ranks
import pytest
import torch


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, objective_ranks.__file__]
    running = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], cwd=Path.cwd()) for rank in (0, 1)
    ]
    objective_ranks.main(0, 1, folder)
    try:
        assert [process.wait(timeout=120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return {size: torch.load(folder / f"{size}.pt", weights_only=True) for size in (1, 2)}


@pytest.mark.parametrize("case", list(objective_ranks.CASES))
def test_two_ranks_equal_one_process(results: dict[int, Any], case: str) -> None:
    one, two = results[1][case], results[2][case]
    assert one.keys() == two.keys()
    for name in one:
        scale = max(1.0, one[name].abs().max().item())
        assert (one[name] - two[name]).abs().max().item() <= 1e-6 * scale, name
