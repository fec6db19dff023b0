"""Processes and threads that download shards, and the parent that waits for them."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from typing import Any

from data_prep.download_shard import ShardDownloader, ShardTask, StoreSettings
from data_prep.errors import UserError
from data_prep.fetch import Fetcher, FetchSettings, FileReader
from data_prep.queueing import BUCKETS, HostSlots
from data_prep.shards import ShardEntry

LANES = 2  # shards at a time per process: the slow last rows of one must not idle its threads
Report = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Jobs:
    """What every worker needs to know.

    Attributes:
        folder: Where the shards go.
        fetch: Bounds of the network.
        store: How samples are stored.
        processes: Worker processes; 1 stays in this one.
        threads: Per process.
        local: Whether rows name files instead of URLs.
    """

    folder: Path
    fetch: FetchSettings
    store: StoreSettings
    processes: int
    threads: int
    local: bool


class _Counters(list[int]):
    """What `multiprocessing.Array` is to several processes, for the threads of one."""

    def __init__(self, values: list[int]) -> None:
        super().__init__(values)
        self._lock = threading.Lock()

    def get_lock(self) -> threading.Lock:
        return self._lock


def run_all(
    jobs: Jobs, numbers: list[int], make: Callable[[int], ShardTask], report: Report
) -> dict[int, ShardEntry]:
    """Download shards, in this process or in several.

    Args:
        jobs: How, and with how many processes and threads.
        numbers: Of the shards, in the order in which they are begun.
        make: Returns the rows of a shard, when its turn comes.
        report: Called twice a second with rows finished, rows ok, bytes stored.

    Raises:
        UserError: a fault that the user can mend, or a worker process that was killed.
    """
    context = multiprocessing.get_context("spawn")  # threads and TLS do not survive a fork
    processes = min(jobs.processes, len(numbers))
    tasks: Any = (context.Queue if processes > 1 else queue.Queue)(processes * LANES)
    results: Any = (context.Queue if processes > 1 else queue.Queue)()
    slots: tuple[Any, Any] = ([0] * BUCKETS, threading.Lock())
    counters: Any = _Counters([0, 0, 0])
    if processes > 1:
        slots = (context.Array("i", BUCKETS, lock=False), context.Lock())
        counters = context.Array("q", 3)
    arguments = (jobs, slots, counters, tasks, results)
    workers: list[BaseProcess] = []
    stop = threading.Event()
    if processes > 1:
        workers = [
            context.Process(target=_worker, args=arguments, daemon=True) for _ in range(processes)
        ]
        for worker in workers:
            worker.start()
    else:
        threading.Thread(target=_lanes, args=arguments, daemon=True).start()

    def feed() -> None:
        for item in [*numbers, *[None] * (processes * LANES)]:
            try:
                task = None if item is None else (item, make(item))
            except BaseException as error:
                results.put((-1, portable(error)))
                return
            while not stop.is_set():
                try:
                    tasks.put(task, timeout=0.5)
                    break
                except queue.Full:
                    continue

    threading.Thread(target=feed, daemon=True).start()
    try:
        return _collect(len(numbers), results, workers, lambda: report(*counters[:]))
    finally:
        stop.set()
        for worker in workers:
            worker.kill() if worker.is_alive() else worker.join()
        if workers:
            tasks.cancel_join_thread()
            results.cancel_join_thread()


def _collect(
    count: int, results: Any, workers: list[BaseProcess], report: Callable[[], None]
) -> dict[int, ShardEntry]:
    """Wait for the shards, reporting twice a second, and notice a worker that was killed."""
    done: dict[int, ShardEntry] = {}
    while len(done) < count:
        try:
            number, outcome = results.get(timeout=0.5)
        except queue.Empty:
            report()
            dead = [worker.exitcode for worker in workers if worker.exitcode not in (None, 0)]
            if dead:
                signal_ = f"signal {-dead[0]}" if dead[0] and dead[0] < 0 else f"code {dead[0]}"
                raise UserError(
                    f"a worker process ended with {signal_}",
                    todo="if the machine ran out of memory, use fewer --processes or a smaller "
                    "--rows-per-shard; the same command continues",
                ) from None
            continue
        if isinstance(outcome, BaseException):
            raise outcome
        done[number] = outcome
    report()
    return done


def _worker(*arguments: Any) -> None:
    """Work in a process of its own; it ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means

    def follow() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _lanes(*arguments)
    results = arguments[-1]
    results.close()
    results.join_thread()  # what was put last must be through before this process ends


def _lanes(jobs: Jobs, slots: Any, counters: Any, tasks: Any, results: Any) -> None:
    """Run shards side by side; whatever goes wrong is told to the parent, which waits for it."""
    try:
        _run_lanes(jobs, slots, counters, tasks, results)
    except BaseException as error:
        results.put((-1, portable(error)))


def _run_lanes(jobs: Jobs, slots: Any, counters: Any, tasks: Any, results: Any) -> None:
    """Run shards until the queue says that there are no more."""
    fetcher = FileReader(jobs.fetch) if jobs.local else Fetcher(jobs.fetch)
    places = HostSlots(fetcher.settings.per_host, *slots)
    each = max(1, jobs.threads // LANES)
    downloader = ShardDownloader(jobs.folder, fetcher, jobs.store, places, counters, each)

    def lane() -> None:
        while (task := tasks.get()) is not None:
            number, shard = task
            try:
                results.put((number, downloader.run(shard)))
            except BaseException as error:
                results.put((number, portable(error)))

    lanes = [threading.Thread(target=lane, daemon=True) for _ in range(LANES)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join()


def portable(error: BaseException) -> BaseException:
    """Make an exception that another process can raise, with the place where it happened."""
    if isinstance(error, UserError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))
