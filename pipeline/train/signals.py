"""Signals that ask a training to stop: remembered, agreed on at a step boundary, then obeyed."""

from __future__ import annotations

import os
import signal
from types import FrameType

RESUME_ME = 75  # EX_TEMPFAIL: saved, run the same command again
INTERRUPTED = 130  # Ctrl-C, saved likewise


class StopRequested(Exception):  # noqa: N818 - an outcome, not an error
    """Training stopped on request after saving; `code` is the exit code that says so."""

    def __init__(self, code: int, step: int) -> None:
        super().__init__(f"stopped on request after step {step}; the same command continues")
        self.code, self.step = code, step


class StopSignals:
    """Remember USR1, TERM and INT while the block runs; a second one ends the process at once."""

    caught = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> StopSignals:
        self.code = 0
        self._before = {number: signal.signal(number, self._remember) for number in self.caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.code:
            os._exit(128 + number)
        self.code = INTERRUPTED if number == signal.SIGINT else RESUME_ME
