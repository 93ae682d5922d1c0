"""Starts a run's processes on this machine, watches them, and ends all of them if one fails.

The processes are started as torchrun does (`torch.distributed.elastic.multiprocessing`): each runs the command that
the user typed, and its environment tells it its rank. The end is our own. We forward signals to all processes, so that
they save a checkpoint together. If a process dies, we end the others within seconds, on every node, and name it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from prefixtune_cli.errors import (
    LAUNCHER_PID,
    Interrupted,
    LostWorker,
    Preempted,
    ResourceError,
)
from prefixtune_cli.parallel.nodes import SECONDS_BETWEEN_LOOKS, Meeting, Nodes

SECONDS_TO_SPEAK = 3  # for the other processes to say why one has failed
SECONDS_TO_END = 10  # for the survivors of a failure to end before they are killed
SECONDS_TO_SAVE = 25  # for a process to save after its launcher is gone
SECONDS_TO_HEAR = 5  # for another node to say why this node's processes were lost
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def launch(
    typed: Sequence[str], workers: int, nodes: Nodes, *, on_gpu: bool, advice: Callable[[], str]
) -> None:
    """Run `ptp` in `workers` processes on this machine, and wait until all of them end.

    The user sees the output of rank 0. The output of the others is kept, and shown if one of them fails.

    Args:
        typed: the command line, without `ptp`.
        workers: processes on this machine.
        nodes: the machines.
        on_gpu: whether the processes compute on GPUs.
        advice: gives what to type after a failure.

    Raises:
        ResourceError: a process was killed or failed, or another node failed.
        Interrupted: a signal ended the processes.
        SystemExit: rank 0 failed, and has said why itself; the exit code is its own.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="ptp-workers-") as logs:
        meeting = Meeting(nodes)
        group = _Workers(typed, workers, nodes, meeting.store.port, logs, _threads(workers, on_gpu))
        with group.running():
            elsewhere, ended = None, None
            while elsewhere is None and (ended := group.ended()) is None:
                elsewhere = meeting.failure()
                time.sleep(SECONDS_BETWEEN_LOOKS)
            first = ended[0] if ended else None
            if first is not None and first.followed:
                elsewhere = meeting.failure(SECONDS_TO_HEAR)
            meeting.leave(elsewhere or (first.told() if first else None))
        if elsewhere is None and first is None:
            return
        if elsewhere is None and first is not None and first.speaks_for_itself:
            raise SystemExit(first.exitcode)
        if group.signals and (first is None or first.followed or first.exitcode in group.codes):
            # The signal ended the processes, some of them perhaps before they could save.
            raise _stopped(group.signals[0], advice())
        raise ResourceError(f"{elsewhere or (first.told() if first else None)} {advice()}")


def _stopped(number: int, advice: str) -> Interrupted:
    kind = Interrupted if number == signal.SIGINT else Preempted
    return kind(f"Stopped by {signal.Signals(number).name}. {advice}")


def end_with_the_launcher() -> None:
    """Have this process save a checkpoint and stop when the launcher that started it is gone."""
    launcher = int(os.environ.get(LAUNCHER_PID, "0"))
    if not launcher:
        return

    def look() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_SAVE)
        os._exit(LostWorker.exit_code)  # it waits in a collective that the others have left

    threading.Thread(target=look, daemon=True).start()


