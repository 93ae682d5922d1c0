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
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
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
                results[i] = function(*arguments, **here)
                ended(i, results[i])
            return list(results.values())
        attempts = dict.fromkeys(range(len(work)), 0)
        while left := [i for i in range(len(work)) if i not in results]:
            try:
                self._once(work, left, attempts, results, ended)
            except (Interrupted, KeyboardInterrupt):
                self._end()
                raise
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
        suspects = [i for i in left if attempts[i]]
        todo = suspects[:1] or left
        futures: dict[Future[Ended], int] = {}
        try:
            pool = self._started()
            for i in todo:
                futures[pool.submit(_unless_stopped, *work[i])] = i
            while futures:
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    results[futures[future]] = future.result()
                    ended(futures[future], results[futures.pop(future)])
        except BrokenProcessPool:
            self._pool = None
            begun = [i for i in todo if i not in results][: self.count]  # they are begun in turn
            for i in begun:
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
        """Have the workers save what they do, and end; who takes too long is killed."""
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
            if child.is_alive():
                child.kill()
        self._pool = None

    def close(self) -> None:
        """End the workers, whose work is done."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


@contextlib.contextmanager
def told_to_stop() -> Iterator[None]:
    """Within the block a signal ends the command, after what was done is kept."""

    def stop(number: int, frame: object) -> None:
        raise (Interrupted if number == signal.SIGINT else Preempted)("")

    try:
        before = {n: signal.signal(n, stop) for n in SIGNALS}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stopped:
        raise _stopped(stopped) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(by: BaseException) -> Interrupted:
    kind = Preempted if isinstance(by, Preempted) else Interrupted
    return kind(
        "Stopped. Finished cells and checkpoints are kept: the same command goes on where this one stopped."
    )


_signals: list[int] = []  # that came to this worker


def _unless_stopped(function: Callable[..., Ended], arguments: Sequence[Any]) -> Ended:
    if _signals:
        raise Preempted("")
    try:
        return function(*arguments)
    except Interrupted:
        _signals.append(signal.SIGTERM)  # what is queued already is not begun
        raise


def _start(parent: int, gpus: Any, begin: Callable[[], object] | None) -> None:
    """A worker's first act."""
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    os.setsid()  # Ctrl-C reaches the whole group of the command, which passes on one signal, once
    # Between two cells there is nothing to save; a process that dies here would take its neighbours with it.
    signal.signal(signal.SIGTERM, lambda number, _: _signals.append(number))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if begin is not None:
        begin()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_SAVE)
    os._exit(1)
