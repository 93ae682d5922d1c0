"""The lines of a text file, and the words for a row's place in it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefixtune_cli.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
BOM = b"\xef\xbb\xbf"
SEPARATED = (".csv", ".tsv")  # their cells have no types
BY_LINE = (".jsonl", ".ndjson", ".json", *SEPARATED)

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row]]


def origin(file: str, line: int) -> str:
    """Where a row comes from, in words: `my.jsonl, line 18`, or `my.parquet, row 18` if the file has no lines."""
    return f"{file}, {_unit(file)} {line}"


def is_by_line(file: str) -> bool:
    """Whether a file has lines by its type, unlike a stored table."""
    return file.lower().endswith(BY_LINE)


@lru_cache
def _unit(file: str) -> str:
    return "line" if is_by_line(file) else "row"


def start_of(text: str, length: int = 60) -> str:
    """The beginning of a text, quoted, for an error message."""
    return repr(text if len(text) <= length else text[:length] + "…")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines, decoded, with their ends. At most MAX_LINE_BYTES of a line are in memory."""
    with open(path, "rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(
                    f"{origin(str(path), number)}: the line is longer than {MAX_LINE_BYTES // 2**20} MiB, and "
                    f"begins with {start_of(raw[:60].decode('utf-8', 'replace'))}. Put one row on each line; "
                    "if it is a JSON array on one line, name the file .json."
                )
            if number == 1:
                raw = raw.removeprefix(BOM)
            yield number, decode(raw, path, number)


def decode(raw: bytes, path: Path, line: int) -> str:
    """Decode UTF-8 that begins on this line of a file; raises DataError with the place of a wrong byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        guess = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise DataError(
            f"{origin(str(path), line)}: not UTF-8, byte 0x{raw[error.start]:02x} at position {column} of the line. "
            f"Convert the file first: {iconv(path, guess)}"
        ) from None


def iconv(path: Path, encoding: str = "latin1") -> str:
    """A command, ready to paste, that converts a file to UTF-8."""
    converted = shlex.quote(f"{path.stem}-utf8{path.suffix}")
    return f"iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > {converted}"
