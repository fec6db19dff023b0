"""A rank that dies, is stopped or hangs: the others end in time and say which it was."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from pipeline.train.liveness import LOST_RANK
from tests.pipeline.launch import start_plainly, wait_for_step


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_rank_is_named_in_time(
    scenes: Path, tmp_path: Path, victim: int, blow: signal.Signals
) -> None:
    """Killed: within 60 s at any settings. Stopped: within silence_seconds and two beats."""
    silence = 45 if blow == signal.SIGKILL else 10
    out = tmp_path / "run"
    children = start_plainly(out, scenes, steps=100_000, pause=0.05, silence_seconds=silence)
    try:
        wait_for_step(out, 5, children)
        children[victim].send_signal(blow)
        struck = time.monotonic()
        output = children[1 - victim].communicate(timeout=120)[0]
        seconds = time.monotonic() - struck
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert children[1 - victim].returncode == LOST_RANK, output
    assert re.search(rf"rank {victim} .*has not been heard of for \d+ s", output)
    assert "The same command continues" in output
    assert seconds < (60 if blow == signal.SIGKILL else silence * 1.5 + 5)


@pytest.mark.slow
def test_a_rank_that_lives_but_hangs_is_named(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    children = start_plainly(out, scenes, steps=100_000, hang=5, timeout_minutes=0.2)
    try:
        output = children[0].communicate(timeout=120)[0]
    finally:
        children[1].kill()
        children[1].communicate()
    assert children[0].returncode == LOST_RANK, output
    assert re.search(r"rank 1 .*is the furthest behind.*waiting for data", output)


@pytest.mark.slow
def test_a_rank_that_fails_tells_the_others_why(scenes: Path, tmp_path: Path) -> None:
    """The disk of one rank is full: every rank stops with that reason, and none waits."""
    out = tmp_path / "run"
    children = start_plainly(out, scenes, steps=60, save_every=5, full=12, pause=0.05)
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [2, 2], outputs
    assert "no space left for a checkpoint" in outputs[0]
    assert "free some space" in outputs[0]
    whole = sorted((out / "resume/same").glob("step-*/state.json"))
    assert [path.parent.name for path in whole] == ["step-00000005", "step-00000010"]