def _threads(workers: int, on_gpu: bool) -> int | None:
    """CPU threads for each process: its share of the cores, few with a GPU; None if the user has set them."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    share = max(1, (os.cpu_count() or 1) // workers)
    return min(8, share) if on_gpu else share


@dataclass(frozen=True)
class _Ended:
    """A process that failed."""

    rank: int
    pid: int
    exitcode: int
    said: str
    by_itself: bool

    @property
    def killed_by(self) -> str | None:
        if self.exitcode >= 0:
            return None
        named = {-number.value: number.name for number in signal.Signals}
        return named.get(self.exitcode, f"signal {-self.exitcode}")

    @property
    def followed(self) -> bool:
        """Whether it ended only because another process had."""
        return self.exitcode == LostWorker.exit_code or not self.by_itself

    @property
    def speaks_for_itself(self) -> bool:
        """Whether the user has read why: rank 0 says so, unless it was killed or lost the others."""
        return self.rank == 0 and self.killed_by is None and not self.followed

    def told(self) -> str:
        who = f"Rank {self.rank} (process {self.pid})"
        if self.followed:
            return (
                f"{who} has lost the other processes, and none of them says why{self.said and f': {self.said}'}. With "
                "several machines, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface to use."
            )
        if self.killed_by == "SIGKILL":
            return f"{who} was killed by SIGKILL; the kernel does that when the machine runs out of memory."
        if self.killed_by:
            return f"{who} was killed by {self.killed_by}."
        return f"{who} failed with exit code {self.exitcode}{self.said and f': {self.said}'}"


class _Workers:
    """The processes of this node."""

    def __init__(
        self,
        typed: Sequence[str],
        count: int,
        nodes: Nodes,
        port: int,
        logs: str,
        threads: int | None,
    ) -> None:
        self.signals: list[int] = []  # the ones that were forwarded
        self._failed_at: float | None = None
        self._first = nodes.rank * count
        shared: dict[str, Any] = {
            "WORLD_SIZE": nodes.count * count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": nodes.host,
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True,  # the launcher's store outlives every process
            "GROUP_RANK": nodes.rank,
            LAUNCHER_PID: os.getpid(),
            **({} if threads is None else {"OMP_NUM_THREADS": threads}),
        }
        own = [{"RANK": self._first + i, "LOCAL_RANK": i} for i in range(count)]
        quiet = {i: Std.ALL for i in range(count) if self._first + i > 0}
        self._context = SubprocessContext(
            name="ptp",
            entrypoint=sys.executable,
            args={i: ("-m", "prefixtune_cli", *typed) for i in range(count)},
            envs={
                i: {name: str(value) for name, value in {**shared, **own[i]}.items()}
                for i in range(count)
            },
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=quiet),
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, the processes run, and get the signals that this process gets."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        try:
            self._context.start()  # it sets its own handlers, which we replace
            for number in STOP_SIGNALS:
                signal.signal(number, self._forward)
            yield
        finally:
            self._context.close(signal.SIGTERM, SECONDS_TO_END)
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def codes(self) -> set[int]:
        """The exit codes of processes that a forwarded signal has ended."""
        return {Interrupted.exit_code, *(-number for number in self.signals)}

    def _forward(self, number: int, frame: object) -> None:
        self.signals.append(number)
        for pid in self._context.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def ended(self) -> list[_Ended] | None:
        """The processes that failed, the likely cause first; None while all of them run."""
        processes = {i: one.proc for i, one in self._context.subprocess_handlers.items()}
        codes = {i: process.poll() for i, process in processes.items()}
        if any(codes.values()):
            # The others may be about to say why, so give them a moment before ending them.
            self._failed_at = self._failed_at or time.monotonic()
            if None in codes.values() and time.monotonic() - self._failed_at < SECONDS_TO_SPEAK:
                return None
            self._context.close(signal.SIGTERM, SECONDS_TO_END)
        elif None in codes.values():
            return None
        found = [
            _Ended(self._first + i, process.pid, code, self._said(i), codes[i] is not None)
            for i, process in processes.items()
            if (code := process.returncode)
        ]
        return sorted(found, key=lambda one: (one.followed, one.killed_by is None, one.rank))

    def _said(self, local_rank: int) -> str:
        """The last output of a process whose output the user has not seen."""
        path = Path(self._context.stderrs.get(local_rank) or os.devnull)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        return "\n".join(lines[errors[-1] if errors else -20 :]).removeprefix("error: ")
