"""Start a run's processes on this machine, watch them, and end all of them where one fails.

The processes are those of torchrun (`torch.distributed.elastic.multiprocessing`): each is the command that the user
typed, told by its environment which one it is. What is ours is what happens in the end: a signal goes on to all of
them, so that they save a checkpoint together; a process that dies takes the others with it within seconds, on every
node; and it is named.
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
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from prefixtune_cli.errors import LAUNCHER_PID, LostWorker, ResourceError, UsageError

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_SPEAK = 3  # what the others get where one process has failed
SECONDS_TO_END = 10  # what the survivors of a failure get before they are killed
SECONDS_BETWEEN_BEATS = 2
SECONDS_OF_SILENCE = 15  # after which another node counts as lost
SECONDS_TO_JOIN = 900  # until all nodes have started
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Nodes:
    """The machines of a run.

    Attributes:
        count: of all machines.
        rank: this machine's number; 0 is the one that the others come to.
        host, port: where node 0 is reached; a port of 0 takes a free one.
    """

    count: int = 1
    rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0


def nodes(count: int | None, rank: int | None, rendezvous: str | None) -> Nodes:
    """What `--nodes`, `--node-rank` and `--rendezvous` say; a script for any number of nodes may say it of one.

    Raises:
        UsageError: one of them is missing, or out of range.
    """
    if count is None and (rank, rendezvous) != (None, None):
        raise UsageError("--node-rank and --rendezvous belong to --nodes N.")
    if count is None or (count == 1 and rank in (None, 0)):
        return Nodes()
    example = "as in --nodes 2 --node-rank 0 --rendezvous first-node:29500"
    if count < 1:
        raise UsageError(f"--nodes must be 1 or more, got {count}.")
    if rank is None or rendezvous is None:
        raise UsageError(f"--nodes {count} needs --node-rank and --rendezvous, {example}.")
    if not 0 <= rank < count:
        raise UsageError(f"--node-rank must lie between 0 and {count - 1}, got {rank}.")
    host, colon, port = rendezvous.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"--rendezvous must be HOST:PORT, {example}, got {rendezvous!r}.")
    return Nodes(count, rank, host, int(port))


def launch(
    typed: Sequence[str], workers: int, nodes: Nodes, *, on_gpu: bool, advice: Callable[[], str]
) -> None:
    """Run `ptp` with what was `typed` in `workers` processes on this machine, and wait until all of them end.

    What the first process of all says is the user's to read; what the others say is kept, and shown where one fails.

    Args:
        typed: the command line, without `ptp`.
        workers: processes on this machine.
        nodes: the machines.
        on_gpu: the processes compute on GPUs.
        advice: what to type after a failure.

    Raises:
        ResourceError: a process was killed, failed on its own account, or went with another node.
        SystemExit: the first process failed, and has said why itself; with its exit code.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="ptp-workers-") as logs:
        meeting = _Meeting(nodes)
        group = _Workers(typed, workers, nodes, meeting.store.port, logs, _threads(workers, on_gpu))
        with group.running():
            while (ended := group.ended()) is None:
                if (elsewhere := meeting.failure()) is not None:
                    raise ResourceError(f"{elsewhere} {advice()}")
                time.sleep(SECONDS_BETWEEN_LOOKS)
            told = ended[0].told() if ended else None
            meeting.leave(told)
        if told is None:
            return
        if ended[0].rank == 0 and ended[0].killed_by is None:
            raise SystemExit(ended[0].exitcode)
        raise ResourceError(f"{told} {advice()}")


def end_with_the_launcher() -> None:
    """Have this process stop, after a checkpoint, when the launcher that started it is no more."""
    launcher = int(os.environ.get(LAUNCHER_PID, "0"))
    if not launcher:
        return

    def look() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_END)
        os._exit(LostWorker.exit_code)  # stuck in a collective that the others have left

    threading.Thread(target=look, daemon=True).start()


