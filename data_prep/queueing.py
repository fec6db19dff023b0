"""Which row to ask for next: hosts are spared, failed rows come back later, no thread sleeps."""

from __future__ import annotations

import heapq
import threading
import time
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any

BUCKETS = 4096
_POLL = 0.02  # seconds between looks at hosts that other processes keep busy


class HostSlots:
    """How many requests are under way per host, over all processes of a run.

    Hosts are hashed into a table shared by the processes; two hosts may share an entry and then
    also the limit, which errs on the polite side.

    Args:
        limit: Requests at once per host.
        counts: `BUCKETS` integers, shared where there are several processes.
        lock: Shared likewise.
    """

    def __init__(self, limit: int, counts: Any, lock: Any) -> None:
        self.limit, self.counts, self.lock = limit, counts, lock

    def acquire(self, host: str) -> bool:
        """Take a place if one is free."""
        bucket = zlib.crc32(host.encode()) % BUCKETS
        with self.lock:
            if self.counts[bucket] >= self.limit:
                return False
            self.counts[bucket] += 1
            return True

    def release(self, host: str) -> None:
        """Give a place back."""
        with self.lock:
            self.counts[zlib.crc32(host.encode()) % BUCKETS] -= 1


class RowQueue:
    """The rows of one shard, handed to its threads.

    Args:
        hosts: Host of each row.
        slots: Places per host.
    """

    def __init__(self, hosts: Sequence[str], slots: HostSlots) -> None:
        self.hosts, self.slots = hosts, slots
        self.ready: deque[int] = deque(range(len(hosts)))
        self.later: list[tuple[float, int]] = []
        self.parked: dict[str, deque[int]] = {}
        self.paused: dict[str, float] = {}
        self.open = len(hosts)
        self.changed = threading.Condition()

    def take(self) -> int | None:
        """Wait for a row whose host has a free place; None when all rows are finished."""
        with self.changed:
            while self.open:
                now = time.monotonic()
                while self.later and self.later[0][0] <= now:
                    self.ready.append(heapq.heappop(self.later)[1])
                row = self._next(now)
                if row is None:
                    row = self._unpark(now)
                if row is not None:
                    return row
                wait = self.later[0][0] - now if self.later else None
                if self.parked:
                    wait = _POLL if wait is None else min(wait, _POLL)
                self.changed.wait(wait)
            return None

    def _next(self, now: float) -> int | None:
        while self.ready:
            row = self.ready.popleft()
            host = self.hosts[row]
            until = self.paused.get(host, 0.0)
            if until > now:
                heapq.heappush(self.later, (until, row))
            elif host not in self.parked and self.slots.acquire(host):
                return row
            else:
                self.parked.setdefault(host, deque()).append(row)
        return None

    def _unpark(self, now: float) -> int | None:
        """Take a row of a busy host that has a place again, freed here or in another process."""
        for host, rows in self.parked.items():
            if self.paused.get(host, 0.0) <= now and self.slots.acquire(host):
                row = rows.popleft()
                if not rows:
                    del self.parked[host]
                return row
        return None

    def again(self, row: int, wait: float, pause_host: bool = False) -> None:
        """Give a row back for another attempt in `wait` seconds; maybe its whole host waits."""
        until = time.monotonic() + wait
        with self.changed:
            if pause_host:
                self.paused[self.hosts[row]] = until
            heapq.heappush(self.later, (until, row))
            self._released(row)

    def finish(self, row: int) -> None:
        """Report a row that needs no further attempt."""
        with self.changed:
            self.open -= 1
            self._released(row)

    def _released(self, row: int) -> None:
        self.slots.release(self.hosts[row])
        if self.open:
            self.changed.notify()
        else:
            self.changed.notify_all()
