"""A comparison's folder: what is in it, and which folders are taken for one. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from prefixtune_cli.errors import UsageError
from prefixtune_cli.run_dir import write_atomically

RESULTS, TABLE = "results.json", "table.md"
_MARK = ".comparison"


def check_free(folder: Path) -> None:
    """Raise UsageError where the folder holds something that no comparison has made."""
    if not folder.exists() or (folder / _MARK).exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty and no comparison's folder. Give another one with --out."
        )


def mark(folder: Path) -> None:
    """Make it a comparison's folder."""
    write_atomically(folder / _MARK, "")
