"""The rows of a file of any known type, each with its place in the file.

Why not pandas or the readers of `datasets`? They name no line, keep only the last value of a duplicate key without a
word, and hold a line of one gigabyte in memory. These readers stream, and stop with one clear error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prefixtune_cli.data.csv_rows import csv_rows
from prefixtune_cli.data.json_rows import json_rows, jsonl_rows
from prefixtune_cli.data.lines import Rows
from prefixtune_cli.data.stored import parquet_rows, saved_rows
from prefixtune_cli.errors import DataError

READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
    ".tsv": csv_rows,
    ".ndjson": jsonl_rows,
}


def read(path: Path) -> Rows:
    """Yield (line, row) of a file, by its suffix, or of a saved data set. Lines and stored rows count from 1.

    Raises:
        DataError: the file is empty, unreadable or wrong; the message names the line.
    """
    rows = saved_rows(path) if path.is_dir() else READERS[path.suffix.lower()](path)
    try:
        first = next(rows, None)
        if first is None:
            size = "" if path.is_dir() else f"{path.stat().st_size} bytes and "
            raise DataError(
                f"{path} is empty: it has {size}no row. Give a file with at least one row."
            )
        yield first
        yield from rows
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
