"""Which rank is missing: ranks tell each other that they live, and what they are doing.

A rank that dies or is stopped leaves the others in a collective that says nothing of whom it waits
for; with NCCL it may wait for ever. Here every rank writes a beat into a small store of rank 0
every few seconds from a thread, reads the others', and ends its own process with the missing rank's
name when one has been silent for too long.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from pipeline.train.processes import Processes
from pipeline.train.signals import StopRequested

LOST_RANK = 74  # EX_IOERR: another process of the training is gone
BEATS = 15  # beats within the time of silence


class LostRank(Exception):  # noqa: N818 - an outcome, like StopRequested
    """Another rank is gone; `code` is the exit code that says so."""

    code = LOST_RANK


@dataclass
class Peer:
    """What is known of a rank: its latest beat and when it came."""

    beat: int = -1
    heard: float = field(default_factory=time.monotonic)
    step: int = 0
    doing: str = "starting"
    host: str = ""
    left: str = ""


class Liveness:
    """Mutual watch of the ranks of one training; with one process it does nothing.

    Args:
        processes: This rank among all.
        silence: Seconds without a beat after which a rank is taken for lost.
        hang: Seconds after which a step that does not end is taken for hanging.
        end: How the process ends; tests replace it.
    """

    def __init__(
        self,
        processes: Processes,
        silence: float,
        hang: float,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.rank, self.world_size = processes.rank, processes.world_size
        self.silence, self.hang, self.end = silence, hang, end
        self.me = Peer(host=socket.gethostname())
        self.peers = {rank: Peer() for rank in range(self.world_size) if rank != self.rank}
        self._changed = time.monotonic()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._processes = processes

    def __enter__(self) -> Liveness:
        if self.world_size > 1:
            self._store = self._open()
            for body in (self._beat, self._watch):
                thread = threading.Thread(target=body, name=body.__name__, daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        expected = error is None or isinstance(error, StopRequested)
        if not expected and not isinstance(error, LostRank) and self._threads:
            self.me.left = str(error).partition("\n")[0] or type(error).__name__
            with suppress(Exception):
                self._write()
            # the store is rank 0's: it has to outlive the news that rank 0 leaves
            time.sleep(2 * self.silence / BEATS if self.rank == 0 else 0)
        if expected and self._threads:
            self._processes.barrier()
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=self.silence / BEATS + 1)
        self._threads.clear()

    def note(self, step: int, doing: str) -> None:
        """Say what this rank does from now on; `doing` is `step` where a time limit holds."""
        self.me.step, self.me.doing, self._changed = step, doing, time.monotonic()

    def explain(self, error: Exception) -> Exception:
        """Return what to raise for a failed collective: `LostRank` if a rank is gone.

        Waits for a few beats, since a lost connection names no rank.
        """
        if not self._threads:
            return error
        deadline = time.monotonic() + 4 * self.silence / BEATS
        while time.monotonic() < deadline:
            for rank, peer in self.peers.items():
                if peer.left:
                    return LostRank(self._sentence(rank, f"stopped: {peer.left}"))
            time.sleep(0.2)
        longest = max(self.peers, key=lambda rank: time.monotonic() - self.peers[rank].heard)
        quiet = time.monotonic() - self.peers[longest].heard
        if quiet < 2.5 * self.silence / BEATS:
            return error
        return LostRank(self._sentence(longest, f"has not been heard of for {quiet:.0f} s"))

    def _open(self) -> dist.TCPStore:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        limit = timedelta(seconds=self.silence)
        place: list[object] = [None]
        if self.rank == 0:
            store = dist.TCPStore(host, 0, None, True, limit, wait_for_workers=False)
            place = [store.port]
        dist.broadcast_object_list(place, src=0)
        if self.rank == 0:
            return store
        return dist.TCPStore(host, int(str(place[0])), None, False, limit, wait_for_workers=False)

    def _write(self) -> None:
        self.me.beat += 1
        state = {k: getattr(self.me, k) for k in ("beat", "step", "doing", "host", "left")}
        self._store.set(f"rank-{self.rank}", json.dumps(state))

    def _beat(self) -> None:
        """Write this rank's beat and read the others', until told to stop."""
        known: set[int] = set()
        while not self._stop.is_set():
            try:
                self._write()
                for rank in self.peers:
                    if rank in known or self._store.check([f"rank-{rank}"]):
                        known.add(rank)
                keys = [f"rank-{rank}" for rank in sorted(known)]
                for rank, text in zip(
                    sorted(known), self._store.multi_get(keys) if keys else [], strict=True
                ):
                    self._hear(rank, json.loads(text))
            except Exception:
                # rank 0 holds the store: without an answer its own silence grows
                if self._stop.wait(0.5):
                    return
                continue
            self._stop.wait(self.silence / BEATS)

    def _hear(self, rank: int, state: dict[str, object]) -> None:
        peer = self.peers[rank]
        if state["beat"] != peer.beat:
            self.peers[rank] = Peer(heard=time.monotonic(), **state)  # type: ignore[arg-type]

    def _watch(self) -> None:
        """End the process when a rank is silent or a step hangs; never waits for the store."""
        while not self._stop.wait(0.5):
            now = time.monotonic()
            for rank, peer in self.peers.items():
                if peer.left and now - peer.heard > self.silence / 3:
                    self._give_up(rank, f"stopped: {peer.left}")
                if now - peer.heard > self.silence:
                    self._give_up(rank, f"has not been heard of for {now - peer.heard:.0f} s")
            if self.me.doing == "step" and now - self._changed > self.hang:
                self._give_up_hanging()

    def _give_up_hanging(self) -> None:
        """End a step that takes too long, and name a rank only if it is behind this one."""
        late = f"a step takes over {self.hang:.0f} s"
        rank = min(self.peers, key=lambda r: _progress(self.peers[r]))
        if _progress(self.peers[rank]) < _progress(self.me):
            self._give_up(rank, f"is the furthest behind: {late}")
            return
        print(
            f"inherclip: {late}, and no rank is behind rank {self.rank} in step {self.me.step}: "
            "one hangs inside the step\n  -> look at the stacks of all ranks (py-spy dump). The "
            "same command continues from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self.end(LOST_RANK)
        self._stop.set()

    def _sentence(self, rank: int, what: str) -> str:
        peer = self.peers[rank]
        host = f" on {peer.host}" if peer.host else ""
        return (
            f"rank {rank}{host} {what} (last seen in step {peer.step}: {peer.doing})\n"
            "  -> it died, is stopped or hangs; look at its log and node. The same command "
            "continues from the last checkpoint"
        )

    def _give_up(self, rank: int, what: str) -> None:
        print(f"inherclip: {self._sentence(rank, what)}", file=sys.stderr, flush=True)
        self.end(LOST_RANK)
        self._stop.set()


def _progress(peer: Peer) -> tuple[int, bool]:
    """How far a rank is: one that waits for data is behind one that waits for others."""
    return peer.step, peer.doing == "step"
