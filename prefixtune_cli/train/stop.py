"""Signals that ask a run to stop: the user's Ctrl-C, and the SIGTERM or SIGUSR1 of a scheduler."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefixtune_cli.errors import Interrupted, Preempted
from prefixtune_cli.parallel.launch import STOP_SIGNALS
from prefixtune_cli.run_dir import RunDir


class StopRequest:
    """The request to stop that this process's signals make.

    Attributes:
        number: the signal that came, 0 for none.
        begun: whether this run's recipe is in its directory; until then, the directory may hold another run.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.number = 0
        self.begun = False
        self._waits = False
        self._state = "before the first step; nothing was begun"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, a signal raises `Interrupted` or `Preempted`, at once or after a checkpoint is saved."""
        before: dict[int, Any] = {}
        try:
            for wanted in STOP_SIGNALS:
                before[wanted] = signal.signal(wanted, self._received)
        except ValueError:  # only the main thread may handle signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Within the block, the first signal only sets `number`; the trainer then saves a checkpoint and stops."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
            self._state = (
                "after the last step; the weights are saved, and are scored when the run continues"
            )

    @property
    def command(self) -> str:
        """The command that continues the run."""
        return self.run_dir.resume_command if self.begun else "the same command again"

    def stopped(self, number: int, state: str) -> Interrupted:
        """The error that ends the run."""
        name = signal.Signals(number).name
        kind = Interrupted if number == signal.SIGINT else Preempted
        return kind(f"Stopped by {name} {state}. To go on, type: {self.command}")

    def _received(self, number: int, frame: object) -> None:
        if self._waits and not self.number:
            self.number = number
        else:
            raise self.stopped(number, self._state if not self._waits else "at once")
