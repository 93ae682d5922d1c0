"""The processes of a run: joining their launcher, and talking before and after the group exists."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed import HashStore

from prefixtune_cli.errors import LostWorker, ResourceError, UsageError
from prefixtune_cli.parallel import processes
from prefixtune_cli.parallel.processes import Processes, inside_a_launcher, joined, leads

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher's variables are set before or after the test."""
    for name in (*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in NAMES:
        os.environ.pop(name, None)


def test_alone_a_process_is_all_of_them() -> None:
    with joined(None) as alone:
        assert (alone.rank, alone.size, alone.leads) == (0, 1, True)
        assert alone.first_on_each_node(lambda: "made") == "made"
        assert alone.agree(3, 0) == (3, 0)
        assert alone.gathered("mine") == ["mine"]
        assert alone.joined({1: "a"}) == {1: "a"}
        assert list(alone.share(3)) == [0, 1, 2]
        assert alone.told("said") == "said"
    assert not inside_a_launcher()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, as torchrun .* but no RANK and no MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "RANK=1, as .* but no MASTER_ADDR and no MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, as .* but no WORLD_SIZE and no RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number"),
        ({"WORLD_SIZE": "1", "RANK": "-1"}, "RANK must be a number"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "ranks go from 0 to WORLD_SIZE - 1"),
        ({"WORLD_SIZE": "0", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "ranks go"),
    ],
)
def test_what_a_launcher_has_left_in_the_environment_is_told_with_what_to_type(
    given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said) as found, joined(None):
        pytest.fail("the processes were joined")
    assert f"type: unset {' '.join(given)}." in str(found.value)


def test_a_rank_without_a_number_of_processes_keeps_nobody_from_reporting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert leads()


def test_shares_are_disjoint_and_together_everything() -> None:
    shares = [list(Processes(rank, 3).share(8)) for rank in range(3)]
    assert sorted(piece for share in shares for piece in share) == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def in_threads(
    count: int, work: Callable[[Processes], object], folder: Path, *, cyclic: bool = False
) -> list[object]:
    """The results of `work` in `count` threads, which share a store as processes do; two on each node."""
    store, given = HashStore(), dict[int, object]()

    def run(rank: int) -> None:
        try:
            local, node = (rank // 2, rank % 2) if cyclic else (rank % 2, rank // 2)
            own = folder / str(rank)
            own.mkdir(exist_ok=True)
            given[rank] = work(Processes(rank, count, local, str(node), store, own))
        except Exception as error:
            given[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return [given[rank] for rank in range(count)]


@pytest.mark.parametrize("cyclic", [False, True], ids=["by block", "cyclic"])
def test_the_first_process_of_each_node_works_for_the_others_there(
    cyclic: bool, tmp_path: Path
) -> None:
    made: list[int] = []

    def work(one: Processes) -> list[object]:
        def make() -> dict[str, int]:
            made.append(one.rank)
            return {"by": one.rank}

        return [one.first_on_each_node(make), one.first_on_each_node(make)]

    found = in_threads(4, work, tmp_path, cyclic=cyclic)
    leaders = (0, 1, 0, 1) if cyclic else (0, 0, 2, 2)
    assert found == [[{"by": rank}] * 2 for rank in leaders]
    assert sorted(made) == sorted([*set(leaders)] * 2)


def test_what_is_given_may_be_large(tmp_path: Path) -> None:
    large = bytes(10 * 2**20)  # larger than the store's own limit of 8 MiB
    assert in_threads(2, lambda one: one.first_on_each_node(lambda: large), tmp_path) == [large] * 2


def test_numbers_are_heard_without_a_collective(tmp_path: Path) -> None:
    assert in_threads(2, lambda one: one.heard(one.rank + 5, 10), tmp_path) == [[5, 6]] * 2


def test_a_process_that_does_not_answer_is_named(tmp_path: Path) -> None:
    def work(one: Processes) -> object:
        return one.heard(1, 0.5) if one.rank == 0 else None

    lost = in_threads(2, work, tmp_path)[0]
    assert isinstance(lost, LostWorker)
    assert "Rank 1 did not answer" in str(lost)


def test_where_the_first_process_fails_the_others_know_that_it_says_why(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("broken")

    first, second = in_threads(2, lambda one: one.first_on_each_node(fail), tmp_path)
    assert isinstance(first, ValueError)
    assert isinstance(second, LostWorker)


def test_a_number_of_processes_that_was_not_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", **address}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            UsageError, match=r"asks for 4 processes on this machine, but 2 were started"
        ),
        joined(4),
    ):
        pass
    with pytest.raises(UsageError, match="asks for 1 processes"), joined(1):
        pass


SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_STEP_NODELIST": "gpu-a",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_list_of_gpus_or_one_gpu_a_process_needs_no_look_at_the_machine_again() -> None:
    """The launcher has checked, and each process sees only the chosen GPUs."""
    from prefixtune_cli.parallel.devices import count_of

    assert [count_of(gpus) for gpus in (None, "auto", 8, [0, 2], [7])] == [None, None, 8, 2, 1]


def test_under_srun_the_place_is_read_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert inside_a_launcher()
    assert not inside_a_launcher(of_nodes=True)
    processes._take_over_from_slurm()
    assert {name: os.environ[name] for name in NAMES} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "6",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu-a",
        "MASTER_PORT": "24242",
    }


def test_in_the_shell_of_an_allocation_nobody_has_started_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not inside_a_launcher()
    with joined(None) as alone:
        assert alone.size == 1


def test_slurms_list_of_nodes_is_read_by_its_own_tool(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert processes._first_host("") == "127.0.0.1"
    assert processes._first_host("login-1") == "login-1"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="Set MASTER_ADDR"):
        processes._first_host("gpu[03-04]")
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$3" = "gpu[03-04]" ] && printf "gpu03\\ngpu04\\n"\n')
    tool.chmod(0o755)
    assert processes._first_host("gpu[03-04]") == "gpu03"
