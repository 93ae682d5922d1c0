"""Work in separate processes."""

import os
import signal
import time
from pathlib import Path

import pytest

from prefixtune_cli.compare.workers import Workers


def square(number: int) -> str:
    return str(number * number)


def die(number: int) -> str | None:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(number)


def die_once(marker: Path) -> str:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def own_gpu() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_each_result_comes_with_the_index_of_its_work_whatever_ends_first() -> None:
    with Workers(2) as workers:
        ended = list(workers.run(square, [(i,) for i in range(6)]))
    assert sorted(ended) == [(i, str(i * i)) for i in range(6)]


def test_a_process_that_is_killed_fails_its_own_work_and_no_other() -> None:
    with Workers(2) as workers:
        ended = dict(workers.run(die, [(2,), (1,), (3,), (4,)]))
    assert [ended[i] for i in (0, 2, 3)] == ["4", "9", "16"]
    assert "was killed" in (ended[1] or "")


def test_work_whose_process_was_killed_is_tried_once_more(tmp_path: Path) -> None:
    with Workers(2) as workers:
        ended = dict(workers.run(die_once, [(tmp_path / "marker",)]))
    assert ended == {0: "done"}


def fail_once_the_first_has_ended() -> None:
    with Workers(2) as workers:
        next(workers.run(sleep, [(0,), (90,), (90,)]))
        raise KeyError


def test_an_error_in_the_block_ends_the_processes_at_once() -> None:
    before = time.monotonic()
    with pytest.raises(KeyError):
        fail_once_the_first_has_ended()
    assert time.monotonic() - before < 60


def test_each_process_sees_a_gpu_of_its_own() -> None:
    with Workers(2, ["3", "5"]) as workers:
        ended = dict(workers.run(own_gpu, [()] * 8))
    assert {*ended.values()} <= {"3", "5"}


def test_one_worker_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "here")
    assert list(Workers(1).run(own_gpu, [()])) == [(0, "here")]
