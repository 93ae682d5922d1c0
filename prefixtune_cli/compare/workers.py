"""Processes that compute cells side by side. If a cell takes its process down, the other cells go on.

A worker has a GPU of its own, keeps one base for all of its cells, and ends with the command. Each worker is a pool of
one process: a pool of several breaks as a whole when one of its processes dies. This module imports no library, so that
a worker can prepare itself before its work imports them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from prefixtune_cli.errors import Interrupted, Preempted

SECONDS_TO_SAVE = 60  # for a worker to save its work when the command ends
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
KILLED = (
    "Its process was killed, as the kernel does where the machine's memory runs out. Try --workers 1, or a smaller "
    "--batch-size."
)

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
        self._pools: dict[int, ProcessPoolExecutor] = {}  # of one process each, by its number

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        children = multiprocessing.active_children() if error and self._pools else []
        for child in children:
            child.terminate()
        self._end_pools(wait=error is None)
        deadline = time.monotonic() + SECONDS_TO_SAVE
        for child in children:
            child.join(max(0.1, deadline - time.monotonic()))
            child.kill()

    def _end_pools(self, *, wait: bool = True) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait)
        self._pools = {}

    def run(
        self, work: Callable[..., Failure], arguments: Sequence[tuple[Any, ...]], **here: Any
    ) -> Iterator[tuple[int, Failure]]:
        """Do the work once for each of the arguments. If it takes its process down, it is tried once more, alone.

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
        left = deque(range(len(arguments)))
        idle = list(range(self.count))
        busy: dict[Future[Failure], tuple[int, int]] = {}  # → index of the arguments, process
        killed: list[int] = []
        while left or busy:
            while left and idle:
                i, process = left.popleft(), idle.pop()
                busy[self._submit(process, work, arguments[i])] = (i, process)
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                i, process = busy.pop(future)
                idle.append(process)
                try:
                    yield i, future.result()
                except BrokenProcessPool:
                    del self._pools[process]
                    killed.append(i)
        if killed:
            self._end_pools()  # so that the memory of the others is free
        for i in killed:
            try:
                yield i, self._submit(0, work, arguments[i]).result()
            except BrokenProcessPool:
                del self._pools[0]
                yield i, KILLED

    def _submit(
        self, process: int, work: Callable[..., Failure], given: tuple[Any, ...]
    ) -> Future[Failure]:
        try:
            return self._pool(process).submit(work, *given)
        except BrokenProcessPool:  # the process was killed while it was idle
            del self._pools[process]
            return self._pool(process).submit(work, *given)

    def _pool(self, process: int) -> ProcessPoolExecutor:
        if process not in self._pools:
            # torch reads it when it is imported, which is before a process calls anything of ours.
            threads = max(1, (os.cpu_count() or 1) // self.count)
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))
            self._pools[process] = ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(os.getpid(), self._gpus[process] if self._gpus else None, self._begin),
            )
        return self._pools[process]


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


def _start(parent: int, gpu: str | None, begin: Callable[[], object] | None) -> None:
    """A worker's first act."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.setsid()  # Ctrl-C reaches the command's whole process group; the command passes on one signal
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
