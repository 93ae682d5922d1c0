"""The lock on a folder: the second command is refused, and a dead process holds no lock."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefixtune_cli.errors import ResourceError, RunDirError
from prefixtune_cli.lock import LOCK, in_use, locked

HOLD = """
import sys
from pathlib import Path
from prefixtune_cli.lock import locked
with locked(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another(folder: Path, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(folder), how]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.stdin.close()


def refused(folder: Path, *, shared: bool = False) -> str:
    with pytest.raises(RunDirError) as found, locked(folder, shared=shared):
        pytest.fail("the lock was had")
    return str(found.value)


def test_a_second_command_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with another(tmp_path) as first:
        for shared in (False, True):
            said = refused(tmp_path, shared=shared)
            assert f"process {first.pid} on {socket.gethostname()}, since 20" in said
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    with another(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (tmp_path / LOCK).exists()
        with locked(tmp_path):
            assert str(first.pid) not in refused(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_those_that_share_the_folder_refuse_who_wants_it_alone(tmp_path: Path) -> None:
    with another(tmp_path, "shared") as first, locked(tmp_path, shared=True):
        said = refused(tmp_path)
        assert f"process {first.pid} on" in said
        assert f"process {os.getpid()} on" in said
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()


def test_the_lock_ends_with_its_holder_whatever_processes_that_has_forked(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    wait = fork.Event()
    with locked(tmp_path):
        child = fork.Process(target=wait.wait, args=(60,))
        child.start()
    try:
        with locked(tmp_path):
            pass
    finally:
        wait.set()
        child.join()


def test_a_folder_that_stays_empty_goes_again_with_those_around_it(tmp_path: Path) -> None:
    with locked(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "recipe.yaml").write_text("")
    assert os.listdir(tmp_path / "runs" / "a") == ["recipe.yaml"]


def test_lines_of_many_dead_holders_that_are_cut_short_are_no_error(tmp_path: Path) -> None:
    with locked(tmp_path, shared=True):
        with open(tmp_path / LOCK, "a") as file:
            file.write(f"999999999 {socket.gethostname()} then\n" * 200 + "12\n")
        with pytest.raises(RunDirError, match=f"process {os.getpid()} on "), locked(tmp_path):
            pass


def test_who_only_looks_refuses_nobody(tmp_path: Path) -> None:
    with another(tmp_path) as first:
        threading.Timer(0.1, first.stdin.close).start()  # type: ignore[union-attr]
        with locked(tmp_path):
            pass


def test_a_folder_is_in_use_by_who_has_it_alone_while_that_lives(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    with another(tmp_path, "shared"):
        assert not in_use(tmp_path)
    with another(tmp_path) as first:
        assert in_use(tmp_path)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert not in_use(tmp_path)


def test_a_name_that_is_too_long_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="File name too long"), locked(tmp_path / ("x" * 300)):
        pytest.fail("the lock was had")


def test_a_folder_that_cannot_be_made_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("")
    with pytest.raises(ResourceError, match=r"afile/x cannot be written to: .*/afile is a file"):  # noqa: SIM117
        with locked(tmp_path / "afile" / "x"):
            pytest.fail("the lock was had")


def test_a_file_system_without_locks_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
