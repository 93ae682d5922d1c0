"""The machines of a run. Their launchers meet in a key-value store that node 0 hosts."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from prefixtune_cli.errors import ResourceError, UsageError, first_line

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_BEATS = 2
SECONDS_OF_SILENCE = 15  # after which another node counts as lost
SECONDS_TO_JOIN = 900  # for all nodes to start


@dataclass(frozen=True)
class Nodes:
    """The machines of a run.

    Attributes:
        count: the number of machines.
        rank: this machine's number; the others connect to number 0.
        host, port: the address of node 0; port 0 takes a free one.
    """

    count: int = 1
    rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0


def nodes(count: int | None, rank: int | None, rendezvous: str | None) -> Nodes:
    """What `--nodes`, `--node-rank` and `--rendezvous` say; `--nodes 1` is allowed, for scripts.

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


class Meeting:
    """The key-value store in which launchers and processes talk; it tells this launcher how the others are."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.store = self._open()
        self._beaten = 0.0
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._first_is_done = False

    def _open(self) -> TCPStore:
        nodes, deadline = self.nodes, time.monotonic() + SECONDS_TO_JOIN
        while True:
            try:
                # Short attempts, because Python handles signals only between them.
                return TCPStore(
                    nodes.host,
                    nodes.port,
                    is_master=nodes.rank == 0,
                    timeout=timedelta(seconds=min(5, SECONDS_TO_JOIN)),
                    wait_for_workers=False,
                )
            except (DistError, RuntimeError) as error:
                if nodes.rank > 0 and time.monotonic() < deadline:
                    continue
                said = first_line(error)
                reason = (
                    f"cannot be opened on this node ({said}). Give its name, and a free port, on all nodes."
                    if nodes.rank == 0
                    else f"cannot be reached ({said}). Is node 0 running under this name, and is the port open?"
                )
                raise ResourceError(f"--rendezvous {nodes.host}:{nodes.port} {reason}") from error

    def failure(self, within_seconds: float = 0) -> str | None:
        """Why the run cannot go on, if another node has failed or fallen silent; otherwise None.

        Args:
            within_seconds: how long to wait for a node to say why.
        """
        now = time.monotonic()
        if self.nodes.count == 1:
            return None
        if within_seconds:
            while time.monotonic() < now + within_seconds:
                if (reason := self._look(time.monotonic())) is not None:
                    return reason
                time.sleep(SECONDS_BETWEEN_LOOKS)
            return None
        return None if now - self._beaten < SECONDS_BETWEEN_BEATS else self._look(now)

    def _look(self, now: float) -> str | None:
        self._beaten = now
        try:
            self.store.set(f"ptp/beat/{self.nodes.rank}", repr(now))
            for node in set(range(self.nodes.count)) - {self.nodes.rank}:
                if (reason := self._of(node, now)) is not None:
                    return reason
                self._first_is_done |= node == 0 and self.store.check(["ptp/end/0"])
        except (DistError, RuntimeError):
            # Node 0 hosts the store, and closes it at a good end, too.
            lost = "Node 0 was lost: its launcher no longer answers."
            return None if self._first_is_done else lost
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
