"""Processes that compute cells side by side; a cell that takes its process with it does not end the others.

A worker is told which GPU is its own, keeps one base for all of its cells, and ends when the command does. This module
imports no library, so that a worker can prepare itself before its work imports them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from prefixtune_cli.errors import Interrupted, Preempted

SECONDS_TO_SAVE = 60  # what a worker gets to end after the command
ATTEMPTS = 2  # a pool that breaks does not say which of its cells broke it


@dataclass(frozen=True)
class Ended:
    """How a piece of work ended: a failure in words, or none."""

    failure: str | None = None


Work = tuple[Callable[..., Ended], tuple[Any, ...]]


class Workers:
    """Runs work in `count` processes, or in this one where that is 1.

    Args:
        count: processes.
        gpus: the numbers of the GPUs that they take, each its own; empty on the CPU.
        begin: what a process calls first.
    """

    def __init__(
        self, count: int, gpus: Sequence[str] = (), begin: Callable[[], object] | None = None
    ) -> None:
        self.count = count
        self._gpus = gpus
        self._begin = begin
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self, work: Sequence[Work], ended: Callable[[int, Ended], None], **here: Any
    ) -> list[Ended]:
        """Do all of it, in any order; what each gave, in the order of `work`.

        Args:
            work: functions of a module, with their arguments.
            ended: is told of each as it ends.
            **here: further arguments where the work is done in this process.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, after what was under way was saved.
        """
        results: dict[int, Ended] = {}
        if self.count == 1:
            for i, (function, arguments) in enumerate(work):
                try:
                    results[i] = function(*arguments, **here)
                except (Interrupted, KeyboardInterrupt) as stopped:
                    raise _stopped(stopped) from None
                ended(i, results[i])
            return list(results.values())
        attempts = dict.fromkeys(range(len(work)), 0)
        with _told_to_stop():
            while left := [i for i in range(len(work)) if i not in results]:
                try:
                    self._once(work, left, attempts, results, ended)
                except (Interrupted, KeyboardInterrupt) as stopped:
                    self._end()
                    raise _stopped(stopped) from None
        return [results[i] for i in range(len(work))]

    def _once(
        self,
        work: Sequence[Work],
        left: Sequence[int],
        attempts: dict[int, int],
        results: dict[int, Ended],
        ended: Callable[[int, Ended], None],
    ) -> None:
        """All that is left, or until the pool breaks; then each alone, so that the culprit is known."""
        alone = any(attempts[i] for i in left)
        todo = [next(i for i in left if attempts[i])] if alone else left
        pool = self._started()
        futures: dict[Future[Ended], int] = {pool.submit(work[i][0], *work[i][1]): i for i in todo}
        try:
            while futures:
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    i = futures.pop(future)
                    results[i] = future.result()
                    ended(i, results[i])
        except BrokenProcessPool:
            self._pool = None
            for i in todo:
                if i not in results:
                    attempts[i] += 1
                    if attempts[i] >= ATTEMPTS:
                        results[i] = Ended(
                            "Its process was killed, as the kernel does where the machine's memory runs out. "
                            "Try --workers 1, or a smaller --batch-size."
                        )
                        ended(i, results[i])

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            gpus = context.Queue()
            for gpu in self._gpus:
                gpus.put(gpu)
            # Read by torch when it is imported, which is before a process runs anything of ours.
            os.environ.setdefault(
                "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.count))
            )
            self._pool = ProcessPoolExecutor(
                self.count,
                mp_context=context,
                initializer=_start,
                initargs=(os.getpid(), gpus if self._gpus else None, self._begin),
            )
        return self._pool

    def _end(self) -> None:
        """Have the workers save what they do, and end."""
        if self._pool is None:
            return
        children = multiprocessing.active_children()
        for child in children:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(child.pid or 0, signal.SIGTERM)
        self._pool.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + SECONDS_TO_SAVE
        for child in children:
            child.join(max(0.1, deadline - time.monotonic()))
        self._pool = None

    def close(self) -> None:
        """End the workers, whose work is done."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


@contextlib.contextmanager
def _told_to_stop() -> Iterator[None]:
    """Within the block SIGTERM ends the command as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise Preempted("")

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(by: BaseException) -> Interrupted:
    kind = Preempted if isinstance(by, Preempted) else Interrupted
    return kind(
        "Stopped. Finished cells and checkpoints are kept: the same command goes on where this one stopped."
    )


def _start(parent: int, gpus: Any, begin: Callable[[], object] | None) -> None:
    """A worker's first act."""
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    # Ctrl-C reaches the whole group of processes; the command passes on one signal, once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if begin is not None:
        begin()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_SAVE)
    os._exit(1)
