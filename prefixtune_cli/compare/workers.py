"""Processes that compute cells side by side. If a cell takes its process down, the other cells go on.

A worker has a GPU of its own, keeps one base for all of its cells, and ends with the command. This module imports no
library, so that a worker can prepare itself before its work imports them.
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
from typing import Any, Self

from prefixtune_cli.errors import Interrupted, Preempted

SECONDS_TO_SAVE = 60  # for a worker to save its work when the command ends
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ATTEMPTS = 2  # a pool that breaks does not say which of its cells broke it

Failure = str | None  # why a piece of work failed; None where it did not


class Workers:
    """Does work in `count` processes, or in this process if that is 1.

    As a context manager it ends its processes: after their work, or at once where an error leaves the block.

    Args:
        count: the number of processes.
        gpus: the numbers of their GPUs, one for each process; empty on the CPU.
        begin: each process calls it first.
    """

    def __init__(
        self, count: int, gpus: Sequence[str] = (), begin: Callable[[], object] | None = None
    ) -> None:
        self.count = count
        self._gpus = gpus
        self._begin = begin
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None and error is None:
            self._pool.shutdown()
        elif self._pool is not None:
            _stop(self._pool)
        self._pool = None

    def run(
        self, work: Callable[..., Failure], arguments: Sequence[tuple[Any, ...]], **here: Any
    ) -> Iterator[tuple[int, Failure]]:
        """Do the work once for each of the arguments.

        Args:
            work: a function of a module.
            arguments: they can be pickled.
            **here: further arguments, which `work` gets only in this process.

        Yields:
            the index of the arguments whose work has ended, in any order, and its failure.

        Raises:
            Interrupted: a signal has reached a worker.
        """
        if self.count == 1:
            for i, given in enumerate(arguments):
                yield i, work(*given, **here)
            return
        left = dict(enumerate(arguments))
        attempts = dict.fromkeys(left, 0)
        while left:
            yield from self._attempt(work, left, attempts)

    def _attempt(
        self,
        work: Callable[..., Failure],
        left: dict[int, tuple[Any, ...]],
        attempts: dict[int, int],
    ) -> Iterator[tuple[int, Failure]]:
        """Do all that is left, or the work before the pool breaks.

        Whatever ran in a pool that broke runs alone the next time, so that the culprit is known.
        """
        suspects = [i for i in left if attempts[i]]
        todo = suspects[:1] or list(left)
        futures: dict[Future[Failure], int] = {}
        try:
            pool = self._started()
            for i in todo:
                futures[pool.submit(_unless_stopped, work, left[i])] = i
            while futures:
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    failure, i = future.result(), futures.pop(future)
                    del left[i]
                    yield i, failure
        except BrokenProcessPool:
            self._pool = None
            running = [i for i in todo if i in left][: self.count]  # a pool begins work in order
            for i in running:
                attempts[i] += 1
                if attempts[i] >= ATTEMPTS:
                    del left[i]
                    yield (
                        i,
                        "Its process was killed, as the kernel does where the machine's memory runs out. "
                        "Try --workers 1, or a smaller --batch-size.",
                    )

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            gpus = context.Queue()
            for gpu in self._gpus:
                gpus.put(gpu)
            # torch reads it when it is imported, which is before a process calls anything of ours.
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


def _stop(pool: ProcessPoolExecutor) -> None:
    """Have the workers save their work and end; kill those that take too long."""
    children = multiprocessing.active_children()
    for child in children:
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.kill(child.pid or 0, signal.SIGTERM)
    pool.shutdown(wait=False, cancel_futures=True)
    deadline = time.monotonic() + SECONDS_TO_SAVE
    for child in children:
        child.join(max(0.1, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()


@contextlib.contextmanager
def told_to_stop() -> Iterator[None]:
    """Within the block a signal ends the command; what is finished by then is kept.

    Raises:
        Interrupted: a signal came. `Preempted` is one of its kinds.
    """

    def stop(number: int, frame: object) -> None:
        raise (Interrupted if number == signal.SIGINT else Preempted)("")

    try:
        before = {n: signal.signal(n, stop) for n in SIGNALS}
    except ValueError:  # only the main thread may set handlers
        before = {}
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stopped:
        kind = Preempted if isinstance(stopped, Preempted) else Interrupted
        raise kind(
            "Stopped. Finished cells and checkpoints are kept: the same command goes on where this one stopped."
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_signals: list[int] = []  # the signals that this worker has received


def _unless_stopped(work: Callable[..., Failure], arguments: Sequence[Any]) -> Failure:
    if _signals:
        raise Preempted("")
    try:
        return work(*arguments)
    except Interrupted:
        _signals.append(signal.SIGTERM)  # the pool may have queued more work, which must not begin
        raise


def _start(parent: int, gpus: Any, begin: Callable[[], object] | None) -> None:
    """A worker's first act."""
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    os.setsid()  # Ctrl-C reaches the command's whole process group; the command passes on one signal
    # Between two cells there is nothing to save, and a process that dies would break the whole pool.
    signal.signal(signal.SIGTERM, lambda number, _: _signals.append(number))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if begin is not None:
        begin()


def _end_with(parent: int) -> None:
    """End this worker once its parent process has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_SAVE)
    os._exit(1)
