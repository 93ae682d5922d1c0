"""A comparison's folder: what is in it, and which folders are taken for one. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from prefixtune_cli.errors import UsageError
from prefixtune_cli.lock import LOCK, locked
from prefixtune_cli.run_dir import write_atomically

RESULTS, TABLE = "results.json", "table.md"
_MARK = ".comparison"


def check_folder(folder: Path) -> None:
    """Raise UsageError where the folder holds something that no comparison has made."""
    if not os.path.exists(folder) or (folder / _MARK).exists():
        return
    if not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty and no comparison's folder. Give another one with --out."
        )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the block no other command writes there.

    Raises:
        UsageError: see `check_folder`.
        RunDirError: another command writes there already.
        ResourceError: the folder cannot be written to.
    """
    check_folder(folder)
    with locked(folder):
        yield


def mark(folder: Path) -> None:
    """Make it a comparison's folder."""
    write_atomically(folder / _MARK, "")
