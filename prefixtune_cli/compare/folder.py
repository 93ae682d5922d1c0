"""A comparison's folder: the files in it, and how other folders are kept from being overwritten. It needs no torch."""

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
    """Raise UsageError where the folder has files that no comparison has written."""
    if not os.path.exists(folder) or (folder / _MARK).exists():
        return
    if not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty and no comparison's folder. Give another one with --out."
        )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the block no other command writes to the folder.

    Raises:
        UsageError: see `check_folder`.
        RunDirError: another command writes there already.
        ResourceError: the folder cannot be written to.
    """
    check_folder(folder)
    with locked(folder):
        yield


def mark(folder: Path) -> None:
    """Mark the folder as a comparison's."""
    write_atomically(folder / _MARK, "")
