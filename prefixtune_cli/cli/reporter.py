"""Shows progress on stderr: a live bar at a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event, RLock, Thread
from typing import Any

from prefixtune_cli.cli import console

SECONDS_BETWEEN_LINES = 10

# The figures that a bar or a line shows, in this order; if there is too little room, the last ones are left out.
_SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "held-out loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_memory_gib": "{:.1f} GiB",
}


def _shown(figures: Mapping[str, float]) -> list[str]:
    return [form.format(figures[name]) for name, form in _SHOWN.items() if name in figures]


class _Beginnings:
    """When each task began, and how much was done then; a task that goes back begins again, as in the next run."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, int]] = {}
        self._done: dict[str, int] = {}

    def of(self, task: str, done: int) -> tuple[float, int]:
        if done < self._done.get(task, done + 1):
            self._found[task] = time.monotonic(), done
        self._done[task] = done
        return self._found[task]


def _rate(done: int, started: float) -> str:
    """Items a second; empty if nothing is done yet."""
    seconds = time.monotonic() - started
    return f"{done / seconds:,.1f}/s" if done and seconds > 0 else ""


BAR, NARROW_BAR = 24, 8
# Characters of a task's name; a longer one may be cut to make room for the bar and the loss.
NAME = 12
TIME = len(" ETA 100:00:00")


@dataclass
class _Task:
    """The parts of a line of the display, before they are fitted to the terminal."""

    name: str
    total: int
    figures: list[str] = field(default_factory=list)


def fitted(tasks: Sequence[_Task], width: int) -> tuple[int, int, int]:
    """The widths of the names, the bar and the figures, chosen so that the count and the time left are never cut.

    Args:
        tasks: the lines of the display.
        width: of the terminal, in characters.
    """
    count = max(2 * len(str(task.total)) + 1 for task in tasks)
    name = max(len(task.name) for task in tasks)
    every = max(len("  ".join(task.figures)) for task in tasks)
    first = max(len(task.figures[0]) if task.figures else 0 for task in tasks)
    room = width - count - TIME - 4  # a space between two columns
    bar = BAR if room - name - BAR >= every else NARROW_BAR
    name = min(name, max(NAME, room - bar - first), room - bar)
    return name, bar, max(room - bar - name, 0)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


def _as_fits(parts: Sequence[str], width: int) -> str:
    """The first parts, as many as fit."""
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text else part
        if len(longer) > width:
            break
        text = longer
    return text


class LiveReporter:
    """A progress bar with loss, learning rate, tokens per second, ETA and peak memory, if there is room."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = BarColumn(bar_width=BAR)
        self._progress = Progress(
            TextColumn("{task.description}"),
            self._bar,
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console.stderr(),
            refresh_per_second=1,  # drawing takes time from the computation
        )
        self._ids: dict[str, Any] = {}
        self._tasks: dict[str, _Task] = {}
        self._measured: set[str] = set()  # tasks that report figures of their own
        self._started = _Beginnings()

    def __enter__(self) -> LiveReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def notice(self, text: str) -> None:
        console.notice(text)

    def warning(self, text: str) -> None:
        console.warning(text)

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if task not in self._tasks:
            self._tasks[task] = _Task(task, total)
            self._ids[task] = self._progress.add_task(task, total=total, figures="")
        started, first = self._started.of(task, done)
        self._tasks[task].total = total
        self._progress.update(self._ids[task], completed=done, total=total)
        if figures:
            self._measured.add(task)
        rate = "" if task in self._measured else _rate(done - first, started)
        if said := _shown(figures) or ([rate] if rate else []):
            self._tasks[task].figures = said
        self._fit()

    def _fit(self) -> None:
        """Fit the display to the terminal's current width."""
        name, self._bar.bar_width, figures = fitted([*self._tasks.values()], console.stderr().width)
        for key, task in self._tasks.items():
            self._progress.update(
                self._ids[key],
                description=_cut(task.name, name),
                figures=_as_fits(task.figures, figures),
            )


class LineReporter:
    """A line for each measurement; without one, a line every ten seconds, even within a long step."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._figures: dict[str, dict[str, float]] = {}  # each task's latest
        self._started = _Beginnings()
        self._at_work: tuple[str, int, int] | None = None  # the task, its done items, all its items
        self._lock, self._over = RLock(), Event()

    def __enter__(self) -> LineReporter:
        Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1, SECONDS_BETWEEN_LINES)):
            with self._lock:
                if self._at_work is not None:
                    self.progress(*self._at_work, {})

    def notice(self, text: str) -> None:
        console.notice(text)

    def warning(self, text: str) -> None:
        console.warning(text)

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        with self._lock:
            self._at_work = (task, done, total) if done < total else None
            self._tell(task, done, total, figures)

    def _tell(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        if done == 0:  # the task begins, or begins again, as in the next run
            self._figures.pop(task, None)
        latest = self._figures.setdefault(task, {})
        latest.update(figures)
        started, first = self._started.of(task, done)
        silent_for = now - self._last.setdefault(task, now)
        if not figures and silent_for < SECONDS_BETWEEN_LINES and (done < total or first == total):
            return
        if done == total and not figures and self._last[task] == now:
            return
        self._last[task] = now
        speed = (done - first) / (now - started) if now > started else 0
        left = f"  ETA {int((total - done) / speed)} s" if speed and done < total else ""
        said = "  ".join(_shown(figures or latest)) or _rate(done - first, started)
        console.notice(f"{task} {done}/{total}  {said}{left}".rstrip())


def reporter() -> LiveReporter | LineReporter:
    """The reporter that fits stderr."""
    return LiveReporter() if console.stderr().is_terminal else LineReporter()
