"""Signals that ask a run to stop: the user's Ctrl-C, and the SIGTERM or SIGUSR1 of a scheduler."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefixtune_cli.errors import Interrupted, Preempted
from prefixtune_cli.run_dir import RunDir

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """What the signals of this process have asked for.

    Attributes:
        number: the signal that came, 0 for none.
        begun: whether the run's recipe is in its directory; what stands there before is another run's, or nothing.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.number = 0
        self.begun = False
        self._waits = False
        self._state = "before the first step; nothing was begun"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block a signal raises `Interrupted` or `Preempted`, at once or when a checkpoint is saved."""
        before: dict[int, Any] = {}
        try:
            for wanted in SIGNALS:
                before[wanted] = signal.signal(wanted, self._received)
        except ValueError:  # not the main thread, where signals are somebody else's business
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Within the block the first signal is only remembered: whoever trains saves a checkpoint, and calls `stop`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
            self._state = (
                "after the last step; the weights are saved, and scored when the run goes on"
            )

    @property
    def command(self) -> str:
        """What goes on with the run."""
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
