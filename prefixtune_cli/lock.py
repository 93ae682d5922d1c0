"""A lock on a folder: no two commands write there at once.

The lock is `flock` on a file in the folder. The kernel releases it when the process ends, however it ends, and Linux
extends it over NFS to other machines. The file says who holds the lock, and is deleted when the lock is released. A
file that a killed process leaves behind locks nothing. On a file system without locks, nothing is locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from prefixtune_cli.errors import ResourceError, RunDirError

LOCK = ".lock"
SECONDS_TO_LOOK = 0.5  # another command may hold the lock only to check it
_NO_LOCKS_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_held: set[int] = set()  # open files


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock on `folder` within the block. The folder is created, and removed again if it stays empty.

    Args:
        folder: the folder of a run, a comparison or a merge.
        shared: several commands may share the lock, if each of them only adds whole files.

    Raises:
        RunDirError: another command writes there; the message names it.
        ResourceError: the folder cannot be created or written to.
    """
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _take(folder, shared=shared)
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be written to: {why_not(folder, error)}. Give another --out."
        ) from error
    try:
        yield
    finally:
        _release(folder / LOCK, file)
        for one in new:
            with contextlib.suppress(OSError):
                one.rmdir()


def in_use(folder: Path) -> bool:
    """Whether a command has `folder` for itself, as training does. The check leaves nothing there."""
    try:
        file = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _lock(file, fcntl.LOCK_SH)
    finally:
        os.close(file)


def why_not(folder: Path, error: OSError) -> str:
    """Why a folder could not be created or written to, in words."""
    files = [path for path in (folder, *folder.parents) if os.path.isfile(path)]
    return f"{files[0]} is a file" if files else error.strerror or str(error)


def _take(folder: Path, *, shared: bool) -> int:
    """Take the lock, and return the open file that holds it."""
    deadline = time.monotonic() + SECONDS_TO_LOOK
    while True:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        _held.add(file)
        try:
            alone = _lock(file, fcntl.LOCK_EX)
            if alone:
                os.ftruncate(file, 0)  # delete the lines of dead processes
            taken = alone if not shared else _lock(file, fcntl.LOCK_SH)
            if not taken and time.monotonic() > deadline:
                raise RunDirError(
                    f"{folder} is in use: {_holders(file)} writes there. Wait until it ends, or give another --out."
                )
            if taken and os.fstat(file).st_nlink:
                since = datetime.now(UTC).isoformat(timespec="seconds")
                os.write(file, f"{os.getpid()} {socket.gethostname()} {since}\n".encode())
                return file
        except BaseException:
            _close(file)
            raise
        _close(file)
        if not taken:  # if taken, its last holder has just deleted the file: try again at once
            time.sleep(SECONDS_TO_LOOK / 10)


def _lock(file: int, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
    return True


def _release(path: Path, file: int) -> None:
    if file not in _held:  # a forked process has closed it already
        return
    with contextlib.suppress(FileNotFoundError):
        if _lock(file, fcntl.LOCK_EX) and os.path.samestat(path.stat(), os.fstat(file)):
            path.unlink()
    _close(file)


def _close(file: int) -> None:
    _held.discard(file)
    os.close(file)


def _holders(file: int) -> str:
    """The processes that the file names, without those of this machine that have ended."""
    found = []
    for line in os.pread(file, 4096, 0).decode(errors="replace").splitlines():
        if len(words := line.split()) != 3 or not words[0].isdecimal():
            continue  # a line that is incomplete, or cut off after 4,096 bytes
        pid, host, since = words
        if host != socket.gethostname() or _lives(int(pid)):
            found.append(f"process {pid} on {host}, since {since},")
    return " and ".join(found) or "another process"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True


def _forget() -> None:
    """Close the lock files in a forked process, so that it keeps no lock that its parent releases."""
    for file in list(_held):
        _close(file)


os.register_at_fork(after_in_child=_forget)
