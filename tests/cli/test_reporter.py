"""Progress on stderr: a bar at a terminal, lines elsewhere, with every measured figure."""

import io
import re
import time

import pytest
from rich.console import Console

from prefixtune_cli.cli import console, reporter

FIGURES = {
    "loss": 1.5,
    "learning_rate": 1e-3,
    "tokens_per_second": 12345.0,
    "peak_memory_gib": 3.21,
}
SHOWN = "loss 1.5000  lr 1.00e-03  12,345 tokens/s  3.2 GiB"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    made = Console(file=io.StringIO(), force_terminal=True, width=140)
    monkeypatch.setattr(console, "stderr", lambda: made)
    return made


def written(made: Console) -> str:
    file = made.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_terminal_gets_a_bar_with_figures_and_time_left(terminal: Console) -> None:
    chosen = reporter.reporter()
    assert isinstance(chosen, reporter.LiveReporter)
    with chosen as live:
        live.progress("training", 0, 8, {})
        live.progress("training", 4, 8, FIGURES)
        live.progress("training", 5, 8, {})
        live.warning("mind the gap")
    shown = written(terminal)
    assert "5/8" in shown
    assert SHOWN in shown
    assert "ETA" in shown
    assert "mind the gap" in shown


def test_a_pipe_gets_a_line_a_measurement_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Console(file=io.StringIO(), width=140)
    monkeypatch.setattr(console, "stderr", lambda: made)
    chosen = reporter.reporter()
    assert isinstance(chosen, reporter.LineReporter)
    with chosen as lines:
        for step in range(9):
            lines.progress("training", step, 8, FIGURES if step == 4 else {})
    found = written(made).splitlines()
    assert len(found) == 2
    assert found[0].startswith(f"training 4/8  {SHOWN}  ETA")
    assert found[1] == f"training 8/8  {SHOWN}"


def test_a_line_between_two_measurements_has_the_latest_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If training is slow, a line comes every ten seconds, and a measurement every ten steps."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    said: list[str] = []
    monkeypatch.setattr(console, "notice", said.append)
    lines = reporter.LineReporter()
    for step in range(4):
        lines.progress("training", step, 40, {"loss": 2.5} if step == 1 else {})
        clock[0] += 11
    assert [text.partition("  ETA")[0] for text in said] == [
        f"training {step}/40  loss 2.5000" for step in (1, 2, 3)
    ]
    lines.progress("training", 0, 40, {})  # the next run
    clock[0] += 11
    lines.progress("training", 1, 40, {})
    assert "loss" not in said[-1]


def test_work_without_figures_tells_how_much_of_it_is_done_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Console(file=io.StringIO(), width=140)
    monkeypatch.setattr(console, "stderr", lambda: made)
    monkeypatch.setattr(reporter, "SECONDS_BETWEEN_LINES", 0)
    with reporter.LineReporter() as lines:
        for done in (0, 30, 60):
            time.sleep(0.01)
            lines.progress("mmlu, base", done, 90, {})
    last = written(made).splitlines()[-1]
    assert re.fullmatch(r"mmlu, base 60/90  [\d,.]+/s  ETA 0 s", last), last


def test_a_task_that_begins_anew_has_a_pace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `ptp compare`, which does several runs in one process."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    said: list[str] = []
    monkeypatch.setattr(console, "notice", said.append)
    lines = reporter.LineReporter()
    for seconds, done in ((0, 0), (1000, 100), (1000, 0), (1010, 10)):
        clock[0] = seconds
        lines.progress("training", done, 100, {"loss": 1.0} if done else {})
    assert said[-1].endswith("ETA 90 s")


def test_a_step_that_takes_long_is_told_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One large batch of an evaluation may take minutes."""
    said: list[str] = []
    monkeypatch.setattr(console, "notice", said.append)
    monkeypatch.setattr(reporter, "SECONDS_BETWEEN_LINES", 0.05)
    with reporter.LineReporter() as lines:
        lines.progress("loss of base", 0, 64, {})
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
        assert said[:1] == ["loss of base 0/64"]
        lines.progress("loss of base", 64, 64, {})
        told = len(said)
        time.sleep(0.2)
        assert len(said) == told