def _threads(workers: int, on_gpu: bool) -> int | None:
    """CPU threads a process, where the user has not said: the cores are shared out, and a GPU needs few."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    share = max(1, (os.cpu_count() or 1) // workers)
    return min(8, share) if on_gpu else share


class _Meeting:
    """The key-value store through which launchers and processes talk, and what the other launchers say there."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.store = self._open()
        self._beaten = 0.0
        self._heard: dict[int, tuple[bytes, float]] = {}

    def _open(self) -> TCPStore:
        nodes = self.nodes
        try:
            return TCPStore(
                nodes.host,
                nodes.port,
                is_master=nodes.rank == 0,
                timeout=timedelta(seconds=SECONDS_TO_JOIN),
                wait_for_workers=False,
            )
        except (DistError, RuntimeError) as error:
            said = str(error).splitlines()[0]
            reason = (
                f"cannot be opened on this node ({said}). Give the name of this node, and a free port, on all nodes."
                if nodes.rank == 0
                else f"cannot be reached ({said}). Is node 0 running, under this name, and the port open?"
            )
            raise ResourceError(f"--rendezvous {nodes.host}:{nodes.port} {reason}") from error

    def failure(self) -> str | None:
        """Why the run cannot go on, where another node has failed or fallen silent."""
        now = time.monotonic()
        if self.nodes.count == 1 or now - self._beaten < SECONDS_BETWEEN_BEATS:
            return None
        self._beaten = now
        try:
            self.store.set(f"ptp/beat/{self.nodes.rank}", repr(now))
            for node in set(range(self.nodes.count)) - {self.nodes.rank}:
                if (reason := self._of(node, now)) is not None:
                    return reason
        except (DistError, RuntimeError):
            return "Node 0 was lost: its launcher no longer answers."
        return None

    def _of(self, node: int, now: float) -> str | None:
        if self.store.check([f"ptp/end/{node}"]):
            told = self.store.get(f"ptp/end/{node}").decode()
            return f"On node {node}: {told}" if told else None
        if not self.store.check([f"ptp/beat/{node}"]):
            return None  # not started yet
        beat = self.store.get(f"ptp/beat/{node}")
        if node not in self._heard or self._heard[node][0] != beat:
            self._heard[node] = (beat, now)
        if now - self._heard[node][1] > SECONDS_OF_SILENCE:
            return f"Node {node} was lost: it has been silent for {SECONDS_OF_SILENCE} seconds."
        return None

    def leave(self, told: str | None) -> None:
        """Say how this node ended; node 0, which hosts the store, leaves last."""
        if self.nodes.count == 1:
            return
        with contextlib.suppress(DistError, RuntimeError):
            self.store.set(f"ptp/end/{self.nodes.rank}", told or "")
            deadline = time.monotonic() + SECONDS_OF_SILENCE
            others = [f"ptp/end/{node}" for node in range(1, self.nodes.count)]
            while self.nodes.rank == 0 and time.monotonic() < deadline:
                if self.store.check(others):
                    return
                time.sleep(SECONDS_BETWEEN_LOOKS)


class _Context(SubprocessContext):
    """torchrun's processes; the survivors of a failure get less time, so that a run ends within 30 seconds of it."""

    _failed_at: float | None = None

    def _poll(self) -> Any:
        # Where one has failed the others may be about to say why: they get a moment before they are ended.
        codes = [handler.proc.poll() for handler in self.subprocess_handlers.values()]
        if None in codes and any(codes):
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at < SECONDS_TO_SPEAK:
                return None
        return super()._poll()

    def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
        super()._close(death_sig, min(timeout, SECONDS_TO_END))


@dataclass(frozen=True)
class _Ended:
    """A process that failed."""

    rank: int
    pid: int
    exitcode: int
    said: str

    @property
    def killed_by(self) -> str | None:
        return signal.Signals(-self.exitcode).name if self.exitcode < 0 else None

    @property
    def followed(self) -> bool:
        """Whether it only ended because another one had."""
        return self.exitcode in (LostWorker.exit_code, -signal.SIGTERM)

    def told(self) -> str:
        who = f"Rank {self.rank} (process {self.pid})"
        if self.killed_by == "SIGKILL":
            return f"{who} was killed by SIGKILL, as the kernel does where the machine's memory runs out."
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
        self._first = nodes.rank * count
        shared: dict[str, Any] = {
            "WORLD_SIZE": nodes.count * count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": nodes.host,
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True,  # the launcher's, which outlives every process
            LAUNCHER_PID: os.getpid(),
            **({} if threads is None else {"OMP_NUM_THREADS": threads}),
        }
        own = [{"RANK": self._first + i, "LOCAL_RANK": i} for i in range(count)]
        quiet = {i: Std.ALL for i in range(count) if self._first + i > 0}
        self._context = _Context(
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
        """Within the block the processes run, and get the signals that this one gets."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        try:
            self._context.start()  # which sets handlers of its own
            for number in STOP_SIGNALS:
                signal.signal(number, self._forward)
            yield
        finally:
            self._context.close(signal.SIGTERM, SECONDS_TO_END)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: object) -> None:
        for pid in self._context.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def ended(self) -> list[_Ended] | None:
        """The processes that failed, the one that began it first; None while all of them run."""
        result = self._context.wait(0)
        if result is None:
            return None
        found = [
            _Ended(self._first + i, failure.pid, failure.exitcode, self._said(i))
            for i, failure in result.failures.items()
        ]
        return sorted(found, key=lambda one: (one.followed, one.killed_by is None, one.rank))

    def _said(self, local_rank: int) -> str:
        """What a process wrote at last, where the user has not read it."""
        path = Path(self._context.stderrs.get(local_rank) or os.devnull)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        return "\n".join(lines[errors[-1] if errors else -20 :]).removeprefix("error: ")
