"""Work in separate processes."""

import os
import signal

import pytest

from prefixtune_cli.compare.workers import Ended, Workers


def square(number: int) -> Ended:
    return Ended(str(number * number))


def die(number: int) -> Ended:
    os.kill(os.getpid(), signal.SIGKILL)
    return Ended()


def own_gpu() -> Ended:
    return Ended(os.environ["CUDA_VISIBLE_DEVICES"])


def test_results_come_in_the_order_of_the_work_whatever_ends_first() -> None:
    told: list[int] = []
    workers = Workers(2)
    ended = workers.run([(square, (i,)) for i in range(6)], lambda i, _: told.append(i))
    workers.close()
    assert [e.failure for e in ended] == ["0", "1", "4", "9", "16", "25"]
    assert sorted(told) == list(range(6))


def test_a_process_that_is_killed_fails_its_own_work_and_no_other() -> None:
    workers = Workers(2)
    work = [(square, (2,)), (die, (1,)), (square, (3,)), (square, (4,))]
    ended = workers.run(work, lambda *_: None)
    workers.close()
    assert [e.failure for e in (ended[0], ended[2], ended[3])] == ["4", "9", "16"]
    assert "was killed" in (ended[1].failure or "")


def test_each_process_sees_a_gpu_of_its_own() -> None:
    workers = Workers(2, ["3", "5"])
    ended = workers.run([(own_gpu, ())] * 8, lambda *_: None)
    workers.close()
    assert {e.failure for e in ended} <= {"3", "5"}


def test_one_worker_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "here")
    assert Workers(1).run([(own_gpu, ())], lambda *_: None)[0].failure == "here"
